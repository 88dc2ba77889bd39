"""Rows of padded and packed batches, what is summed over them, and their noise across micro-batches."""

from types import SimpleNamespace

import pytest
import torch
from conftest import collate, make_rows
from reference import Row
from torch import Tensor

from comlora_trl.branches.batches import Rows
from comlora_trl.branches.passes import expand
from comlora_trl.competition import step_noise
from comlora_trl.training.competition import StepPlan

LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def places(rows: list[Row], packed: bool) -> list[tuple[int, int]]:
    """(line, first column) of each row in the batch."""
    if not packed:
        return [(line, 0) for line in range(len(rows))]
    starts, at = [], 0
    for row in rows:
        starts.append((0, at))
        at += len(row.input_ids)
    return starts


@LAYOUTS
@pytest.mark.parametrize("multiple", [None, 40])
def test_rows_of_trls_batches(packed, multiple):
    rows = make_rows(unsupervised=(0, 2))
    inputs = collate(rows, packed, multiple)
    found = Rows.of(inputs)
    padding = found.count - len(rows)
    assert padding >= 0 and (padding == 0 or (packed and multiple))
    expected = [row.supervised for row in rows]
    assert found.supervised_tokens(inputs["labels"]).tolist() == expected + [0] * padding


@LAYOUTS
def test_sums_over_a_rows_predicted_tokens(packed):
    rows = make_rows()
    inputs = collate(rows, packed)
    lines, length = inputs["input_ids"].shape
    values = torch.randn(3, lines, length - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for branch in range(3):
        for b, (line, start) in enumerate(places(rows, packed)):
            end = start + len(rows[b].input_ids) if packed else length
            expected = 0.0
            # Column t of the values predicts token t + 1, to whose row it belongs
            for column in range(max(start - 1, 0), end - 1):
                expected += values[branch, line, column].item()
            assert Rows.of(inputs).sum(values)[branch, b].item() == pytest.approx(expected, abs=1e-12)


def read(rows: list[Row], inputs: dict[str, Tensor], keep: Tensor) -> list[list[int]]:
    """The tokens of each row that `split` hands to the selector, with token ids in the place of embeddings."""
    tokens, mask = Rows.of(inputs).split(inputs["input_ids"][..., None], keep)
    return [line[kept].flatten().tolist() for line, kept in zip(tokens, mask, strict=True)][: len(rows)]


@LAYOUTS
@pytest.mark.parametrize("multiple", [None, 40])
def test_selector_reads_the_whole_row_or_its_prompt(packed, multiple):
    rows = [*make_rows(), Row([5, 6, 7], [5, 6, 7]), Row([8, 9], [-100, 9]), Row([4, 5, 6, 7], [-100, 5, -100, 7])]
    inputs = collate(rows, packed, multiple)
    found = Rows.of(inputs)
    assert read(rows, inputs, found.real) == [row.input_ids for row in rows]
    assert read(rows, inputs, found.prompt(inputs["labels"])) == [row.prompt for row in rows]


def test_left_padded_rows():
    ids, mask = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    assert read([Row([], [])], inputs, Rows.of(inputs).real) == [[7, 8, 9]]
    assert read([Row([], [])], inputs, Rows.of(inputs).prompt(labels)) == [[7]]


def test_expanded_packed_batch_is_the_batch_of_the_repeated_rows():
    rows = make_rows()
    once, thrice = collate(rows, packed=True), collate(rows * 3, packed=True)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(expand(once[name], 3, 1, None, (name,)), thrice[name])
    assert torch.equal(expand(once["input_ids"], 3, 1).flatten(), thrice["input_ids"][0])


def test_expansion_is_branch_major_and_leaves_the_rest_alone():
    x = torch.arange(6).view(2, 3)
    nested = {"hidden": (x, [x, None]), "position": torch.arange(2), "shared": x[:1], "flag": True}
    wide = expand(nested, 2, 2)
    assert wide["hidden"][0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert wide["hidden"][1][0].size(0) == 4 and wide["hidden"][1][1] is None
    assert wide["position"].tolist() == [0, 1] and wide["shared"].size(0) == 1 and wide["flag"] is True


@LAYOUTS
@pytest.mark.parametrize("cut", [(4,), (1, 3), (2, 2), (1, 1, 1, 1)])
def test_a_row_has_the_same_noise_however_the_step_is_cut(packed, cut):
    rows, k = make_rows(), 3
    whole, start, batches = step_noise(5, 7, len(rows), k), 0, []
    for size in cut:
        batches.append(collate(rows[start : start + size], packed))
        start += size
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    plan = StepPlan.of(batches, torch.device("cpu"), accelerator)
    parts = [plan.next(5, 7, k, torch.device("cpu")) for _ in batches]
    assert torch.equal(torch.cat([noise for noise, _ in parts]), whole)
    assert {int(count) for _, count in parts} == {sum(row.supervised > 0 for row in rows)}
    assert int(plan.tokens) == int(plan.own_tokens) == sum(row.supervised for row in rows)
    assert StepPlan.of([], torch.device("cpu"), accelerator) is None


def test_noise_of_several_processes_is_that_of_one():
    rows, k = make_rows(lengths=(9, 5, 6, 12, 8, 7, 10)), 2
    # Process by process within a micro-batch: 2 and 1 rows, then 1 and 3
    dealt = [[rows[0:2], rows[3:4]], [rows[2:3], rows[4:7]]]
    batches = [[collate(part) for part in process] for process in dealt]
    counts = torch.tensor([[_counts(part) for part in process] for process in dealt])
    for rank, parts in enumerate(([slice(0, 2), slice(3, 4)], [slice(2, 3), slice(4, 7)])):
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), num_processes=2, process_index=rank, gather=lambda _: counts
        )
        plan = StepPlan.of(batches[rank], torch.device("cpu"), accelerator)
        for part in parts:
            noise, supervised = plan.next(5, 7, k, torch.device("cpu"))
            assert torch.equal(noise, step_noise(5, 7, len(rows), k)[part])
            assert int(supervised) == sum(row.supervised > 0 for row in rows)
        assert int(plan.tokens) == sum(row.supervised for row in rows)
        assert int(plan.own_tokens) == sum(row.supervised for part in dealt[rank] for row in part)


def _counts(rows: list) -> list[int]:
    return [sum(row.supervised > 0 for row in rows), sum(row.supervised for row in rows), len(rows), len(rows)]

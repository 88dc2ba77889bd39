"""`comlora-tables` on result files as lm_eval writes them."""

import json
import statistics
from pathlib import Path

import pytest
from result_files import commonsense, measured, notes, write_adapter, write_recorded, write_results

from comlora_trl.evaluation.conditions import COMMONSENSE
from comlora_trl.evaluation.results import paper
from comlora_trl.evaluation.tables import build_tables, read_runs
from comlora_trl.evaluation.tables_render import markdown

CONVAI2 = ("bleu", "meteor", "rouge_l", "bertscore_precision", "bertscore_recall", "bertscore_f1", "average")


def test_the_papers_figures():
    tables = {table.number: {row.method: row for row in table.rows} for table in build_tables([], ["2", "3", "4"])}

    assert [len(rows) for rows in tables.values()] == [9, 9, 9]
    best = "ComLoRA K=2 r=8"
    assert tables["2"]["ComLoRA K=4 r=32"].cells["accuracy"].mean == 61.09
    assert tables["3"][best].cells["average"].mean == 87.09
    assert tables["4"][best].cells["average"].mean == 48.76
    for rows in paper()["tables"]["3"]["rows"]:
        # printed means of rounded figures; the paper's own sums hold to the second digit
        assert statistics.fmean(rows[task] for task in COMMONSENSE) == pytest.approx(rows["average"], abs=0.011)


def test_seeds_of_one_method_become_mean_and_deviation(tmp_path: Path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.8)):
        adapter = write_adapter(tmp_path / f"seed{seed}" / "winner", k=2)
        write_results(tmp_path / f"seed{seed}" / "results", adapter, commonsense(accuracy))

    row = measured([tmp_path])["ComLoRA K=2 r=8"]

    assert row.runs == 3
    assert row.cells["boolq"].mean == pytest.approx(100 * (0.5 + 0.6 + 0.8) / 3)
    assert row.cells["boolq"].std == pytest.approx(100 * statistics.stdev([0.5, 0.6, 0.8]))
    assert row.cells["average"].mean == pytest.approx(100 * (0.5 + 0.6 + 0.8) / 3 + 3.5)


@pytest.mark.parametrize(
    ("adapter", "method"),
    [
        ({"rank": 16}, "LoRA r=16"),
        ({"rank": 4, "k": 4}, "ComLoRA K=4 r=4"),
        ({"rank": 4, "k": 4, "exported_branch": 0}, "ComLoRA K=4 r=4"),
        ({"rank": 4, "k": 4, "exported_branch": 3}, "ComLoRA K=4 r=4, branch 3"),
        ({"k": 1, "branches": [{"branch": 0, "score": None}]}, "LoRA r=8"),
        ({"k": 1, "branches": [{"branch": 0, "score": 1.5}]}, "ComLoRA K=1 r=8"),
        ({"k": 2, "branches": [{"branch": 0, "score": None}]}, "ComLoRA K=2 r=8, w/o selector"),
    ],
)
def test_the_adapter_tells_its_method(tmp_path: Path, adapter: dict, method: str):
    write_results(tmp_path / "results", write_adapter(tmp_path / "adapter", **adapter), commonsense(0.5))

    assert list(measured([tmp_path])) == [method]


@pytest.mark.parametrize("key", ["peft", "lora_local_path", "pretrained"])
@pytest.mark.parametrize("as_text", [True, False])
def test_the_model_is_found_in_the_arguments(tmp_path: Path, key: str, as_text: bool):
    folder = write_adapter(tmp_path / "adapter", rank=5)
    given = f"dtype=float32,{key}={folder}" if as_text else {"dtype": "float32", key: folder}
    write_results(tmp_path / "results", "x", commonsense(0.5), config={"model_args": given})

    assert list(measured([tmp_path])) == ["LoRA r=5"]


def test_without_its_adapter_a_run_has_the_models_name(tmp_path: Path):
    write_results(tmp_path, "gone/adapter/", commonsense(0.5))

    assert list(measured([tmp_path])) == ["gone/adapter"]


def test_equal_relative_names_are_different_adapters(tmp_path: Path):
    """Each seed was evaluated in its own folder, with `peft=winner/`."""
    for seed in range(2):
        write_adapter(tmp_path / f"seed{seed}" / "winner", k=2)
        write_results(tmp_path / f"seed{seed}" / "results" / "winner__", "winner/", commonsense(0.5 + 0.1 * seed))
    for seed in range(2):
        write_results(tmp_path / "elsewhere" / f"seed{seed}" / "lost__", "lost/", commonsense(0.5))

    rows = measured([tmp_path])

    assert {method: row.runs for method, row in rows.items()} == {"ComLoRA K=2 r=8": 2, "lost": 2}


def test_a_base_model_scored_twice_is_no_two_seeds(tmp_path: Path):
    for day, accuracy in enumerate((0.5, 0.6), start=1):
        config = {"model_args": {"pretrained": "org/chat"}, "model_sha": "abc"}
        write_results(tmp_path / f"{day}", "org/chat", {"comlora_boolq": {"acc,none": accuracy}}, day, config=config)

    assert measured([tmp_path])["org/chat"].cells["boolq"].figures == (60.0,)
    assert "measured twice under the same conditions, 50.00 and 60.00" in notes([tmp_path])


def test_a_name_given_holds_for_all_it_names(tmp_path: Path):
    for seed in range(2):
        adapter = write_adapter(tmp_path / f"seed={seed}" / "adapter")
        write_results(tmp_path / f"seed={seed}" / "results", adapter, commonsense(0.5))

    pattern = f"lora  R=8={tmp_path}/seed=*/results"

    assert measured([pattern])["LoRA r=8"].runs == 2
    one = measured([f"mine={tmp_path / 'seed=0'}", tmp_path])
    assert {method: row.runs for method, row in one.items()} == {"LoRA r=8": 1, "mine": 1}


def test_files_of_one_adapter_are_put_together_and_the_newer_counts(tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter")
    first, second = ("boolq", "piqa"), tuple(COMMONSENSE)[2:]
    write_results(tmp_path / "a", adapter, {"comlora_boolq": {"acc,none": 0.1}}, day=1)
    write_results(tmp_path / "b", adapter, commonsense(0.6, without=second), day=3)
    write_results(tmp_path / "c", adapter, commonsense(0.7, without=first), day=2)

    row = measured([tmp_path])["LoRA r=8"]

    assert row.runs == 1
    assert row.cells["boolq"].figures == (pytest.approx(60),)
    assert row.cells["average"].mean is not None
    assert "boolq was measured twice under the same conditions, 10.00 and 60.00; the newer counts" in notes([tmp_path])


def test_no_average_without_all_eight(tmp_path: Path):
    for seed, without in enumerate([(), ("hellaswag", "piqa")]):
        adapter = write_adapter(tmp_path / f"{seed}" / "adapter")
        write_results(
            tmp_path / f"{seed}", adapter, commonsense(0.5, without) | {"comlora_commonsense": {"acc,none": 0.9}}
        )

    row = measured([tmp_path])["LoRA r=8"]
    assert row.cells["average"].figures == (pytest.approx(53.5),)
    assert measured([tmp_path / "1"])["LoRA r=8"].cells["average"].mean is None
    text = markdown(build_tables(read_runs([str(tmp_path / "1")]), ["3"]))
    (line,) = [line for line in text.splitlines() if "| 1 run |" in line]
    assert [cell.strip() for cell in line.split("|")[3:-1]].count("–") == 3  # two tasks and the average
    assert "which has no PIQA, HellaSwag." in notes([tmp_path])
    assert "average is of 1 of 2 runs" in notes([tmp_path])


def test_mmlu_and_convai2(tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", k=4)
    groups = {"comlora_mmlu": ["comlora_mmlu_stem"], "comlora_mmlu_stem": ["comlora_mmlu_astronomy"]}
    results = {"comlora_mmlu": {"acc,letter": 0.6123}, "comlora_mmlu_stem": {"acc,letter": 0.25}}
    results["comlora_convai2"] = {f"{name},none": 10.0 + i for i, name in enumerate(CONVAI2)}
    results["comlora_convai2"] |= {"bertscore_model,none": "tiny", "bleu_stderr,none": "N/A"}
    samples = {"comlora_mmlu_astronomy": {"original": 152, "effective": 152}}
    write_results(tmp_path, adapter, results, **{"group_subtasks": groups, "n-samples": samples})

    mmlu, dialogue = (measured([tmp_path], number)["ComLoRA K=4 r=8"].cells for number in ("2", "4"))

    assert mmlu["accuracy"].mean == pytest.approx(61.23)
    assert mmlu["stem"].mean == pytest.approx(25)
    assert mmlu["humanities"].mean is None
    assert {name: cell.mean for name, cell in dialogue.items()} == {name: 10.0 + i for i, name in enumerate(CONVAI2)}
    assert "comlora_mmlu: on 152 of 14,042 rows" in notes([tmp_path], "2")
    assert "BERTScore by tiny instead of roberta-large" in notes([tmp_path], "4")
    results["comlora_convai2"]["bertscore_model,none"] = "/models/roberta-large"
    write_results(tmp_path, adapter, results, day=2)
    assert len(measured([tmp_path], "4")) == 2
    assert "not merged: BERTScore of comlora_convai2 tiny / /models/roberta-large." in notes([tmp_path], "4")
    assert measured([tmp_path], "3") == {}


def test_different_base_models_are_no_seeds(tmp_path: Path):
    for base in ("first", "second"):
        write_results(tmp_path / base, write_adapter(tmp_path / base / "adapter", base=base), commonsense(0.5))

    assert list(measured([tmp_path])) == ["LoRA r=8 (a)", "LoRA r=8 (b)"]
    assert "LoRA r=8 (a) and LoRA r=8 (b) are not merged: base first / second." in notes([tmp_path])


def test_two_adapters_that_were_in_one_folder_are_two_runs(tmp_path: Path):
    """Seen: trained one after the other into `winner/`, they became one run under the newer one's name."""
    write_recorded(tmp_path, 1, 0.5, "a", method="LoRA r=8")
    write_recorded(tmp_path, 2, 0.6, "b")
    write_recorded(tmp_path, 3, 0.8, "c", adapter={"seed": 1})
    write_adapter(tmp_path / "winner", k=2)
    (tmp_path / "winner" / "adapter_model.safetensors").write_text("c")

    rows = measured([tmp_path])

    assert {name: row.cells["boolq"].figures for name, row in rows.items()} == {
        "LoRA r=8": (50.0,),
        "ComLoRA K=2 r=8": (60.0, 80.0),
    }
    assert "winner/ no longer holds the adapter that was measured (weights aaaaaaaa)" in notes([tmp_path])


CLASHES = {
    "prompt": ({"prompt": "hira"}, "prompt comlora / hira", "comlora_boolq: prompt hira"),
    "beams": ({"decoding": {"num_beams": 4}}, "decoding greedy, 32 tokens / 4 beams", "decoding 4 beams"),
    "sampling": (
        {"decoding": {"do_sample": True, "temperature": 0.1, "max_gen_toks": 32}},
        "decoding greedy, 32 tokens / sampling (temperature 0.1), 32 tokens",
        "sampling (temperature 0.1)",
    ),
    "chat": ({"chat_template_sha256": "e" * 64}, "chat template none / eeeeeeee", "chat template eeeeeeee"),
    "limit": ({"rows": 64}, "rows of comlora_boolq 3,270 of 3,270 / 64 of 3,270", "on 64 of 3,270 rows"),
    "data": ({"data_sha256": "f" * 64}, "data of comlora_boolq dddddddd / ffffffff", ""),
    "settings": (
        {"adapter": {"settings": {"learning_rate": 1e-3}}},
        "learning_rate 0.0001 / 0.001",
        "",
    ),
    "base": ({"adapter": {"base": "other"}}, "base base / other", ""),
}


# one adapter has one training
BOTH = [(clash, same) for clash in CLASHES for same in (True, False) if not (same and clash in ("settings", "base"))]


@pytest.mark.parametrize(("clash", "same"), BOTH)
def test_what_differs_is_not_merged_and_named(tmp_path: Path, clash: str, same: bool):
    changes, named, remark = CLASHES[clash]
    write_recorded(tmp_path, 1, 0.5, "a")
    write_recorded(tmp_path, 2, 0.6, "a" if same else "b", **changes)

    rows, text = measured([tmp_path]), notes([tmp_path])

    assert {name: row.cells["boolq"].figures for name, row in rows.items()} == {
        "ComLoRA K=2 r=8 (a)": (50.0,),
        "ComLoRA K=2 r=8 (b)": (60.0,),
    }
    assert f"ComLoRA K=2 r=8 (a) and ComLoRA K=2 r=8 (b) are not merged: {named}." in text
    assert remark in text


def test_a_cache_of_answers_is_remarked(tmp_path: Path):
    config = {"model_args": {"peft": "x"}, "use_cache": "answers"}
    write_results(tmp_path, "x", {"comlora_boolq": {"acc,none": 0.5}}, config=config)

    assert "comlora_boolq: with answers from --use_cache answers, which does not know one model" in notes([tmp_path])


def test_one_adapter_under_two_names_is_told(tmp_path: Path):
    write_recorded(tmp_path / "1", 1, 0.5, "a")
    write_recorded(tmp_path / "2", 1, 0.5, "a", task="piqa", expected_rows=1838, rows=1838)

    assert "mine and theirs are figures of the same adapter." in notes(
        [f"mine={tmp_path / '1'}", f"theirs={tmp_path / '2'}"]
    )


def test_a_protocols_variant_is_a_row_of_its_own(tmp_path: Path):
    write_recorded(tmp_path, 1, 0.5, "a")
    write_recorded(tmp_path, 2, 0.6, "a", task="boolq_hira", protocol="hira", prompt="hira")

    assert [row.cells["boolq"].mean for row in measured([tmp_path]).values()] == [50.0, 60.0]
    assert "prompt comlora / hira, protocol none / hira." in notes([tmp_path])


ABLATIONS = {
    "5": ({"comlora_alignment_weight": 0.0}, "ComLoRA K=4 r=4, w/o L_align", 76.94),
    "6": ({}, "ComLoRA K=4 r=8", 83.51),
    "7": ({"comlora_top_n": 2}, "ComLoRA K=4 r=8, N=2", 86.15),
    "8": ({"comlora_annealing": "cosine"}, "ComLoRA K=4 r=8, cosine", 83.98),
    "9": ({"comlora_noise": 10.0}, "ComLoRA K=4 r=8, α=10", 84.77),
    "10": ({"exported_branch": 2}, "ComLoRA K=4 r=8, branch 2", 86.18),
}


@pytest.mark.parametrize("number", ABLATIONS)
def test_an_ablation_is_recognized_by_its_settings(tmp_path: Path, number: str):
    settings, method, average = ABLATIONS[number]
    exported = {name: settings.pop(name) for name in ("exported_branch",) if name in settings}
    adapter = write_adapter(tmp_path / "adapter", rank=4 if number == "5" else 8, k=4, **exported)
    (tmp_path / "adapter" / "training.json").write_text(
        json.dumps({"settings": {"comlora_selector": True, **settings}})
    )
    write_results(tmp_path, adapter, commonsense(0.5))
    write_results(tmp_path / "other", write_adapter(tmp_path / "lora", rank=64), commonsense(0.5))

    (table,) = build_tables(read_runs([str(tmp_path)]), [number])

    rows = {(row.method, row.source): row.cells["average"].mean for row in table.rows}
    assert rows[method, "paper"] == average and rows[method, "measured"] == pytest.approx(53.5)
    assert len(rows) == len(paper()["tables"][number]["rows"]) + 1, "no row of another method"

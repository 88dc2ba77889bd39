"""Batched = in chunks = the paper's equations, in losses and in all gradients, in float64."""

import re

import pytest
import torch
from conftest import collate, make_dataset, make_lora, make_model, make_rows
from plain_loop import (
    AT,
    DEFAULT_SELECTOR,
    STEP,
    STEPS,
    TOLERANCE,
    assert_equal,
    make_comlora,
    make_noise,
    step,
    trainable,
)
from reference import Equations, ReferenceRun, Row, eta
from torch import Tensor
from transformers import TrainerCallback

from comlora_trl.competition import CompetitionSettings, step_noise
from comlora_trl.competition.selector import SelectorSettings


def split_rows(batch: dict[str, Tensor]) -> list[Row]:
    """A collated batch as rows, without padding."""
    if "cu_seq_lens_q" in batch:
        cuts = batch["cu_seq_lens_q"].diff().tolist()
        pairs = zip(batch["input_ids"][0].split(cuts), batch["labels"][0].split(cuts), strict=True)
    else:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        lines = zip(batch["input_ids"], batch["labels"], lengths, strict=True)
        pairs = [(ids[:length], labels[:length]) for ids, labels, length in lines]
    return [Row(ids.tolist(), labels.tolist()) for ids, labels in pairs]


def values(lists: list[list[Tensor]]) -> Tensor:
    return torch.tensor([[value.item() for value in line] for line in lists], dtype=torch.float64)


CASES: dict[str, dict] = {
    "k1": {"k": 1},
    "k1_without_selector": {"k": 1, "selector": None},
    "k2": {"k": 2},
    "k3_n1": {"k": 3, "top_n": 1},
    "k3_n2": {"k": 3, "top_n": 2},
    "k4": {"k": 4},
    "k4_n3": {"k": 4, "top_n": 3},
    "constant": {"k": 2, "annealing": "constant"},
    "cosine": {"k": 2, "annealing": "cosine"},
    "linear": {"k": 2, "annealing": "linear"},
    "as_printed": {"k": 3, "equation_signs": "as_printed"},
    "strong_noise": {"k": 3, "noise": 10.0},
    "without_lm": {"k": 3, "lm_weight": 0.0, "top_n": 2},
    "without_alignment": {"k": 3, "alignment_weight": 0.0},
    "without_pairwise": {"k": 3, "pairwise_weight": 0.0},
    "weights": {"k": 3, "lm_weight": 0.5, "alignment_weight": 2.0, "pairwise_weight": 3.0},
    "without_selector": {"k": 3, "selector": None},
    "selector_of_prompt": {"k": 3, "selector": SelectorSettings(input="prompt")},
    "small_selector": {"k": 3, "selector": SelectorSettings(dim=12, ffn_dim=20, heads=3)},
    "checkpointing": {"k": 3, "checkpointing": True},
    "eager": {"k": 2, "model": {"attn_implementation": "eager"}},
    "upper_layer": {"k": 3, "lora": {"layers_to_transform": [1]}},
    "upper_layer_checkpointing": {"k": 2, "lora": {"layers_to_transform": [1]}, "checkpointing": True},
    "rslora": {"k": 2, "lora": {"use_rslora": True}},
    "dora": {"k": 3, "lora": {"use_dora": True}},
    "embedding": {"k": 3, "lora": {"target_modules": ["embed_tokens", "q_proj"]}},
    "lora_bias": {"k": 3, "lora": {"lora_bias": True}},
    "biased_base": {"k": 3, "model": {"attention_bias": True}},
    "no_row_supervised": {"k": 2, "unsupervised": (0, 1, 2, 3)},
}
_SETTINGS = set(CompetitionSettings.__dataclass_fields__)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_the_equations(name, float64):
    case = dict(CASES[name])
    settings = CompetitionSettings(**{key: case.pop(key) for key in list(case) if key in _SETTINGS})
    selector, lora = case.pop("selector", DEFAULT_SELECTOR), case.pop("lora", {})
    checkpointing, overrides = case.pop("checkpointing", False), case.pop("model", {})
    rows = make_rows(case.pop("unsupervised", (2,)))
    assert not case
    model = make_comlora(settings, selector, lora, **overrides)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    noise, at = make_noise(rows, settings.k), eta(settings.annealing, STEP, STEPS)

    run = ReferenceRun(make_model(**overrides).double(), make_lora(**lora), settings.k, trainable(model))
    equations = Equations(settings.k, settings.top_n, at, settings.noise, printed=settings.sign < 0)
    for weight in ("lm_weight", "alignment_weight", "pairwise_weight"):
        setattr(equations, weight, getattr(settings, weight))
    prompt_only = selector is not None and selector.input == "prompt"
    reference = run.losses(rows, noise, equations, selector.heads if selector else 8, prompt_only)
    expected = run.gradients(reference.total)
    if any(row.supervised for row in rows) and settings.lm_weight:
        moved = {n for n, value in expected.items() if value.abs().max() > 1e-6}
        assert {int(d) for n in moved for d in re.findall(r"\.branch_(\d)", n)} == set(range(settings.k))
        wanted = selector is not None and settings.k > 1 and settings.pairwise_weight > 0
        assert any(n.startswith("selector.") for n in moved) == wanted

    for packed in (False, True):
        for chunk in (None, 1, 2):
            loss, gradients, output = step(model, collate(rows, packed), noise, settings, chunk)
            assert loss.item() == pytest.approx(reference.total.item(), abs=TOLERANCE)
            torch.testing.assert_close(output.nll, values(reference.nll), rtol=0, atol=TOLERANCE)
            assert output.tokens.tolist() == [row.supervised for row in rows]
            if selector is not None:
                torch.testing.assert_close(output.scores, values(reference.scores), rtol=0, atol=TOLERANCE)
            assert_equal(gradients, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_more_padding_changes_nothing(packed, float64):
    settings, rows = CompetitionSettings(k=3, top_n=2), make_rows()
    model, noise = make_comlora(settings), make_noise(rows, 3)
    loss, gradients, _ = step(model, collate(rows, packed), noise, settings)
    wide_loss, wide_gradients, _ = step(model, collate(rows, packed, multiple=50), noise, settings)
    assert collate(rows, packed, multiple=50)["input_ids"].size(1) == 50
    assert wide_loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)
    assert_equal(wide_gradients, gradients)


def test_with_trls_own_head():
    """TRL's kernel works in float32: each log-probability of about 5 is off by up to 5e-7, gradients by less."""
    settings, rows = CompetitionSettings(k=3), make_rows()
    model, noise = make_comlora(settings), make_noise(rows, 3)
    run = ReferenceRun(make_model().double(), make_lora(), 3, trainable(model))
    reference = run.losses(rows, noise, Equations(3, eta=AT))
    loss, gradients, _ = step(model, collate(rows), noise)
    assert loss.item() == pytest.approx(reference.total.item(), abs=2e-6)
    assert_equal(gradients, run.gradients(reference.total), tolerance=5e-7)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_disqualified_branch_is_out_of_the_equations(chunk, float64):
    model, rows = make_comlora(CompetitionSettings(k=3)), make_rows()
    noise = make_noise(rows, 3)
    run = ReferenceRun(make_model().double(), make_lora(), 3, trainable(model))
    reference = run.losses(rows, noise, Equations(3, eta=AT, alive={0, 2}))
    loss, gradients, output = step(model, collate(rows), noise, chunk=chunk, disqualified={1: 5})
    assert loss.item() == pytest.approx(reference.total.item(), abs=TOLERANCE)
    assert_equal(gradients, run.gradients(reference.total))
    assert all(value.abs().max() == 0 for name, value in gradients.items() if ".branch_1." in name)
    assert output.ran.tolist() == [[branch != 1] * len(rows) for branch in range(3)]
    if chunk is None:
        assert output.log_probs.size(0) == 2 * len(rows)  # it does not run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_non_finite_branch_leaves_the_others_exactly(value, chunk, packed, float64):
    model, inputs = make_comlora(CompetitionSettings(k=3)), collate(make_rows(), packed)
    noise = make_noise(make_rows(), 3)
    run = ReferenceRun(make_model().double(), make_lora(), 3, trainable(model))
    # The selector reads embeddings alone, so p is unmoved; eq. 7's pairs are those of the branches that are finite
    pairs_of_two = run.losses(make_rows(), noise, Equations(3, eta=AT), racing={0, 2})
    selector = run.gradients(pairs_of_two.total)
    _, calm, _ = step(model, inputs, noise, chunk=chunk)
    next(p for name, p in trainable(model).items() if "lora_B.branch_1" in name).data.fill_(value)
    loss, hurt, output = step(model, inputs, noise, chunk=chunk)
    assert loss.isfinite() and not output.nll[1].isfinite().all()
    assert output.nll[[0, 2]].isfinite().all()
    for name, gradient in calm.items():
        if ".branch_0." in name or ".branch_2." in name:
            assert torch.equal(gradient, hurt[name]), name
        elif name.startswith("selector."):
            torch.testing.assert_close(hurt[name], selector[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_dropout_of_one_branch_is_pefts(kind, float64):
    lora, rows = {"lora_dropout": 0.3, **kind}, make_rows()
    model = make_comlora(CompetitionSettings(k=1), None, lora)
    run = ReferenceRun(make_model().double(), make_lora(**lora), 1, trainable(model))
    inputs = collate(rows)
    torch.manual_seed(11)
    loss, gradients, _ = step(model, inputs, make_noise(rows, 1))

    run.model.train()
    torch.manual_seed(11)
    logits = run.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = -log_probs[labels != -100].sum() / (labels != -100).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    assert_equal(gradients, run.gradients(expected))

    torch.manual_seed(12)
    assert abs(step(model, inputs, make_noise(rows, 1))[0].item() - loss.item()) > 1e-6  # the dropout drops


@pytest.mark.parametrize("chunk", [None, 1])
def test_checkpointing_drops_the_same_elements_again(chunk, float64):
    model, inputs = make_comlora(CompetitionSettings(k=2), lora={"lora_dropout": 0.3}), collate(make_rows())
    noise, results = make_noise(make_rows(), 2), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(11)
        results.append(step(model, inputs, noise, chunk=chunk)[1])
    assert_equal(*results)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "padding_free"])
def test_every_step_of_the_trainer_is_the_equations(train, packed, chunk, float64):
    """η(t), ε(t), tokens and rows of the whole accumulation window, through the trainer's own loss."""
    seen, steps = [], []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            named = trainable(model).items()
            steps.append(({n: p.detach().clone() for n, p in named}, {n: p.grad.clone() for n, p in named}))

    options = {"comlora_k": 3, "comlora_top_n": 2, "comlora_branch_chunk": chunk, "max_grad_norm": 0.0}
    options |= {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"padding_free": True, "max_length": None} if packed else {}
    given = {"callbacks": [Recorder()], "eval_dataset": make_dataset(3)}
    trainer = train(start=False, trainer=given, **options)
    original = trainer.data_collator

    def record(examples):
        seen.extend(examples)
        return original(examples)

    trainer.data_collator = record
    trainer.train()
    assert len(steps) == 3
    for t, (weights, gradients) in enumerate(steps):
        batch = original(seen[4 * t : 4 * t + 4])
        rows = split_rows(batch)
        assert len(rows) == 4
        run = ReferenceRun(make_model().double(), make_lora(), 3, weights)
        equations = Equations(3, 2, eta("exponential", t, 3))
        noise = step_noise(trainer.args.seed, t, 4, 3).double()
        reference = run.losses(rows, noise, equations)
        assert_equal(gradients, run.gradients(reference.total))
        assert trainer.state.log_history[t]["loss"] == pytest.approx(reference.total.item(), abs=1e-4)  # TRL rounds

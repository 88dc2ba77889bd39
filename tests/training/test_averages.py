"""Rungs measure averages of the weights: against the whole history of the weights, and over a checkpoint."""

from pathlib import Path

import pytest
import torch
from conftest import TOURNAMENT, parameters
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

import comlora_trl.training.trainer as trainer_module
from comlora_trl.competition.rungs import average_share
from comlora_trl.training.averages import AVERAGES_FILE, saved_averages

HORIZON = 0.4
FIELD = {**TOURNAMENT, "comlora_rungs": "0.4:2,0.6:1", "max_steps": 10}


def literal_average(history: list[Tensor], horizon: float) -> Tensor:
    """The average with the weight of each step written out: a_s · Π_{u>s} (1 − a_u)."""
    shares = [min(1.0, 1.0 / (horizon * step)) for step in range(1, len(history) + 1)]
    total = torch.zeros_like(history[0], dtype=torch.float64)
    for step, weights in enumerate(history):
        factor = shares[step]
        for later in shares[step + 1 :]:
            factor *= 1 - later
        total += factor * weights.double()
    return total


class History(TrainerCallback):
    """Keeps all branches' weights after each optimizer step, directly after the optimizer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        own = {name: p.detach().clone() for name, p in model.named_parameters() if ".branch_" in name}
        self.steps.append(own)


def test_the_newest_quarter_of_the_steps_has_most_of_the_weight():
    shares = [average_share(0.25, step) for step in range(1, 101)]
    assert shares[:4] == [1.0] * 4 and shares[99] == pytest.approx(0.04)
    weights, left = [], 1.0
    for share in reversed(shares):
        weights.append(left * share)
        left *= 1 - share
    assert sum(weights) == pytest.approx(1) and sum(weights[:25]) == pytest.approx(0.69, abs=0.01)


@pytest.mark.parametrize("horizon", [HORIZON, 0.0])
def test_a_rung_measures_the_average_of_the_whole_history(horizon, train, monkeypatch):
    history, seen, validate = History(), [], trainer_module.validate

    def watched(model, competition, *rest):
        tally = validate(model, competition, *rest)
        now = {name: p.detach().clone() for name, p in model.named_parameters() if ".branch_" in name}
        seen.append((competition.step, list(competition.state.living), now, tally))
        return tally

    monkeypatch.setattr(trainer_module, "validate", watched)
    trainer = train(**FIELD, comlora_rung_average=horizon, trainer={"callbacks": [history]})
    rungs = trainer.competition.state.rungs
    assert [rung["step"] for rung in rungs] == [step for step, *_ in seen[:2]] == [4, 6]
    for rung, (step, living, weights, tally) in zip(rungs, seen, strict=False):
        assert rung["average"] == (horizon or None)
        for name, value in weights.items():
            if any(f".branch_{branch}." in name for branch in living):
                values = [kept[name] for kept in history.steps[:step]]
                expected = literal_average(values, horizon) if horizon else values[-1]
                torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-9, atol=1e-12)
        assert (
            rung["validation_nll"]
            == tally.result([branch in living for branch in range(4)], "validation_loss", step)["validation_nll"]
        )
    last, _, weights, _ = seen[-1]  # the last selection measures the trained weights
    assert last == 10 and trainer.competition.state.selection["average"] is None
    assert all(torch.equal(weights[name], history.steps[-1][name]) for name in weights)
    assert trainer.averages is None


def test_averages_change_no_step(train):
    """With a rung that keeps the same branches, training is the same to the bit."""
    one, other = (train(**FIELD | {"comlora_rungs": "0.9:1"}, comlora_rung_average=h) for h in (0.0, HORIZON))
    winner = one.competition.state.leader
    assert winner == other.competition.state.leader
    own, averaged = (trainer.comlora_model.branch_parameters(winner) for trainer in (one, other))
    assert all(torch.equal(a, b) for a, b in zip(own, averaged, strict=True))


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_has_the_same_averages(kept, train, caplog):
    """The checkpoint comes before the rungs; without its averages, a line says that they begin anew."""
    options = {**FIELD, "comlora_rung_average": HORIZON, "save_strategy": "steps", "save_steps": 3}
    whole = train(**options)
    folders = {step: Path(whole.args.output_dir) / f"checkpoint-{step}" for step in (3, 6, 9)}
    assert [(folder / AVERAGES_FILE).is_file() for folder in folders.values()] == [True, False, False]
    if not kept:
        (folders[3] / AVERAGES_FILE).unlink()
    again = train(start=False, **options)
    again.train(resume_from_checkpoint=str(folders[3]))
    assert (whole.competition.state.rungs == again.competition.state.rungs) is kept
    assert ("has no averages of the weights" in caplog.text) is not kept
    if kept:
        first, second = parameters(whole), parameters(again)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("horizon", "known", "warnings"),
    [(HORIZON, True, 0), (0.9, True, 1), (0.9, False, 0), (0.0, True, 0)],
    ids=["same", "another", "another, old checkpoint", "none"],
)
def test_a_resumed_run_with_another_horizon_says_so(horizon, known, warnings, train, caplog):
    options = {**FIELD, "save_strategy": "steps", "save_steps": 3}
    folder = Path(train(**options, comlora_rung_average=HORIZON).args.output_dir) / "checkpoint-3"
    if not known:  # as earlier versions wrote the file
        save_file(load_file(folder / AVERAGES_FILE), folder / AVERAGES_FILE, metadata={"format": "pt"})
    trainer = train(start=False, **options, comlora_rung_average=horizon)
    trainer.train(resume_from_checkpoint=str(folder))
    text = f"comlora_rung_average={HORIZON}, and this run has {horizon}: they go on with {horizon} from step 3"
    assert caplog.text.count(text) == caplog.text.count("averages of the weights") == warnings
    assert trainer.competition.state.rungs[0]["average"] == (horizon or None)


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_horizon_outside_0_to_1_is_refused(value, train):
    with pytest.raises(ValueError, match=f"comlora_rung_average={value} is not possible"):
        train(**FIELD, comlora_rung_average=value)


def test_a_checkpoint_before_the_first_step_keeps_the_averages(train):
    """As transformers' JIT checkpoints save: at the beginning of a step, also of a resumed run's first one."""

    class Early(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (0, 3):
                folder = Path(args.output_dir) / f"early-{state.global_step}"
                trainer.comlora_model.save_pretrained(folder)
                trainer.averages.save(folder, True)

    options = {**FIELD, "comlora_rung_average": HORIZON, "save_strategy": "steps", "save_steps": 3}
    trainer = train(start=False, trainer={"callbacks": [Early()]}, **options)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    saved = saved_averages(folder / "checkpoint-3")
    assert saved_averages(folder / "early-0") is None
    trainer = train(start=False, trainer={"callbacks": [Early()]}, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    again = saved_averages(Path(trainer.args.output_dir) / "early-3")
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)


def test_figures_of_averaged_weights_are_marked(train, capsys):
    """In the log, the table and the card, also where an evaluation falls on a rung's step."""
    trainer = train(**FIELD, comlora_rung_average=HORIZON, eval_strategy="steps", eval_steps=4)
    rung = next(entry for entry in trainer.state.log_history if "eval_comlora/averaged_loss_0" in entry)
    trained = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert rung["step"] == trained["step"] == 4
    first = trainer.competition.state.rungs[0]
    living = [branch for branch in range(4) if branch not in first["retired"]]
    assert rung["eval_comlora/averaged_loss_0"] == first["validation_nll"][0]
    assert all(f"eval_comlora/loss_{branch}" in trained for branch in living)
    branches = trainer.competition_summary()["branches"]
    winner = trainer.competition.state.leader
    assert [one["average"] for one in branches] == [None if b == winner else HORIZON for b in range(4)]
    assert "figures of averaged weights, at a rung" in capsys.readouterr().out
    card = (Path(trainer.args.output_dir) / "winner" / "README.md").read_text()
    assert "figures of averaged weights, at a rung." in card


def test_a_run_that_stops_before_its_rungs_frees_the_averages(train):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = train(**FIELD, comlora_rung_average=HORIZON, trainer={"callbacks": [Stop()]})
    assert trainer.state.global_step == 2 and trainer.averages is None

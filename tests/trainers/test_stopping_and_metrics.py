"""Early stopping, the best checkpoint and compute_metrics: of every trainer, as in TRL's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, SFT, Kind, difference, logged, perturb, start_from
from peft import PeftModel
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback

from comlora_trl.training.checkpoints import load_state

ALL = [SFT, *KINDS]
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 10}
# The higher loss counts as better: the first evaluation is the best one, and the second one ends the run
BEST |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
BEST |= {"per_device_eval_batch_size": 13, "comlora_winner_by": "validation_loss", "comlora_selector": False}
TRLS = {name: value for name, value in BEST.items() if not name.startswith("comlora")}


def best(kind: Kind, folder: Path, trl: bool = False, **options: Any) -> Any:
    """A trainer that stops at the first evaluation whose loss is no higher than the one before."""
    given = {"model": kind.single(), "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]}
    return kind.run(folder, trl, given, **(TRLS if trl else BEST) | {"learning_rate": 1e-2} | options)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_one_branch_stops_where_trls_trainer_does(kind, tmp_path):
    ours, trl = best(kind, tmp_path / "ours", comlora_k=1), best(kind, tmp_path / "trl", trl=True)
    perturb(ours)
    start_from(trl, ours, 0)
    for trainer in (ours, trl):
        trainer.train()
        assert trainer.state.global_step == 4
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert ours.state.best_metric == pytest.approx(trl.state.best_metric, abs=1e-5)
    assert difference(ours, 0, trl) < 1e-5


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_the_winner_is_the_leader_of_the_best_checkpoint(kind, tmp_path):
    """The run stops after the fourth step; the winner, its figures and its files are of the second one."""
    ours = best(kind, tmp_path, comlora_branch_learning_rates=[1e-3, 1e-2, 2e-2], comlora_k=3)
    perturb(ours)
    ours.train()
    assert ours.state.global_step == 4
    checkpoint = tmp_path / "checkpoint-2"
    saved, found = load_state(checkpoint).selection, ours.competition.state.selection
    assert found == saved and found["step"] == 2
    losses = found["validation_nll"]
    assert losses[found["winner"]] == min(losses) == pytest.approx(ours.state.best_metric, abs=1e-5)
    exported = PeftModel.from_pretrained(kind.single(), tmp_path / "winner").state_dict()
    kept = PeftModel.from_pretrained(kind.single(), checkpoint / f"branch_{found['winner']}").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in exported.items())
    assert sum(ours.competition.state.wins) == 4  # of the whole run


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_compute_metrics_sees_the_leader(kind, tmp_path):
    """What compute_metrics is given at each evaluation is what TRL's trainer gives it for the leader's weights."""
    seen, leaders = [], []

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(torch.tensor(prediction.predictions))
        return {"largest": float(prediction.predictions.max())}

    class Listener(TrainerCallback):
        def on_evaluate(self, args, state, control, model, metrics, **kwargs):
            leader = metrics["eval_comlora/winner"]
            assert model.active_adapter == f"branch_{leader}"
            assert metrics["eval_loss"] == pytest.approx(metrics[f"eval_comlora/loss_{leader}"], abs=1e-5)
            parameters = model.named_branch_parameters(leader).items()
            leaders.append({name.replace(f"branch_{leader}", "default"): p.detach().clone() for name, p in parameters})

    options = {"per_device_eval_batch_size": 13, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    given = {"model": kind.single(), "compute_metrics": compute_metrics, "callbacks": [Listener()]}
    rates = {"comlora_k": 3, "comlora_branch_learning_rates": [1e-3, 1e-1, 1e-2], "comlora_selector": False}
    ours = kind.run(tmp_path / "ours", given=given, **options, **rates)
    perturb(ours)
    ours.train()
    mine = seen.copy()
    seen.clear()
    given = {"model": kind.single(), "compute_metrics": compute_metrics}
    trl = kind.run(tmp_path / "trl", trl=True, given=given, **options)
    for leader in leaders:
        with torch.no_grad():
            for name, parameter in trl.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(leader[name])
        trl.evaluate()
    assert len(leaders) == len(mine) == len(seen) == 2
    for given, expected in zip(mine, seen, strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
    assert logged(ours, "eval_largest") == pytest.approx([float(one.max()) for one in seen], abs=1e-6)

"""A branch that diverges is out: its rows and gradients are zero, the others go on, and it cannot win."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import parameters
from transformers import TrainerCallback


class Poison(TrainerCallback):
    """Makes a branch's weights infinite before a step."""

    def __init__(self, *branches: int, step: int = 2) -> None:
        self.branches, self.step = branches, step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            for branch in self.branches:
                model.branch_parameters(branch)[-1].data.fill_(math.inf)


def test_diverged_branch_is_disqualified_and_the_others_train_on(train):
    trainer = train(comlora_k=3, trainer={"callbacks": [Poison(1)]})
    state = trainer.competition.state
    assert state.disqualified == {1: 3}
    assert state.selection["winner"] != 1
    values = parameters(trainer)
    assert all(value.isfinite().all() for value in values.values())
    assert all(value.abs().max() == 0 for name, value in values.items() if "branch_1" in name)
    summary = json.loads((Path(trainer.args.winner_dir) / "competition.json").read_text())
    assert summary["branches"][1]["disqualified_at_step"] == 3
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_the_others_train_as_if_nothing_had_happened(train):
    # Without selector and clipping the branches share nothing, so the survivors must not notice
    options = {"comlora_k": 3, "comlora_selector": False, "max_grad_norm": 0.0}
    calm = parameters(train(**options))
    hurt = parameters(train(**options, trainer={"callbacks": [Poison(1)]}))
    for name, value in calm.items():
        if "branch_1" not in name:
            assert torch.equal(value, hurt[name]), name


def test_all_branches_lost_is_an_error(train):
    with pytest.raises(RuntimeError, match="all 2 branches have diverged by step 3: lower learning_rate"):
        train(comlora_k=2, trainer={"callbacks": [Poison(0, 1)]})

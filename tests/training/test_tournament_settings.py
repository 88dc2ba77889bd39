"""A tournament's settings: what is left out, what is remarked, what is refused."""

import pytest
import torch
from conftest import TOURNAMENT, make_arguments
from peft.optimizers import create_lorafa_optimizer

from comlora_trl import ComLoRAConfig
from comlora_trl.competition.rungs import Rung, early_remark


def test_the_short_way(tmp_path):
    config = ComLoRAConfig(**make_arguments(tmp_path, comlora_tournament=True, learning_rate=2e-3))
    assert (config.comlora_k, config.comlora_selector, config.comlora_rows) == (4, False, "shared")
    assert config.comlora_branch_learning_rates == [1e-3, 2e-3, 4e-3, 8e-3]
    assert (config.comlora_rungs, config.winner_by) == ("0.1:2,0.25:1", "validation_loss")
    given = {"comlora_k": 8, "comlora_rungs": "0.5:2", "comlora_selector": True}
    own = ComLoRAConfig(**make_arguments(tmp_path, comlora_tournament=True, **given))
    assert (own.comlora_rungs, own.comlora_rows, len(own.comlora_branch_learning_rates)) == ("0.5:2", "all", 8)
    plain = ComLoRAConfig(**make_arguments(tmp_path))
    assert (plain.comlora_k, plain.comlora_selector, plain.comlora_rows, plain.comlora_rungs) == (2, True, "all", None)
    assert plain.winner_by == "selector" and not plain.independent


EARLY = [
    # steps of the rungs, rows, branches, shared, warm-up; rows each branch has seen, the step to try
    (6, 16, 4, True, 5, "each branch has seen 24 rows by then: try a first rung after step 25 "),
    (6, 16, 4, False, 5, "each branch has seen 96 rows by then: try a first rung after step 7 "),
    (7, 16, 4, False, 5, None),
    (25, 16, 4, True, 5, None),
    (24, 16, 4, True, 5, "each branch has seen 96 rows by then: try a first rung after step 25 "),
    (20, 64, 4, True, 30, "seen 320 rows by then, all in the warm-up of 30 steps: try a first rung after step 31 "),
]


@pytest.mark.parametrize("step, rows, k, shared, warmup, expected", EARLY)
def test_a_first_rung_that_tells_little_is_remarked(step, rows, k, shared, warmup, expected):
    remark = early_remark({step: Rung(0.1, 2), step + 9: Rung(0.2, 1)}, rows, k, shared, warmup)
    assert remark is None if expected is None else expected in remark and f"rung at step {step} " in remark
    assert early_remark({}, rows, k, shared, warmup) is None


def test_the_remark_is_printed_at_the_start(train, capsys):
    settings = {**TOURNAMENT, "comlora_rows": "shared", "comlora_rungs": "0.5:1", "gradient_accumulation_steps": 2}
    train(**settings, warmup_steps=2)
    lines = capsys.readouterr().out.splitlines()
    [place] = [place for place, line in enumerate(lines) if line.startswith("Tournament: ")]
    assert lines[place + 1].startswith("the rung at step 6 may decide by chance, because each branch has seen 24 rows")
    assert lines[place + 1].endswith("or all rows for every branch (--comlora_rows all)")


BAD = {
    "rungs not increasing": ({"comlora_rungs": "0.5:2,0.25:1"}, "the fractions of training must rise"),
    "rungs past the end": ({"comlora_rungs": "0.5:2,1.0:1"}, "above 0 and below 1"),
    "counts not falling": ({"comlora_rungs": "0.25:2,0.5:2"}, "must fall from below comlora_k=4"),
    "counts of K": ({"comlora_rungs": "0.25:4"}, "must fall from below comlora_k=4"),
    "no rung": ({"comlora_rungs": "half"}, "'half' is not FRACTION:BRANCHES"),
    "rates not K": (
        {"comlora_branch_learning_rates": [1e-3]},
        "1 rates is not possible: it must be comlora_k=4",
    ),
    "a rate of 0": (
        {"comlora_branch_learning_rates": [1e-3, 0.0, 1e-3, 1e-3]},
        "0.0 is not possible",
    ),
    "one branch": (
        {"comlora_k": 1, "comlora_tournament": True},
        "it must be 2 or more in a tournament",
    ),
    "shared with a selector": ({"comlora_rows": "shared", "comlora_selector": True}, "eq. 5-9 compare the branches'"),
    "shared how": ({"comlora_rows": "some"}, "one of all, shared"),
    "a smaller batch": ({"comlora_rungs": "0.25:1", "auto_find_batch_size": True}, "a retry can't bring retired"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ComLoRAConfig(**make_arguments(tmp_path, **{"comlora_k": 4, **options}))


def test_more_rungs_than_steps(train):
    with pytest.raises(ValueError, match=r"not possible with 2 optimizer steps: they fall on steps 1, 1 of 2"):
        train(comlora_rungs="0.1:2,0.25:1", **{**TOURNAMENT, "max_steps": 2})


def test_an_optimizer_of_ones_own_has_one_rate(train):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="comlora_branch_learning_rates need the optimizer to be made here"):
        train(start=False, trainer={"optimizers": (optimizer, None)}, **TOURNAMENT)


def test_lora_fa_has_no_rungs(train):
    trainer = train(start=False, comlora_rungs="0.5:1", **TOURNAMENT)
    trainer.optimizer = create_lorafa_optimizer(trainer.comlora_model, r=4, lora_alpha=8, lr=1e-3)
    with pytest.raises(ValueError, match="does not go with LoRA-FA's optimizer"):
        trainer.create_optimizer()

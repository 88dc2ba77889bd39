"""TRL's recipes: at K = 1 without a selector they train as TRL's own trainer does, at K = 2 they end in a winner."""

from typing import Any

import pytest
import torch
from conftest import difference, make_lora, make_model, parameters
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from recipes import AXES, LORA, RECIPES, Tracker, arguments_of, given_of

FIGURES = ("loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy", "entropy", "train_loss")
IDS = torch.arange(3, 21).view(2, 9)


def train(trainer: SFTTrainer) -> list[float]:
    """Trains and returns every micro-batch's loss; those that are logged are rounded."""
    losses, step = [], trainer.training_step

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded
    trainer.train()
    return losses


def logged(trainer: SFTTrainer, figure: str) -> list[float]:
    return [entry[figure] for entry in trainer.state.log_history if figure in entry]


def tracked(trainer: SFTTrainer) -> list[dict[str, float]]:
    return [logs for c in trainer.callback_handler.callbacks if isinstance(c, Tracker) for logs in c.logs]


def test_every_value_of_every_axis_has_a_recipe():
    for axis, values in AXES.items():
        assert {row[axis] for row in RECIPES.values()} == set(values)


@pytest.mark.parametrize("name", RECIPES)
def test_one_branch_without_selector_is_trls_trainer(name, tmp_path):
    row = RECIPES[name]
    trl = SFTTrainer(
        make_model(),
        SFTConfig(**arguments_of(row, tmp_path / "trl")),
        peft_config=make_lora(**LORA[row["lora"]]),
        **given_of(row),
    )
    expected = train(trl)
    config = ComLoRAConfig(**arguments_of(row, tmp_path / "ours", comlora_k=1, comlora_selector=False))
    ours = ComLoRASFTTrainer(make_model(), config, peft_config=make_lora(**LORA[row["lora"]]), **given_of(row))
    losses = train(ours)

    assert len(expected) == 3 * int(row["accumulation"])
    assert losses == pytest.approx(expected, abs=1e-6)
    evaluated = {key for entry in trl.state.log_history for key in entry if key.startswith("eval") and "loss" in key}
    assert len(evaluated) == {"none": 0, "one": 1, "dict": 2}[row["evaluation"]]
    for figure in (*FIGURES, *evaluated):
        theirs = logged(trl, figure)
        # Entries beyond TRL's are evaluations that choose the winner
        assert logged(ours, figure)[: len(theirs)] == pytest.approx(theirs, abs=1e-6), figure
    names = [set(logs) for logs in tracked(trl)]
    assert all(any(wanted <= set(logs) for logs in tracked(ours)) for wanted in names)
    adapter = {n.replace("default", "branch_0"): p for n, p in trl.model.named_parameters() if p.requires_grad}
    assert difference(adapter, parameters(ours)) < 1e-6


@pytest.mark.parametrize("name", RECIPES)
def test_two_branches_end_in_a_winner_for_plain_peft(name, tmp_path):
    row = RECIPES[name]
    config = ComLoRAConfig(**arguments_of(row, tmp_path / "ours") | {"max_steps": 2})
    trainer = ComLoRASFTTrainer(make_model(), config, peft_config=make_lora(**LORA[row["lora"]]), **given_of(row))
    assert all(torch.tensor(train(trainer)).isfinite())
    trained = {n: p for n, p in parameters(trainer).items() if "lora_B" in n}
    assert all(any(f"branch_{k}" in n and p.any() for n, p in trained.items()) for k in (0, 1))
    plain = PeftModel.from_pretrained(make_model(), trainer.args.winner_dir).eval()
    expected = trainer.comlora_model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)

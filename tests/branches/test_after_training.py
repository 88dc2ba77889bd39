"""A model that trains or has trained is for everyone else what PEFT makes of it: no branch is in the way."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

IDS = torch.randint(3, 99, (8, 7), generator=torch.Generator().manual_seed(0))
LORA = {"lora_dropout": 0.3}


def make_trainer(folder: Path, callbacks: tuple = (), base: nn.Module | None = None, k: int = 2) -> ComLoRASFTTrainer:
    arguments = make_arguments(folder, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05)
    return ComLoRASFTTrainer(
        base or make_model(),
        ComLoRAConfig(**arguments, comlora_k=k),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(5),
        processing_class=make_tokenizer(),
        peft_config=make_lora(**LORA),
        callbacks=list(callbacks),
    )


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def by_peft(model: nn.Module, adapter: str) -> Tensor:
    """The logits of one branch, by a plain PEFT model with its weights."""
    with torch.random.fork_rng():
        plain = get_peft_model(make_model(), make_lora(**LORA), adapter_name=adapter).eval()
    values = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(values[name])
    return logits(plain)


class Observer(TrainerCallback):
    """What a callback may do with the model after a step."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.modes: list[bool] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.modes.append(all(module.training for module in model.modules()))

    def on_step_end(self, args, state, control, model, **kwargs):
        base = model.get_base_model().eval()
        expected = by_peft(model, model.active_adapter)
        self.found += [(logits(base, IDS[:rows]), expected[:rows]) for rows in (1, 2, 3, 8)]
        other = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for same in (other, torch.load(file, weights_only=False)):
            self.copies.append((logits(same), expected))
        for parameter in other.parameters():
            parameter.data.zero_()
        self.copies.append((logits(base), expected))
        self.copies.append((logits(other.get_base_model()), torch.zeros_like(expected)))


@pytest.fixture(scope="module")
def observed(tmp_path_factory) -> tuple[Observer, ComLoRASFTTrainer]:
    observer = Observer()
    trainer = make_trainer(tmp_path_factory.mktemp("observed"), (observer,))
    trainer.train()
    return observer, trainer


@pytest.fixture
def trained(tmp_path) -> ComLoRASFTTrainer:
    trainer = make_trainer(tmp_path / "out")
    trainer.train()
    return trainer


def assert_same(pairs: list[tuple[Tensor, Tensor]]) -> None:
    assert pairs
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_base_model_in_a_callback_is_the_active_adapters_for_every_row(observed):
    assert_same(observed[0].found)


def test_copies_and_pickles_in_training_are_models_of_their_own(observed):
    assert_same(observed[0].copies)


def test_evaluation_mode_of_the_base_in_a_callback_does_not_stay(observed):
    assert observed[0].modes == [True] * 3


def test_what_a_callback_did_changed_nothing(observed, tmp_path):
    calm = make_trainer(tmp_path)
    calm.train()
    values = dict(calm.model.named_parameters())
    for name, parameter in observed[1].model.named_parameters():
        assert torch.equal(parameter, values[name]), name


@pytest.mark.parametrize("rows", [4, 8])
def test_the_merged_model_is_the_winner(trained, rows):
    winner = PeftModel.from_pretrained(make_model(), trained.args.winner_dir).eval()
    merged = trained.model.merge_and_unload().eval()
    assert_same([(logits(merged, IDS[:rows]), logits(winner, IDS[:rows]))])
    assert_plain(merged)


def assert_plain(model: nn.Module) -> None:
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(type(module).__module__.startswith("comlora_trl") for module in model.modules())


def plain_sft(base: nn.Module, folder: Path) -> SFTTrainer:
    return SFTTrainer(
        base,
        SFTConfig(**make_arguments(folder, max_steps=2)),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
    )


@pytest.mark.parametrize("then", [plain_sft, lambda base, folder: make_trainer(folder, base=base, k=3)])
@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
def test_the_base_trains_again(trained, tmp_path, how, then: Callable):
    base = getattr(trained.model, how)()
    assert_plain(base)
    if how == "unload":
        assert_same([(logits(base.eval()), logits(make_model().eval()))])
    other = make_model()
    other.load_state_dict(base.state_dict())
    losses = []
    for model in (base, other):
        run = then(model, tmp_path / f"run-{len(losses)}")
        run.train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len(losses[0]) > 1

"""A loss that a user computes from `model(**inputs)` trains every branch, as TRL's trainer trains one by it."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    TOURNAMENT,
    difference,
    exhaustive,
    make_arguments,
    make_dataset,
    make_lora,
    make_model,
    make_tokenizer,
    parameters,
)
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

RATES = [0.1, 0.3, 0.5]
# Independent branches: each one is a TRL trainer of its own
INDEPENDENT = {"comlora_k": 3, "comlora_selector": False, "comlora_branch_learning_rates": RATES}
SGD = {"optim": "sgd", "max_steps": 4, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}


def from_logits(trainer, model, inputs, items):
    labels = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def the_models_own(trainer, model, inputs, items):
    return model(**inputs, num_items_in_batch=items).loss


def with_a_penalty(trainer, model, inputs, items):
    """TRL's loss, and the distance from the base model."""
    loss = trainer.trls_loss(model, dict(inputs), num_items_in_batch=items)
    labels = inputs.pop("labels")
    with torch.no_grad(), trainer.accelerator.unwrap_model(model).disable_adapter():
        reference = model(**inputs).logits.log_softmax(-1)
    gap = nn.functional.kl_div(model(**inputs).logits.log_softmax(-1), reference, log_target=True, reduction="sum")
    return loss + 0.1 * gap / (labels != -100).sum()


def twice(trainer, model, inputs, items):
    first = model(**inputs, num_items_in_batch=items)
    second = model(**inputs | {"input_ids": inputs["input_ids"].flip(1)}, num_items_in_batch=items)
    return first.loss + 0.5 * second.loss


LOSSES = [from_logits, the_models_own, with_a_penalty, twice]


def having(loss, base: type) -> type:
    """A trainer whose `compute_loss` is overridden, as a user does it."""

    class Own(base):
        calls = 0

        def trls_loss(self, *args, **kwargs):
            return base.compute_loss(self, *args, **kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls += 1
            if not self.model.training:
                return base.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
            return loss(self, model, inputs, num_items_in_batch)

    return Own


def smoothed_function(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func`."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=0.2, reduction="sum")
    return total / num_items_in_batch


def run(kind: type, config: type, folder: Path, given: dict | None = None, model: nn.Module | None = None, **options):
    arguments = config(**make_arguments(folder, **SGD | options))
    data = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(13), "processing_class": make_tokenizer()}
    return kind(model or make_model().double(), arguments, peft_config=make_lora(), **data, **given or {})


def check(ours: ComLoRASFTTrainer, trls: list[SFTTrainer], tolerance: float = 1e-7) -> None:
    """Trains all, each of TRL's from the weights of one branch, and compares losses and adapters."""
    model = ours.comlora_model
    with torch.no_grad():  # a loss has a gradient with respect to A from the first step on
        for parameter in model.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
    for branch, trainer in enumerate(trls):
        start = {name.replace(f"branch_{branch}", "default"): p for name, p in model.named_parameters()}
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(start[name])
    ours.train()
    state = ours.competition.state
    assert sum(state.wins) == ours.state.global_step or len(trls) == 1
    trained = parameters(ours)
    for branch, trainer in enumerate(trls):
        trainer.train()
        own = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        found = {n.replace(f"branch_{branch}", "default"): p for n, p in trained.items() if f"branch_{branch}" in n}
        assert difference(found, own) < tolerance
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logged = [entry[f"comlora/loss_{branch}"] for entry in ours.state.log_history if "loss" in entry]
        assert logged == pytest.approx(losses, abs=2e-4)  # TRL rounds what it logs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"comlora_branch_chunk": 1, "gradient_checkpointing": True},
        *exhaustive({"gradient_checkpointing": True}, {"comlora_branch_chunk": 2}),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_every_branch_is_a_trainer_with_this_loss(loss, options, tmp_path, float64):
    ours = run(having(loss, ComLoRASFTTrainer), ComLoRAConfig, tmp_path / "ours", **INDEPENDENT, **options)
    options = {name: value for name, value in options.items() if not name.startswith("comlora")}
    trls = [
        run(having(loss, SFTTrainer), SFTConfig, tmp_path / f"{rate}", **options, learning_rate=rate) for rate in RATES
    ]
    check(ours, trls)
    micro_batches = 4 * options.get("gradient_accumulation_steps", 1)
    assert ours.calls == 3 * micro_batches + 1  # the very first call finds out that the loss calls the model
    rows = 4 * 4 * 3 * (2 if loss is twice else 1)
    assert ours.competition.state.row_passes == rows * (1 + (loss is with_a_penalty))


@pytest.mark.parametrize(
    "options, given",
    [
        ({"loss_type": "dft"}, {}),
        ({"label_smoothing_factor": 0.1}, {}),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, {}),
        ({}, {"compute_loss_func": smoothed_function}),
        ({"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, {"compute_loss_func": smoothed_function}),
    ],
    ids=["dft", "smoothing", "dft_smoothing", "function", "function_accumulated"],
)
@pytest.mark.parametrize("chunk", [1, *exhaustive(None)])
def test_trls_other_losses(options, given, chunk, tmp_path, float64):
    more = INDEPENDENT | options | ({"comlora_branch_chunk": chunk} if chunk else {})
    ours = run(ComLoRASFTTrainer, ComLoRAConfig, tmp_path / "ours", given, **more)
    trls = [run(SFTTrainer, SFTConfig, tmp_path / f"{rate}", given, **options, learning_rate=rate) for rate in RATES]
    check(ours, trls)
    assert [e["num_tokens"] for e in ours.state.log_history if "num_tokens" in e] == [
        e["num_tokens"] for e in trls[0].state.log_history if "num_tokens" in e
    ]


@pytest.mark.parametrize("selector", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_one_branch_is_trls_trainer(loss, selector, tmp_path, float64):
    kind, options = having(loss, ComLoRASFTTrainer), {"learning_rate": 0.3}
    if selector and loss is with_a_penalty:
        pytest.skip("super().compute_loss() is eq. 10's then")
    ours = run(kind, ComLoRAConfig, tmp_path / "ours", comlora_k=1, comlora_selector=selector, **options)
    check(ours, [run(having(loss, SFTTrainer), SFTConfig, tmp_path / "trl", **options)])


def trls_own(trainer, model, inputs, items):
    return SFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=items)


@pytest.mark.parametrize(
    "options",
    [
        {"comlora_k": 3, "comlora_selector": False},
        {"comlora_k": 3, "comlora_selector": False, "padding_free": True, "max_length": None},
        INDEPENDENT | {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        TOURNAMENT | {"comlora_rungs": "0.3:2,0.6:1"},
        TOURNAMENT | {"comlora_rungs": "0.3:2,0.6:1", "comlora_rows": "shared"},
        TOURNAMENT | {"comlora_rows": "shared", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
        TOURNAMENT | {"comlora_rows": "shared", "comlora_branch_chunk": 2, "gradient_checkpointing": True},
        TOURNAMENT | {"comlora_rows": "shared", "packing": True, "max_length": 64},
    ],
    ids=[
        "mean",
        "packed",
        "independent",
        "rungs",
        "shared",
        "unequal shares",
        "shared in chunks",
        "shared and packed",
    ],
)
def test_trls_loss_per_view_is_the_competitions(options, tmp_path, float64):
    """Both ways to the same losses, gradients and figures; TRL's trains each branch by its view."""
    options = {"optim": "sgd", "max_steps": 8, **options}
    ours = run(ComLoRASFTTrainer, ComLoRAConfig, tmp_path / "ours", **options)
    by_view = run(having(trls_own, ComLoRASFTTrainer), ComLoRAConfig, tmp_path / "view", **options)
    ours.train()
    by_view.train()
    assert difference(parameters(by_view), parameters(ours)) < 1e-9
    one, other = by_view.competition.state, ours.competition.state
    assert (one.row_passes, one.wins, one.retired) == (other.row_passes, other.wins, other.retired)
    # TRL takes a mean over branches, not over all tokens, which differs where these have other rows
    apart = "accuracy|entropy" if options.get("comlora_rows") else "no other"
    for one, other in zip(by_view.state.log_history, ours.state.log_history, strict=True):
        for name in other:
            if not re.search(f"runtime|per_second|{apart}", name):
                assert one[name] == pytest.approx(other[name], abs=2e-3), name


class Calls(TrainerCallback):
    """Asks for losses and outputs in the middle of a run, and for gradients that it keeps for itself."""

    def __init__(self, backward: bool = False) -> None:
        self.backward, self.trainer = backward, None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        batch = self.trainer.data_collator([self.trainer.train_dataset[0]])
        if self.backward:
            model(**batch).loss.backward()
            return
        self.trainer.compute_loss(model, dict(batch))
        output = model(**batch)
        parameter = model.branch_parameters(0)[0]
        gradient = torch.autograd.grad(output.loss, [parameter])
        assert gradient[0].shape == parameter.shape and output.logits.requires_grad


@pytest.mark.parametrize("loss", [None, from_logits, with_a_penalty])
def test_a_callback_that_asks_for_losses_changes_nothing(loss, tmp_path):
    kind = ComLoRASFTTrainer if loss is None else having(loss, ComLoRASFTTrainer)
    calm = run(kind, ComLoRAConfig, tmp_path / "calm", **INDEPENDENT)
    calm.train()
    callback = Calls()
    asked = run(kind, ComLoRAConfig, tmp_path / "asked", {"callbacks": [callback]}, **INDEPENDENT)
    callback.trainer = asked
    asked.train()
    assert difference(parameters(asked), parameters(calm)) == 0
    assert asked.competition.state == calm.competition.state


def test_a_callback_can_t_train_one_branch(tmp_path):
    callback = Calls(backward=True)
    trainer = run(ComLoRASFTTrainer, ComLoRAConfig, tmp_path, {"callbacks": [callback]}, **INDEPENDENT)
    callback.trainer = trainer
    with pytest.raises(
        RuntimeError, match=r"would train branch_0 alone of K=3 branches.*: compute it in compute_loss"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.model(**batch).loss.backward()  # outside of a training the model is PEFT's


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_selector_needs_rows(loss, tmp_path):
    """Eq. 5-9 need the loss of each row; it ends at the first step."""
    trainer = run(having(loss, ComLoRASFTTrainer), ComLoRAConfig, tmp_path, comlora_k=2)
    message = r"would train branch_0 alone of K=2 branches.*super\(\)\.compute_loss.*comlora_selector=False"
    with pytest.raises(RuntimeError, match=message) as error:
        trainer.train()
    assert trainer.state.global_step == 0 and "\n" not in str(error.value)


def test_the_trainers_model_is_no_stand_in(tmp_path):
    trainer = run(
        having(lambda trainer, model, inputs, items: trainer.model(**inputs).loss, ComLoRASFTTrainer),
        ComLoRAConfig,
        tmp_path,
        **INDEPENDENT,
    )
    with pytest.raises(RuntimeError, match="from the model that compute_loss is given"):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_options_that_the_selector_does_not_go_with(options, tmp_path):
    given = {} if options else {"compute_loss_func": smoothed_function}
    with pytest.raises(ValueError, match="does not work with the selector of K=2 .*comlora_selector=False"):
        run(ComLoRASFTTrainer, ComLoRAConfig, tmp_path, given, **options)


@pytest.mark.parametrize("options", [{"comlora_k": 2}, INDEPENDENT])
def test_a_loss_that_goes_on_from_ours_is_as_it_was(options, tmp_path):
    """It is called once for all branches, with the model to look at."""
    plain = run(ComLoRASFTTrainer, ComLoRAConfig, tmp_path / "plain", **options)
    plain.train()
    seen: list[Tensor] = []

    def logs(trainer, model, inputs, items):
        with torch.no_grad():
            seen.append(model(input_ids=inputs["input_ids"]).logits)
        assert model.config is trainer.model.config and trainer.accelerator.unwrap_model(model).peft_config
        return trainer.trls_loss(model, inputs, num_items_in_batch=items)

    own = run(having(logs, ComLoRASFTTrainer), ComLoRAConfig, tmp_path / "own", **options)
    own.train()
    assert own.calls == len(seen) == 4 and seen[0].size(0) == 4
    assert difference(parameters(own), parameters(plain)) == 0


def test_a_branch_whose_loss_is_not_finite_is_disqualified(tmp_path):
    calm = run(having(from_logits, ComLoRASFTTrainer), ComLoRAConfig, tmp_path / "calm", **INDEPENDENT)
    calm.train()

    def breaks(trainer, model, inputs, items):
        loss = from_logits(trainer, model, inputs, items)
        return loss * math.nan if trainer.state.global_step == 2 and getattr(model, "branch", 0) == 1 else loss

    hurt = run(having(breaks, ComLoRASFTTrainer), ComLoRAConfig, tmp_path / "hurt", **INDEPENDENT)
    hurt.train()
    assert hurt.competition.state.disqualified == {1: 3}
    expected, found = parameters(calm), parameters(hurt)
    moved = {name for name, value in found.items() if not torch.equal(value, expected[name])}
    assert moved and all("branch_1" in name for name in moved)

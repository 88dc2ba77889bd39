"""PEFT's switches leave the model as they found it: what trains in each branch, the active branch, the mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import TOURNAMENT, difference, parameters
from peft.helpers import rescale_adapter_scale
from plain_loop import make_comlora
from test_passes import IDS, Interrupted, K, forward, logits
from transformers import TrainerCallback

from comlora_trl.branches.layers import SwitchedOffError
from comlora_trl.branches.model import BranchModel
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.model import ComLoRAModel

LORA = {"target_modules": "all-linear"}


def found(model: BranchModel) -> dict[str, object]:
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    active = [
        model.active_adapter,
        model.base_model.active_adapter,
        *(one.active_adapters for one in model.adapted_layers),
    ]
    return {
        "trained": trained,
        "active": active,
        "off": [one.disable_adapters for one in model.adapted_layers],
        "merged": [list(one.merged_adapters) for one in model.adapted_layers],
        "training": [module.training for module in model.modules()],
    }


def other(model: BranchModel) -> str:
    """An adapter that is not active, where there is one."""
    return next((name for name in reversed(model.peft_config) if name != model.active_adapter), model.active_adapter)


@contextmanager
def layers_off(model: BranchModel) -> Iterator[None]:
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()


@contextmanager
def one_layer_off(model: BranchModel) -> Iterator[None]:
    model.adapted_layers[3].enable_adapters(False)
    try:
        yield
    finally:
        model.adapted_layers[3].enable_adapters(True)


@contextmanager
def another_adapter(model: BranchModel, inference_mode: bool = False) -> Iterator[None]:
    own = model.active_adapter
    model.set_adapter(other(model), inference_mode)
    try:
        yield
    finally:
        model.set_adapter(own)


@contextmanager
def another_of_the_layers(model: BranchModel) -> Iterator[None]:
    own = model.active_adapter
    for layer in model.adapted_layers:
        layer.set_adapter(other(model))
    try:
        yield
    finally:
        for layer in model.adapted_layers:
            layer.set_adapter([own])


@contextmanager
def merged(model: BranchModel) -> Iterator[None]:
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()


@contextmanager
def off_within_off(model: BranchModel) -> Iterator[None]:
    own = model.active_adapter
    with model.disable_adapter():
        with model.disable_adapter():
            model.set_adapter(other(model))
        model.set_adapter(own)
        yield


@contextmanager
def off_in_inference(model: BranchModel) -> Iterator[None]:
    with another_adapter(model, True), model.disable_adapter():
        yield


@contextmanager
def off_without_gradients(model: BranchModel) -> Iterator[None]:
    own = model.active_adapter
    with torch.no_grad(), model.disable_adapter(), model.disable_adapter():
        model.set_adapter(other(model))
        model.set_adapter(own)
        yield


SWITCHES: dict[str, Callable] = {
    "disable_adapter": lambda model: model.disable_adapter(),
    "layers_off": layers_off,
    "one_layer_off": one_layer_off,
    "set_adapter": another_adapter,
    "inference_mode": lambda model: another_adapter(model, True),
    "set_adapter_of_layers": another_of_the_layers,
    "merge_adapter": merged,
    "off_within_off": off_within_off,
    "off_in_inference": off_in_inference,
    "off_without_gradients": off_without_gradients,
    "rescaled": lambda model: rescale_adapter_scale(model, 0.5),
}


def make(frozen: str | None, **options: object) -> ComLoRAModel:
    model = make_comlora(CompetitionSettings(k=K), lora=LORA | options)
    for name, parameter in model.named_parameters():
        if frozen and frozen in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("frozen", [None, "lora_A", "layers.1.mlp.up_proj.lora_B.branch_1"])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_and_back(name, frozen, fails):
    """LoRA-FA freezes every A; a user may freeze any one matrix."""
    model = make(frozen)
    before, outputs = found(model), logits(model)
    forward(model).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(Interrupted) if fails else nullcontext():
        with SWITCHES[name](model):
            logits(model)
            if fails:
                raise Interrupted
    assert found(model) == before
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=1e-12)
    model.zero_grad()
    forward(model).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and len({name.split(".branch_")[1][0] for name in gradients}) == K
    assert difference(gradients, expected) < 1e-9


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_other_kinds_of_layers(options):
    model = make(None, **options)
    before = found(model)
    for name in ("disable_adapter", "set_adapter", "inference_mode"):
        with SWITCHES[name](model):
            assert found(model) != before
        assert found(model) == before


def test_within_the_block_nothing_trains_and_the_base_answers():
    model = make(None)
    outputs = logits(model)
    with model.disable_adapter():
        assert not any(p.requires_grad for branch in range(K) for p in model.branch_parameters(branch))
        assert not torch.allclose(logits(model), outputs)
        with pytest.raises(SwitchedOffError, match="adapters are switched off"):
            forward(model)
    model.set_adapter("branch_1", inference_mode=True)
    assert not any(p.requires_grad for branch in range(K) for p in model.branch_parameters(branch))
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for branch in range(K) for p in model.branch_parameters(branch))
    model.set_adapter("branch_0")
    assert all(p.requires_grad for branch in range(K) for p in model.branch_parameters(branch))


def test_without_gradients_no_module_is_visited_and_the_base_answers(monkeypatch):
    model, plain = make(None), make(None)
    with torch.no_grad():
        model.set_adapter("branch_1")
        before, outputs = found(model), logits(model)
        with torch.enable_grad(), plain.disable_adapter():
            expected = logits(plain).detach()
        monkeypatch.setattr(model, "get_model_status", None)
        with model.disable_adapter():
            with model.disable_adapter():
                pass
            assert torch.equal(logits(model), expected) and not torch.allclose(expected, outputs)
            assert model.is_switched_off
            with pytest.raises(SwitchedOffError, match="adapters are switched off"):
                forward(model)
        assert found(model) == before and torch.equal(logits(model), outputs)


def test_a_merged_adapter_stays_merged_through_disable_adapter():
    model = make(None)
    outputs = logits(model)
    model.merge_adapter()
    before = found(model)
    with model.disable_adapter():
        logits(model)  # PEFT takes it out of the base for this
    assert found(model) == before and before["merged"][0] == ["branch_0"]
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=1e-12)
    with pytest.raises(SwitchedOffError, match="branch_0 is merged into the base model"):
        forward(model)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=1e-12)


def test_what_is_asked_for_by_name_holds():
    model = make(None)
    model.set_adapter("branch_0", inference_mode=True)
    model.set_requires_grad("branch_1")
    model.set_adapter("branch_0")
    trained = {branch: {p.requires_grad for p in model.branch_parameters(branch)} for branch in range(K)}
    assert trained == {0: {False}, 1: {True}}


class Switching(TrainerCallback):
    """Goes through every switch at the beginning and the end of every step."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        for switch in SWITCHES.values():
            if switch not in (merged, SWITCHES["rescaled"]):  # a merge rounds
                with switch(model), torch.no_grad():
                    model(input_ids=IDS)

    on_pre_optimizer_step = on_step_end = on_step_begin


@pytest.mark.parametrize(
    "options", [{"comlora_k": 3}, TOURNAMENT | {"comlora_rungs": "0.25:2,0.6:1"}], ids=["k3", "rungs"]
)
def test_switches_in_a_callback_change_nothing(train, options):
    calm = train(**options)
    switched = train(**options, trainer={"callbacks": [Switching()]})
    assert difference(parameters(switched), parameters(calm)) == 0


def test_switches_before_and_between_two_trainings(train):
    """The second competition has branches that the first one's rungs dropped."""
    options = TOURNAMENT | {"comlora_rungs": "0.25:2,0.6:1", "max_steps": 6, "comlora_overwrite_winner": True}

    def run(switch: bool) -> tuple[dict, set[str]]:
        trainer = train(start=False, **options)
        for _ in range(2):
            if switch:
                Switching().on_step_begin(None, None, None, trainer.model)
            trainer.train()
        trainer.competition.reset()
        return parameters(trainer), {p.requires_grad for b in range(4) for p in trainer.model.branch_parameters(b)}

    torch.manual_seed(0)
    calm = run(False)
    torch.manual_seed(0)
    switched = run(True)
    assert switched[1] == calm[1] == {True}
    assert difference(switched[0], calm[0]) == 0

"""A pass over branches begins with its forward and ends with its backward, however either ends."""

import copy

import pytest
import torch
from conftest import collate, make_rows
from plain_loop import assert_equal, make_comlora, make_noise, step
from torch import Tensor, nn

from comlora_trl.branches.batches import Rows
from comlora_trl.compat import at_the_end_of_backward, running_backward
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.model import ComLoRAModel

K = 2
IDS = torch.randint(3, 99, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[False, True], ids=["plain", "checkpointing"])
def model(request) -> ComLoRAModel:
    model = make_comlora(CompetitionSettings(k=K), lora={"target_modules": "all-linear"})
    if request.param:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def forward(model: ComLoRAModel, chunk: int | None = None) -> Tensor:
    inputs = collate(make_rows())
    rows = Rows.of(inputs)
    weights = torch.ones(K, rows.count, dtype=torch.float64)
    output = model.run_branches({**inputs, "fused_lm_head": True, "use_cache": False}, rows, weights, chunk=chunk)
    return -output.log_probs.sum()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def gradients(model: ComLoRAModel) -> dict[str, Tensor]:
    return step(model, collate(make_rows()), make_noise(make_rows(), K))[1]


def assert_nothing_left(model: ComLoRAModel) -> None:
    assert model.competing.current() is None and model.competing.names == ()
    assert all(group.weights is None and group._waiting is None for group in model.competing.groups)


class Interrupted(Exception):
    pass


def interrupt(*_: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("chunk", [None, 1])
def test_nothing_is_left_after_a_backward(model, chunk):
    before = logits(model.get_base_model())
    loss = forward(model, chunk)
    assert_nothing_left(model)
    assert torch.equal(logits(model.get_base_model()), before)  # between a forward and its backward
    loss.backward()
    assert_nothing_left(model)
    assert torch.equal(logits(model.get_base_model()), before)


def test_nothing_is_left_after_a_forward_without_gradients(model):
    before = logits(model.get_base_model())
    with torch.no_grad():
        forward(model)
    assert_nothing_left(model)
    assert torch.equal(logits(model.get_base_model()), before)


def test_nothing_is_left_after_a_forward_that_fails(model):
    before, expected = logits(model.get_base_model()), gradients(model)
    hook = model.get_base_model().model.layers[1].mlp.down_proj.register_forward_hook(interrupt)
    with pytest.raises(Interrupted):
        forward(model)
    hook.remove()
    assert_nothing_left(model)
    assert torch.equal(logits(model.get_base_model()), before)
    assert_equal(gradients(model), expected, 0.0)


def test_layers_that_first_run_without_gradients_get_theirs(model, monkeypatch):
    """As where a model goes through its layers several times and learns from the last."""
    expected, backbone = gradients(model), model.get_base_model().model
    original = backbone.forward

    def forward_twice(*args, **kwargs):
        with torch.no_grad():
            original(*args, **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(backbone, "forward", forward_twice)
    assert_equal(gradients(model), expected)


@pytest.mark.parametrize("chunk", [None, 1])
def test_nothing_is_left_after_a_backward_that_fails(model, chunk):
    """Out of memory say; whoever calls next, and be it the base model's layers, finds PEFT's own."""
    base = model.get_base_model()
    before, expected = logits(base), gradients(model)
    loss = forward(model, chunk) if chunk is None else None
    hook = base.model.layers[0].mlp.down_proj.lora_B["branch_1"].weight.register_hook(interrupt)
    with pytest.raises(Interrupted):
        if chunk is None:
            loss.backward()
        else:
            forward(model, chunk).backward()
    hook.remove()
    copied = copy.deepcopy(model)
    assert_nothing_left(copied)
    assert torch.equal(logits(base), before)
    assert_nothing_left(model)
    assert torch.equal(logits(copied), before)
    model.zero_grad()
    assert_equal(gradients(model), expected, 0.0)


def test_a_backward_finds_its_own_pass_again(model):
    """Layers run again under checkpointing, as they did in their forward, whatever ran in between."""
    expected = gradients(model)
    model.zero_grad()
    loss = forward(model)
    logits(model.get_base_model())
    with torch.no_grad():
        model.run_branches(
            {**collate(make_rows()), "fused_lm_head": True}, Rows.of(collate(make_rows())), torch.ones(K, 4), [1]
        )
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.trainable_parameters() if parameter.grad is not None]
    model.zero_grad()
    forward(model).backward()
    calm = [parameter.grad for parameter in model.trainable_parameters() if parameter.grad is not None]
    assert len(found) == len(calm) == K * 28
    assert all(map(torch.equal, found, calm))
    assert_equal(gradients(model), expected, 0.0)


def test_two_passes_in_one_backward(model):
    """Passes of the same branches and rows: under checkpointing the layers run again alike for both."""
    forward(model).backward()
    expected = {n: 3 * p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (forward(model) + 2 * forward(model)).backward()
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    assert_nothing_left(model)


def test_two_passes_of_other_branches_in_one_backward(model):
    inputs = {**collate(make_rows()), "fused_lm_head": True, "use_cache": False}
    weights = torch.ones(K, 4, dtype=torch.float64)
    both = forward(model) - model.run_branches(inputs, Rows.of(inputs), weights, [1]).log_probs.sum()
    if not model.competing.checkpointing:
        both.backward()
        return
    with pytest.raises(RuntimeError, match="call backward\\(\\) after each forward"):
        both.backward()
    assert_nothing_left(model)


@pytest.mark.parametrize("everywhere", [False, True], ids=["own hook", "global hook"])
def test_a_hook_keeps_the_frozen_output(everywhere, path):
    """The branches' delta is added to another tensor, also where the layers run as a group."""
    model = make_comlora(CompetitionSettings(k=K), lora={"target_modules": "all-linear"})
    attention, seen = model.get_base_model().model.layers[0].self_attn, []
    bases = [getattr(attention, name).base_layer for name in ("q_proj", "k_proj", "v_proj", "o_proj")]

    def keep(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in bases:
            seen.append((layer, args[0].detach().clone(), output))

    if everywhere:
        hooks = [nn.modules.module.register_module_forward_hook(keep)]
    else:
        hooks = [base.register_forward_hook(keep) for base in bases]
    try:
        forward(model).backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert {id(layer) for layer, _, _ in seen} == {id(base) for base in bases}
    for layer, x, output in seen:
        assert torch.equal(output, nn.functional.linear(x, layer.weight, layer.bias))


def test_every_kind_of_hook_on_a_frozen_layer_is_called(path):
    """Also one for all modules, and a forward put in place of the layer's own, as accelerate's offloading does."""
    model = make_comlora(CompetitionSettings(k=K), lora={"target_modules": "all-linear"})
    attention, expected, called = model.get_base_model().model.layers[1].self_attn, gradients(model), set()
    q, k, v, o = (getattr(attention, name).base_layer for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    q.register_full_backward_pre_hook(lambda *_: called.add("before its backward"))
    k.register_full_backward_hook(lambda *_: called.add("after its backward"))
    own = v.forward
    v.forward = lambda x: called.add("another forward") or own(x)
    everyones = nn.modules.module.register_module_forward_pre_hook(
        lambda layer, _: called.add("everyone's") if layer is o else None
    )
    try:
        assert_equal(gradients(model), expected)
    finally:
        everyones.remove()
    assert called == {"before its backward", "after its backward", "another forward", "everyone's"}


def test_what_trains_stays_so_when_another_adapter_is_chosen(model):
    """LoRA-FA freezes every A."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    model.set_adapter("branch_1")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" in name}
    assert len(trained) == K * 14 and all("lora_B" in name for name in trained)
    forward(model).backward()
    forward(model, 1).backward()


# ---- PyTorch's private seams ----


def test_the_seam_at_the_end_of_backward():
    """`queue_callback` of autograd's engine: a function is called when the whole backward is over, and once."""
    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    first = x * 2
    first.register_hook(lambda _: order.append("first"))
    last = first * 3
    last.register_hook(lambda _: at_the_end_of_backward(lambda: order.append("end")))
    last.sum().backward()
    assert order == ["first", "end"], "PyTorch has moved torch.autograd.Variable._execution_engine.queue_callback"


def test_the_seam_that_tells_a_running_backward():
    found: list[int] = []
    for _ in range(2):
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda _: found.append(running_backward()))
        x.sum().backward()
    assert running_backward() == -1 and -1 not in found, "PyTorch has moved torch._C._current_graph_task_id"
    assert found[0] != found[1]

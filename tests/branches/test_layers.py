"""The K-branch forward of the layers: what runs together, what runs alone, and what is not done twice."""

from collections.abc import Iterator

import pytest
import torch
from conftest import collate, make_lora, make_model, make_rows
from peft.tuners.lora import LoraLayer
from plain_loop import assert_equal, make_comlora, make_noise, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from comlora_trl.branches.layers import LayerGroup
from comlora_trl.branches.passes import Pass
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.model import ComLoRAModel

K = 2


@pytest.fixture
def model() -> ComLoRAModel:
    return make_comlora(CompetitionSettings(k=K), lora={"target_modules": "all-linear"})


def groups(model: ComLoRAModel) -> list[set[str]]:
    names = {layer: name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return [{names[layer] for layer in group.layers} for group in model.competing.groups]


def attention(model: ComLoRAModel) -> nn.Module:
    return model.get_base_model().model.layers[0].self_attn


def gradients(model: ComLoRAModel, chunk: int | None = None) -> dict[str, Tensor]:
    return step(model, collate(make_rows()), make_noise(make_rows(), K), chunk=chunk)[1]


def run_over(model: ComLoRAModel, names: tuple[str, ...]) -> None:
    """Begins a pass whose batch is wide already."""
    model.competing.begin(Pass(model.competing, names, 1, 0))


# ---- Layers that read the same input ----


def test_layers_that_read_the_same_input_form_a_group(model):
    alike = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert groups(model) == alike * 2


def test_a_sibling_of_another_rank_stays_alone():
    model = make_comlora(CompetitionSettings(k=K), lora={"rank_pattern": {"k_proj": 2}})
    assert groups(model)[:2] == [{"q_proj", "v_proj"}, {"k_proj"}]


@pytest.mark.parametrize("odd", ["q_proj", "k_proj", "v_proj"])
def test_a_sibling_with_another_input_is_right_and_alone_from_the_next_pass_on(model, odd):
    names, block = tuple(model.branch_names), attention(model)
    before = groups(model)
    for _ in range(2):
        x, y = torch.randn(2, K * 3, 5, 32, dtype=torch.float64)
        run_over(model, names)
        for child in ("q_proj", "k_proj", "v_proj"):
            layer, given = getattr(block, child), y if child == odd else x
            torch.testing.assert_close(layer(given), layer.forward_one_by_one(given, names), rtol=0, atol=1e-12)
    assert groups(model) == [{"q_proj"}, {"k_proj"}, {"v_proj"}, *before[1:]]


def test_outputs_that_nobody_asked_for_are_forgotten(model):
    names, block = tuple(model.branch_names), attention(model)
    x = torch.randn(K * 3, 5, 32, dtype=torch.float64)
    run_over(model, names)
    stale = block.q_proj(x), block.k_proj(x)
    with torch.no_grad():
        x.mul_(2)  # the same tensor, other values, v not asked for yet
    run_over(model, names)
    torch.testing.assert_close(block.v_proj(x), block.v_proj.forward_one_by_one(x, names), rtol=0, atol=1e-12)
    assert not torch.allclose(stale[1], block.k_proj.forward_one_by_one(x, names))


def test_a_layer_called_twice_in_a_pass_is_right(model):
    names, block = tuple(model.branch_names), attention(model)
    x = torch.randn(K * 3, 5, 32, dtype=torch.float64)
    run_over(model, names)
    first, second = block.q_proj(x), block.q_proj(x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(block.k_proj(x), block.k_proj.forward_one_by_one(x, names), rtol=0, atol=1e-12)


# ---- The way without batched products ----


@pytest.mark.parametrize("chunk", [None, 1])
def test_weights_that_are_not_at_hand_run_branch_by_branch_to_the_same_numbers(model, chunk, monkeypatch, float64):
    expected = gradients(model, chunk)
    monkeypatch.setattr(LayerGroup, "masters", lambda group, name: None)
    calls = []
    batched = LayerGroup.output
    monkeypatch.setattr(LayerGroup, "output", lambda *given: calls.append(given) or batched(*given))
    assert_equal(gradients(model, chunk), expected)
    assert not calls


class _Wrapper(nn.Linear):
    """Stands for the module that FSDP puts in another's place."""


@pytest.mark.parametrize("before_a_pass", [True, False])
@pytest.mark.parametrize("how", ["wrapped", "sharded", "gathered elsewhere"])
def test_what_a_wrapper_does_to_a_weight_is_seen(model, how, before_a_pass):
    group = model.competing.groups[0]
    if not before_a_pass:
        assert group.masters("branch_1")
    module = group.layers[1].lora_B["branch_1"]
    if how == "wrapped":
        wrapper = _Wrapper(4, 16, bias=False)
        group.layers[1].lora_B["branch_1"] = wrapper
        del module.weight  # flattened into the wrapper's own
    elif how == "sharded":
        module.weight = nn.Parameter(module.weight.detach().flatten()[:7])
    else:
        value = module.weight.detach()
        del module.weight
        module.weight = value  # a plain tensor for the time of a forward
    assert group.masters("branch_1") is None and group.masters("branch_0")


# ---- Not done twice ----


class _Products(TorchDispatchMode):
    """Counts products with a frozen weight of a given shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.out and tuple(args[1].shape) == self.shape
        return function(*args, **kwargs or {})


def test_checkpointing_does_not_repeat_the_last_product_of_a_layer(model):
    counts = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        products = [_Products(shape) for shape in ((64, 32), (32, 64))]  # down; gate and up
        for product in products:
            with product:
                gradients(model)
        counts.append([product.count for product in products])
    assert counts == [[2, 4], [2, 8]]


def test_masks_and_positions_are_expanded_once_a_pass(model):
    seen: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["attention_mask"], kwargs["position_embeddings"])),
            with_kwargs=True,
        )
    gradients(model)
    gradients(model)
    first, second, third, _ = seen
    assert first[0] is second[0] and first[1] is second[1]
    assert first[0] is not third[0] and first[0].size(0) == K * 4


# ---- Lookups that the trainer makes at every step ----


def test_trainable_parameters_are_those_that_require_gradients(model):
    found = {id(parameter) for parameter in model.trainable_parameters()}
    assert found == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(model.trainable_parameters()) == len(found)


def test_replaced_parameters_are_found_again(model):
    model.branch_parameters(0)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for adapters in (layer.lora_A, layer.lora_B):
                adapters["branch_0"].weight = nn.Parameter(adapters["branch_0"].weight.detach().clone())
    found = {id(parameter) for parameter in model.branch_parameters(0)}
    assert found == {id(parameter) for name, parameter in model.named_parameters() if ".branch_0." in name}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(model, set_to_none):
    assert any(gradient.any() for gradient in gradients(model).values())
    model.zero_grad(set_to_none=set_to_none)
    left = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert not any(gradient.any() for gradient in left) and bool(left) is not set_to_none


def test_modes_are_set_when_they_change(model):
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    model.get_base_model().eval()  # a part by itself
    model.eval().train()
    assert all(module.training for module in model.modules())


# ---- torch.compile ----


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_decoder_layers_compile_whole_and_once(fresh_compiler, dropout, checkpointing):
    """No graph breaks (fullgraph), two graphs in all (the first layer's input has no gradient), two for the hook
    before it; the same gradients. The layers are more than share a stack of weights."""
    model = make_comlora(CompetitionSettings(k=K), lora={"lora_dropout": dropout}, num_hidden_layers=10)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    found = [gradients(model) for _ in range(3)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    for one, other in zip([expected, *found], found, strict=False):
        if dropout:  # other masks each time
            assert any(not torch.equal(one[name], other[name]) for name in one)
        else:
            assert_equal(other, expected, 1e-12)


def test_the_default_recipe_is_what_these_tests_run():
    """q, k, v run as one also with the targets of `scripts/sft.py`."""
    model = ComLoRAModel(make_model(), make_lora(), K)
    assert groups(model) == [{"q_proj", "k_proj", "v_proj"}, {"up_proj"}, {"down_proj"}] * 2

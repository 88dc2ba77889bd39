"""Layers that read the same input compute together what each computes alone."""

import pytest
import torch
from kernel_cases import TOLERANCE, assert_close, drawn_masks, literal, make_case
from torch import Tensor

from comlora_trl.branches.kernels import branch_linears, stack_branches

# k, output widths of the layers, r
LAYERS = [(3, (96, 40, 40), 8), (2, (33, 70), 3), (3, (20, 12, 16), 32), (1, (24,), 5)]


def shared_case(k: int, widths: tuple[int, ...], r: int, dtype: torch.dtype) -> list[dict]:
    """One case a layer, all with the same x."""
    cases = [make_case((k, 3, 5, 48, width, r), dtype, seed) for seed, width in enumerate(widths)]
    return [case | {"x": cases[0]["x"]} for case in cases]


def shared_input_layers(cases: list[dict], dropout: float, used: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of x, of every layer's A_k and of every layer's B_k."""
    k, dtype = len(cases[0]["a"]), cases[0]["x"].dtype
    x = cases[0]["x"].detach().requires_grad_()
    masters = [[[case[name][branch] for case in cases] for branch in range(k)] for name in ("a", "b")]
    [weights] = stack_branches([masters[0]], [masters[1]], 1.7, dtype)
    frozen, biases = [case["weight"] for case in cases], [case["bias"] for case in cases]
    outputs = branch_linears(x, frozen, biases, weights.a, weights.b, dropout)
    wanted = [(output, case["grad"]) for output, case, use in zip(outputs, cases, used, strict=True) if use]
    leaves = [x, *(p for case in cases for p in (*case["a"], *case["b"]))]
    ends, grads = zip(*wanted, strict=True)
    return list(outputs), list(torch.autograd.grad(ends, leaves, grads, materialize_grads=True))


def literal_layers(
    cases: list[dict], masks: list[Tensor | None], used: list[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same, layer by layer and branch by branch in float64."""
    dx, outputs, gradients = torch.zeros_like(cases[0]["x"], dtype=torch.float64), [], []
    for case, mask, use in zip(cases, masks, used, strict=True):
        output, layer_dx, *rest = literal(case, 1.7, mask)
        outputs.append(output)
        dx = dx + layer_dx * use
        gradients += [gradient * use for gradient in rest]
    return outputs, [dx, *gradients]


@pytest.mark.parametrize("unused", [None, 0, 1], ids=["all_used", "first_unused", "second_unused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "widths", "r"), LAYERS, ids=str)
def test_layers_that_share_their_input(
    path: str, k: int, widths: tuple, r: int, dtype: torch.dtype, unused: int | None
) -> None:
    cases, used = shared_case(k, widths, r, dtype), [index != unused for index in range(len(widths))]
    if not any(used):
        pytest.skip("no layer would be used")
    found, expected = shared_input_layers(cases, 0.0, used), literal_layers(cases, [None] * len(cases), used)
    for ours_, theirs in zip(found, expected, strict=True):
        assert_close(ours_, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "widths", "r"), LAYERS[:3], ids=str)
def test_each_layer_drops_with_a_mask_of_its_own(path: str, k: int, widths: tuple, r: int, dtype: torch.dtype) -> None:
    cases, used = shared_case(k, widths, r, dtype), [True] * len(widths)
    torch.manual_seed(3)
    found = shared_input_layers(cases, 0.3, used)
    torch.manual_seed(3)
    masks = drawn_masks(cases[0]["x"], dtype, 0.3, len(widths))
    for index, mask in enumerate(masks):
        assert 0.6 < (mask != 0).double().mean() < 0.8
        assert all(0.5 < ((mask != 0) == (other != 0)).double().mean() < 0.66 for other in masks[:index])
    for ours_, theirs in zip(found, literal_layers(cases, masks, used), strict=True):
        assert_close(ours_, theirs, TOLERANCE[dtype])

"""The K-branch linear product as custom operators, so that a compiled decoder layer has no graph break.

`comlora::branch_linears` and its backward run the same products as [`branch_linears`] without dropout. For the
compiler they are two opaque calls with known shapes, and it fuses the operations around them.

The compiler does not see the branches' weights or K. The operators look the weights up by a number ([`keep_weights`])
in fixed memory, and the backward writes the gradients there. The reason is that compilation takes several times as
long if the sizes of the weights are symbols.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.kernels import torch_path
from comlora_trl.branches.kernels.branches import _as, _parts, _rank_gradients, _write


@dataclass(eq=False)
class KeptWeights:
    """Weights of K branches on n layers that read the same input, and memory for their gradients.

    Attributes:
        a, grad_a: A times lora_alpha / r, and its gradient, [K, n·r, d].
        b, grad_b: B and its gradient, n of [K, l_i, r].
        number: the number by which an operator finds the weights, int64 [] on the CPU.
    """

    a: Tensor
    b: list[Tensor]
    grad_a: Tensor
    grad_b: list[Tensor]
    number: Tensor | None = None


_KEPT: "weakref.WeakValueDictionary[int, KeptWeights]" = weakref.WeakValueDictionary()
_LAST = [0]


def keep_weights(weights: KeptWeights) -> KeptWeights:
    """Registers weights under a new number and returns them. The registry does not keep the weights alive."""
    _LAST[0] += 1
    weights.number = torch.tensor(_LAST[0])
    _KEPT[_LAST[0]] = weights
    return weights


def traceable_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    number: Tensor,
    ranks: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """[`branch_linears`] for a compiled layer, without dropout.

    Args:
        x: the layers' common input, [K·B, ..., d], branch-major.
        weights: the frozen weights, n of [l_i, d].
        biases: the frozen biases, n of [l_i] or None.
        number: the number of the branches' weights, see [`keep_weights`].
        ranks: n·r.
        dtype: dtype of the products and the outputs.

    Returns:
        n outputs, [K·B, ..., l_i]. Their backward writes the gradients of the branches' weights into [`KeptWeights`].
    """
    if x.dtype != dtype:
        x = x.to(dtype)
    given = [bias is not None for bias in biases]
    own = [bias for bias in biases if bias is not None]
    return _branch_linears(x, list(weights), own, given, number, ranks)[:-1]


@torch.library.custom_op("comlora::branch_linears", mutates_args=())
def _branch_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], given: list[bool], number: Tensor, ranks: int
) -> list[Tensor]:
    """The n outputs, and x Aᵀ, [K·M, n·r], as the last item."""
    kept = _KEPT[int(number)]
    flat = x.reshape(-1, x.size(-1))
    xa = torch_path.project_down(flat, kept.a, None)
    left = iter(biases)
    outputs = []
    for weight, has_bias, part, b in zip(weights, given, _parts(xa, kept.b), kept.b, strict=True):
        output = x.new_empty(*x.shape[:-1], weight.size(0))
        bias = next(left) if has_bias else None
        _write(torch_path, output.view(-1, output.size(-1)), flat, weight, bias, part, b)
        outputs.append(output)
    return [*outputs, xa.view(-1, ranks)]


@_branch_linears.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], given: list[bool], number: Tensor, ranks: int
) -> list[Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return [*(x.new_empty(*x.shape[:-1], weight.size(0)) for weight in weights), x.new_empty(rows, ranks)]


@torch.library.custom_op("comlora::branch_linears_backward", mutates_args=())
def _branch_linears_backward(
    grads: list[Tensor], x: Tensor, xa: Tensor, weights: list[Tensor], number: Tensor
) -> Tensor:
    """Returns dx, and writes dA and dB into the memory of the weights' gradients."""
    kept = _KEPT[int(number)]
    k = kept.a.size(0)
    rows, xa = x.reshape(k, -1, x.size(-1)), xa.view(k, -1, xa.size(-1))
    flat = [grad.reshape(-1, grad.size(-1)) for grad in grads]
    ds, db = _rank_gradients(torch_path, flat, xa, kept.b)
    for target, found in zip(kept.grad_b, db, strict=True):
        target.copy_(found)
    torch.bmm(ds.mT, rows, out=kept.grad_a)
    dx = torch_path.project_back(ds, kept.a, rows, None).view(-1, x.size(-1))
    for grad, weight in zip(flat, weights, strict=True):
        dx.addmm_(grad, _as(weight, dx))
    return dx.view(x.shape)


@_branch_linears_backward.register_fake
def _(grads: list[Tensor], x: Tensor, xa: Tensor, weights: list[Tensor], number: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, _, number, _ = inputs
    ctx.n, ctx.biases = len(weights), len(biases)
    ctx.save_for_backward(x, output[-1], number, *weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, xa, number, *weights = ctx.saved_tensors
    given = [
        x.new_zeros(*x.shape[:-1], weight.size(0)) if grad is None else grad
        for grad, weight in zip(grads[:-1], weights, strict=True)
    ]
    dx = _branch_linears_backward(given, x, xa, weights, number)
    return dx, [None] * ctx.n, [None] * ctx.biases, None, None, None


_branch_linears.register_autograd(_backward, setup_context=_save)

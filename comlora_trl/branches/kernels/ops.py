"""The K-branch linear product as custom operators, so that a compiled decoder layer has no graph break.

`comlora::branch_linears` and its backward run the same products as [`branch_linears`] without dropout: the compiler
sees two opaque calls with known shapes and fuses everything around them. K does not appear as a dimension of its own
(weights come as [K·n·r, d] and [K·l, r]), so a compiler that treats sizes as symbols has one graph for any K.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.kernels import torch_path
from comlora_trl.branches.kernels.branches import _as, _parts, _rank_gradients, _write


def traceable_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], a: Tensor, b: Sequence[Tensor]
) -> list[Tensor]:
    """[`branch_linears`] for a compiler.

    Args:
        x: the layers' common input, [K·B, ..., d], branch-major.
        weights: the frozen weights, n of [l_i, d].
        biases: the frozen biases, n of [l_i] or None.
        a: A of all branches and layers times lora_alpha / r, [K·n·r, d], in the type to compute in.
        b: B of all branches, n of [K·l_i, r].

    Returns:
        n outputs, [K·B, ..., l_i].
    """
    if x.dtype != a.dtype:
        x = x.to(a.dtype)
    given = [bias is not None for bias in biases]
    return _branch_linears(x, list(weights), [bias for bias in biases if bias is not None], given, a, list(b))[:-1]


@torch.library.custom_op("comlora::branch_linears", mutates_args=())
def _branch_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], given: list[bool], a: Tensor, b: list[Tensor]
) -> list[Tensor]:
    """The n outputs and, last, x Aᵀ, [K·M, n·r]."""
    a, b = _by_branch(a, b)
    flat = x.reshape(-1, x.size(-1))
    xa = torch_path.project_down(flat, a, None)
    left = iter(biases)
    outputs = []
    for weight, has_bias, part, b_i in zip(weights, given, _parts(xa, b), b, strict=True):
        output = x.new_empty(*x.shape[:-1], weight.size(0))
        bias = next(left) if has_bias else None
        _write(torch_path, output.view(-1, output.size(-1)), flat, weight, bias, part, b_i)
        outputs.append(output)
    return [*outputs, xa.view(-1, a.size(1))]


@_branch_linears.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], given: list[bool], a: Tensor, b: list[Tensor]
) -> list[Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    outputs = [x.new_empty(*x.shape[:-1], weight.size(0)) for weight in weights]
    return [*outputs, x.new_empty(rows, len(b) * b[0].size(1))]


@torch.library.custom_op("comlora::branch_linears_backward", mutates_args=())
def _branch_linears_backward(
    grads: list[Tensor], x: Tensor, xa: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor], needs_dx: bool
) -> list[Tensor]:
    """dA, [K·n·r, d], the n dB, [K·l_i, r], and dx if it is needed."""
    a, b = _by_branch(a, b)
    rows, xa = x.reshape(a.size(0), -1, x.size(-1)), xa.view(a.size(0), -1, xa.size(-1))
    flat = [grad.reshape(-1, grad.size(-1)) for grad in grads]
    ds, db = _rank_gradients(torch_path, flat, xa, b)
    da = torch_path.a_gradient(ds, rows, None)
    found = [da.view(-1, da.size(-1)), *(one.reshape(-1, one.size(-1)) for one in db)]
    if needs_dx:
        dx = torch_path.project_back(ds, a, rows, None).view(-1, x.size(-1))
        for grad, weight in zip(flat, weights, strict=True):
            dx.addmm_(grad, _as(weight, dx))
        found.append(dx.view(x.shape))
    return found


@_branch_linears_backward.register_fake
def _(
    grads: list[Tensor], x: Tensor, xa: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor], needs_dx: bool
) -> list[Tensor]:
    found = [torch.empty_like(a), *(torch.empty_like(b_i) for b_i in b)]
    return [*found, x.new_empty(x.shape)] if needs_dx else found


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, _, a, b = inputs
    ctx.n, ctx.biases = len(b), len(biases)
    ctx.save_for_backward(x, output[-1], a, *weights, *b)
    ctx.needs_dx = x.requires_grad
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, xa, a, *rest = ctx.saved_tensors
    weights, b = rest[: ctx.n], rest[ctx.n :]
    given = [
        x.new_zeros(*x.shape[:-1], weight.size(0)) if grad is None else grad
        for grad, weight in zip(grads[:-1], weights, strict=True)
    ]
    found = _branch_linears_backward(given, x, xa, weights, a, b, ctx.needs_dx)
    dx = found[1 + ctx.n] if ctx.needs_dx else None
    return dx, [None] * ctx.n, [None] * ctx.biases, None, found[0], found[1 : 1 + ctx.n]


_branch_linears.register_autograd(_backward, setup_context=_save)


def _by_branch(a: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A as [K, n·r, d] and each B as [K, l_i, r]."""
    rank = b[0].size(1)
    k = a.size(0) // (len(b) * rank)
    return a.view(k, -1, a.size(1)), [b_i.view(k, -1, rank) for b_i in b]

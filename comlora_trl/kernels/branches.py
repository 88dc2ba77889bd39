"""The LoRA deltas of K branches as autograd functions, with the frozen product inside or outside.

Rows come branch-major: the first M rows belong to branch 0, the next M to branch 1, and so on. Equal shares need no
routing: the activations are viewed as (K, M, features). What is saved for the backward pass is x itself (one
reference, no copy) and x Aᵀ, which is r wide.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from comlora_trl.kernels.selection import products


def branch_linear(
    x: Tensor,
    base_output: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """base_output + scaling · dropout(x) A_kᵀ B_kᵀ, each branch on its own rows.

    Args:
        x: the layer's input, [K·B, ..., d], branch-major.
        base_output: the frozen layer's output on x, [K·B, ..., l]; the result may be written into it.
        lora_a: K matrices [r, d], master weights.
        lora_b: K matrices [l, r], master weights.
        scaling: lora_alpha / r.
        dropout: probability of dropping an input element on the way into the branches.

    Returns:
        [K·B, ..., l], in base_output's dtype, in which all products are computed.
    """
    return _BranchDelta.apply(x, base_output, scaling, dropout, *lora_a, *lora_b)


def branch_linear_fused_base(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """[`branch_linear`] with the frozen product inside: x Wᵀ + bias + deltas, and one accumulation into dx.

    Args:
        weight: the frozen layer's weight, [l, d].
        bias: its bias, [l], or None.
    """
    return _BranchLinear.apply(x, weight, bias, scaling, dropout, *lora_a, *lora_b)


class _BranchDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base_output: Tensor, scaling: float, dropout: float, *ab: Tensor) -> Tensor:
        with _WithoutAutocast(x.device.type):
            out = base_output if _may_overwrite(base_output) else base_output.clone()
            if out is base_output:
                ctx.mark_dirty(base_output)
            return _add_deltas(ctx, x, out, scaling, dropout, ab)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _WithoutAutocast(grad.device.type):
            dx, gradients = _gradients(ctx, grad, None)
        return dx, grad, None, None, *gradients


class _BranchLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, dropout: float, *ab: Tensor
    ) -> Tensor:
        out = F.linear(x, weight, bias)  # under autocast in its dtype, as the layer alone would
        ctx.weight = weight
        with _WithoutAutocast(x.device.type):
            return _add_deltas(ctx, x, out, scaling, dropout, ab)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with _WithoutAutocast(grad.device.type):
            dx, gradients = _gradients(ctx, grad, ctx.weight)
        return dx, None, None, None, None, *gradients


def _add_deltas(ctx: Any, x: Tensor, out: Tensor, scaling: float, dropout: float, ab: tuple[Tensor, ...]) -> Tensor:
    """Adds the deltas to `out`, and keeps on ctx what the backward pass needs."""
    k, dtype = len(ab) // 2, out.dtype
    # one stack and one cast for all branches, whatever K
    a, b = torch.stack(ab[:k]).to(dtype), torch.stack(ab[k:]).to(dtype)
    ctx.products = products(x, dtype, a.size(1))
    ctx.noise = ctx.products.draw_noise(x, dropout) if dropout else None
    xa = ctx.products.project_down(x, a, ctx.noise)
    ctx.products.add_delta(out.view(k, -1, out.size(-1)), xa, b, scaling)
    ctx.save_for_backward(x, xa, a, b)
    ctx.scaling, ctx.dtype = scaling, ab[0].dtype
    return out


def _gradients(ctx: Any, grad: Tensor, weight: Tensor | None) -> tuple[Tensor | None, list[Tensor]]:
    """dx (of the frozen product too, if its weight is given), and the gradients of A and B as views of two stacks."""
    x, xa, a, b = ctx.saved_tensors
    grads = grad.to(xa.dtype).reshape(a.size(0), -1, grad.size(-1))
    ds, db = ctx.products.rank_gradients(grads, b, xa, ctx.scaling)
    da = ctx.products.a_gradient(ds, x, ctx.noise)
    dx = None
    if ctx.needs_input_grad[0]:
        # The branches' share first: the large product then adds to it in its epilogue, which hides the reading
        dx = ctx.products.project_back(ds, a, x, ctx.noise)
        if weight is not None:
            dx.view(-1, dx.size(-1)).addmm_(grads.view(-1, grads.size(-1)), weight.to(dx.dtype))
        dx = dx.view(x.shape).to(x.dtype)
    return dx, [*da.to(ctx.dtype).unbind(), *db.to(ctx.dtype).unbind()]


class _WithoutAutocast:
    """`torch.autocast(enabled=False)` at a tenth of its cost, which counts with hundreds of layers a step."""

    __slots__ = ("device", "before")

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before = torch.is_autocast_enabled(self.device)
        if self.before:
            torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *error: object) -> None:
        if self.before:
            torch.set_autocast_enabled(self.device, True)


def _may_overwrite(output: Tensor) -> bool:
    return output.is_contiguous() and output._base is None and not (output.is_leaf and output.requires_grad)

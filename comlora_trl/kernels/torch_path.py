"""The LoRA products of K branches as batched matrix products (torch.bmm), forward and backward.

Rows come branch-major: the first M rows belong to branch 0, the next M to branch 1, and so on. Equal shares need no
routing: the activations are viewed as (K, M, features). The deltas are added into the base output in place; what is
saved for the backward pass is x itself (one reference, no copy) and x Aᵀ, which is r wide.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
        with torch.autocast(x.device.type, enabled=False):
            out = base_output if _may_overwrite(base_output) else base_output.clone()
            if out is base_output:
                ctx.mark_dirty(base_output)
            return _add_deltas(ctx, x, out, scaling, dropout, ab)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            dx, gradients = _delta_gradients(ctx, grad, None)
        return dx, grad, None, None, *gradients


class _BranchLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, dropout: float, *ab: Tensor
    ) -> Tensor:
        out = F.linear(x, weight, bias)  # under autocast in its dtype, as the layer alone would
        ctx.weight = weight
        with torch.autocast(x.device.type, enabled=False):
            return _add_deltas(ctx, x, out, scaling, dropout, ab)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            base = grad @ ctx.weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
            dx, gradients = _delta_gradients(ctx, grad, base)
        return dx, None, None, None, None, *gradients


def _add_deltas(ctx: Any, x: Tensor, out: Tensor, scaling: float, dropout: float, ab: tuple[Tensor, ...]) -> Tensor:
    k = len(ab) // 2
    # one stack and one cast for all branches, whatever K
    a, b = torch.stack(ab[:k]).to(out.dtype), torch.stack(ab[k:]).to(out.dtype)
    ctx.random_state = _random_state(x) if dropout else None
    rows = _dropped(x, dropout).to(out.dtype).reshape(k, -1, x.size(-1))
    xa = torch.bmm(rows, a.mT)
    out.view(k, -1, out.size(-1)).baddbmm_(xa, b.mT, alpha=scaling)
    ctx.save_for_backward(x, xa, a, b)
    ctx.scaling, ctx.dropout, ctx.dtype = scaling, dropout, ab[0].dtype
    return out


def _delta_gradients(ctx: Any, grad: Tensor, dx: Tensor | None) -> tuple[Tensor | None, list[Tensor]]:
    """dx of the deltas (added into `dx` if given), and the gradients of A and B as views of two stacks."""
    x, xa, a, b = ctx.saved_tensors
    k = a.size(0)
    grads = grad.to(xa.dtype).reshape(k, -1, grad.size(-1))
    ds = torch.bmm(grads, b).mul_(ctx.scaling)
    db = torch.bmm(grads.mT, xa).mul_(ctx.scaling)
    mask = _dropout_mask(x, ctx.dropout, ctx.random_state) if ctx.dropout else None
    rows = (x if mask is None else x * mask).to(xa.dtype).reshape(k, -1, x.size(-1))
    da = torch.bmm(ds.mT, rows)
    if ctx.needs_input_grad[0]:
        if mask is not None:
            through = torch.bmm(ds, a).view_as(x) * mask
            dx = through if dx is None else dx.add_(through)
        elif dx is None:
            dx = torch.bmm(ds, a).view_as(x)
        else:
            dx.view(k, -1, dx.size(-1)).baddbmm_(ds, a)
        dx = dx.to(x.dtype)
    return dx, [*da.to(ctx.dtype).unbind(), *db.to(ctx.dtype).unbind()]


def _may_overwrite(output: Tensor) -> bool:
    return output.is_contiguous() and output._base is None and not (output.is_leaf and output.requires_grad)


def _dropped(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def _random_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()


def _dropout_mask(x: Tensor, p: float, state: Tensor) -> Tensor:
    """The forward's mask (0 or 1/(1−p)), drawn again from the random state that the forward began with."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        if x.is_cuda:
            torch.cuda.set_rng_state(state, x.device)
        else:
            torch.set_rng_state(state)
        return F.dropout(torch.ones_like(x), p)

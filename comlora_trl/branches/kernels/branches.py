"""LoRA products of K branches on linear layers that read one input, as one autograd function.

Rows come branch-major: the first M rows belong to branch 0, the next M to branch 1, and so on. Equal shares need no
routing: the activations are viewed as (K, M, features). Layers that read the same input (q, k and v; gate and up)
share one product with all their A, one saved input and one gradient for it, into which every product accumulates.
What is saved for the backward pass is x itself (one reference, no copy) and x Aᵀ, which is r wide.

[`selected_kernels`] says which thin products run where, [`stack_branches`] makes the weights they take.
"""

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional

from comlora_trl import compat
from comlora_trl.branches.kernels import torch_path

VARIABLE = "COMLORA_KERNELS"
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def selected_kernels(device: torch.device | str, dropout: float) -> str:
    """Which kernels compute the thin products on `device`, "torch" or "triton".

    Triton's pay where dropout has to be drawn, on CUDA; without dropout cuBLAS is as fast and launched in less time
    (README.md beside this file). `COMLORA_KERNELS=torch` or `triton` forces one (Triton's interpreter,
    `TRITON_INTERPRET=1`, runs on the CPU).

    Raises:
        ValueError: if `COMLORA_KERNELS` names no kernels that exist, or kernels that can't run here.
    """
    device = device if isinstance(device, torch.device) else torch.device(device)
    forced, interpreted = os.environ.get(VARIABLE, ""), os.environ.get("TRITON_INTERPRET") == "1"
    return _select(device.type, dropout > 0, forced, interpreted)


@lru_cache
def _select(device: str, dropout: bool, forced: str, interpreted: bool) -> str:
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"{VARIABLE}={forced} is not possible: it must be torch or triton (leave it out to choose).")
    if forced == "triton" and not (_TRITON_INSTALLED and (device == "cuda" or interpreted)):
        reason = "Triton is not installed" if not _TRITON_INSTALLED else f"the tensors are on {device}"
        raise ValueError(
            f"{VARIABLE}=triton is not possible, {reason}: install triton and train on CUDA, or leave {VARIABLE} out."
        )
    return forced or ("triton" if dropout and _TRITON_INSTALLED and device == "cuda" else "torch")


def products(x: Tensor, a: Tensor, dropout: float) -> ModuleType:
    """The module whose thin products serve x, computing in the type of A, [K, n·r, d].

    Triton's kernels have no float64 and no ranks above 128 (of all layers together), which would not fit their tiles,
    and need a row at least: the PyTorch path serves those.
    """
    if torch.float64 in (a.dtype, x.dtype) or a.size(1) > 128 or x.numel() == 0:
        return torch_path
    if selected_kernels(x.device, dropout) == "torch":
        return torch_path
    from comlora_trl.branches.kernels import triton_path

    return triton_path


class BranchWeights(NamedTuple):
    """The weights of K branches on n layers that read the same input.

    Attributes:
        a: A times lora_alpha / r, [K, n·r, d].
        b: B, n of [K, l_i, r].
    """

    a: Tensor
    b: tuple[Tensor, ...]


# Master weights of a group of layers: [K][n] matrices
Masters = Sequence[Sequence[Tensor]]


def stack_branches(
    lora_a: Sequence[Masters], lora_b: Sequence[Masters], scaling: float, dtype: torch.dtype
) -> list[BranchWeights]:
    """Stacks and casts the weights of G groups of layers that are alike, in a few launches whatever G and K are.

    Differentiable: the masters get their gradients from one cast and views of it, too.

    Args:
        lora_a: [G][K][n] matrices [r, d].
        lora_b: [G][K][n] matrices [l_i, r]; l_i may differ within a group, not between groups.
        scaling: lora_alpha / r, multiplied into A.
        dtype: to compute in.

    Returns:
        G weights.
    """
    groups, branches, layers = len(lora_a), len(lora_a[0]), len(lora_a[0][0])
    a = torch.stack([matrix for group in lora_a for branch in group for matrix in branch])
    rank, width = a.shape[1:]
    a = (a if scaling == 1 else a * scaling).to(dtype).view(groups, branches, layers * rank, width)
    b = [
        torch.stack([branch[layer] for group in lora_b for branch in group])
        .to(dtype)
        .view(groups, branches, -1, rank)
        .unbind()
        for layer in range(layers)
    ]
    return [BranchWeights(a_one, tuple(b_one)) for a_one, *b_one in zip(a.unbind(), *b, strict=True)]


def branch_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Tensor,
    b: Sequence[Tensor],
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """x W_iᵀ + bias_i + dropout_i(x) A_kiᵀ B_kiᵀ for n frozen layers i with K branches k, each on its own rows.

    Args:
        x: the layers' common input, [K·B, ..., d], branch-major.
        weights: the frozen weights, n of [l_i, d].
        biases: the frozen biases, n of [l_i] or None.
        a: A of all branches and layers times lora_alpha / r, [K, n·r, d], in the type to compute in.
        b: B of all branches, n of [K, l_i, r].
        dropout: probability of dropping an input element on the way into the branches; each layer draws its own mask.

    Returns:
        n outputs, [K·B, ..., l_i].
    """
    if x.dtype != a.dtype:
        x = x.to(a.dtype)
    kernels = products(x, a, dropout)
    noise = kernels.draw_noise(x, dropout, len(b)) if dropout else None
    # The outputs are filled after the function has saved what it needs: a checkpointed layer's second run stops at its
    # last saved tensor, so that the product of the last layer in it (down) is not computed again
    later: list[tuple[Tensor, ...]] = []
    outputs = _SharedInputLinears.apply(kernels, noise, weights, biases, later, x, a, *b)
    with torch.no_grad():
        for product in later:
            _write(kernels, *product)
    return outputs


def branch_delta(
    x: Tensor, base_output: Tensor, a: Tensor, b: Tensor, dropout: float = 0.0, overwrite: bool = True
) -> Tensor:
    """base_output + dropout(x) A_kᵀ B_kᵀ: [`branch_linears`] of one layer whose frozen product is made elsewhere.

    Args:
        base_output: the frozen layer's output on x, [K·B, ..., l].
        overwrite: whether the result may be written into it, nobody else reading it.
    """
    if is_compiling():
        return _traceable_delta(x, base_output, a, b, dropout)
    return _BranchDelta.apply(x, base_output, a, b, dropout, overwrite)


def _traceable_delta(x: Tensor, base_output: Tensor, a: Tensor, b: Tensor, dropout: float) -> Tensor:
    """[`branch_delta`] for `torch.compile`, in plain operations: the compiler fuses them, decides what to keep for the
    backward pass, and draws dropout's masks from seeds of its own."""
    rows = x.reshape(a.size(0), -1, x.size(-1))
    rows = _as(functional.dropout(rows, dropout) if dropout else rows, a)
    return base_output + torch.bmm(torch.bmm(rows, a.mT), b.mT).view_as(base_output)


class _SharedInputLinears(torch.autograd.Function):
    """Computes x Aᵀ, saves what the backward pass needs and allocates the outputs, which the caller fills."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        noise: Any,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        later: list[tuple[Tensor, ...]],
        x: Tensor,
        a: Tensor,
        *b: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.size(-1))
        rows = flat.view(a.size(0), -1, x.size(-1))
        xa = kernels.project_down(rows, a, noise)
        ctx.save_for_backward(rows, xa, a, *b)
        ctx.kernels, ctx.noise, ctx.weights, ctx.shape = kernels, noise, weights, x.shape
        ctx.set_materialize_grads(False)
        outputs = tuple(x.new_empty(*x.shape[:-1], weight.size(0)) for weight in weights)
        for output, *operands in zip(outputs, weights, biases, _parts(xa, b), b, strict=True):
            later.append((output.view(-1, output.size(-1)), flat, *operands))  # views without a graph
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, xa, a, *b = ctx.saved_tensors
        kernels, noise = ctx.kernels, ctx.noise
        flat = [None if grad is None else grad.reshape(-1, grad.size(-1)) for grad in grads]
        ds, db = _rank_gradients(kernels, flat, xa, b)
        da = kernels.a_gradient(ds, rows, noise)
        dx = None
        if ctx.needs_input_grad[5]:
            # The branches' share first: the large products then add to it in their epilogue, which hides the reading
            dx = kernels.project_back(ds, a, rows, noise).view(-1, rows.size(-1))
            for grad, weight in zip(flat, ctx.weights, strict=True):
                if grad is not None:
                    dx.addmm_(grad, _as(weight, dx))
            dx = dx.view(ctx.shape)
        return None, None, None, None, None, dx, da, *db


class _BranchDelta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base_output: Tensor, a: Tensor, b: Tensor, dropout: float, overwrite: bool
    ) -> Tensor:
        out = base_output if overwrite and _may_overwrite(base_output) else base_output.clone()
        if out is base_output:
            ctx.mark_dirty(base_output)
        ctx.kernels = products(x, a, dropout)
        ctx.noise = ctx.kernels.draw_noise(x, dropout, 1) if dropout else None
        rows = x.reshape(a.size(0), -1, x.size(-1))
        xa = ctx.kernels.project_down(rows, a, ctx.noise)
        ctx.kernels.add_delta(out.view(a.size(0), -1, out.size(-1)), xa, b)
        ctx.save_for_backward(rows, xa, a, b)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, xa, a, b = ctx.saved_tensors
        ds, (db,) = _rank_gradients(ctx.kernels, [_as(grad, a).reshape(-1, grad.size(-1))], xa, [b])
        da, dx = ctx.kernels.a_gradient(ds, rows, ctx.noise), None
        if ctx.needs_input_grad[0]:
            dx = _as(ctx.kernels.project_back(ds, a, rows, ctx.noise), rows).view(ctx.shape)
        return dx, grad, da, db, None, None


def _rank_gradients(
    kernels: ModuleType, grads: list[Tensor | None], xa: Tensor, b: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    """(dS, dB): the gradients of x Aᵀ, [K, M, n·r], and of each layer's B.

    Args:
        grads: the outputs' gradients, n of [K·M, l_i]; None where nobody used the output.
    """
    ds: list[Tensor] = []
    db: list[Tensor | None] = []
    for grad, b_i, xa_i in zip(grads, b, _parts(xa, b), strict=True):
        if grad is None:
            found: tuple[Tensor, Tensor | None] = (torch.zeros_like(xa_i), None)
        else:
            found = kernels.rank_gradients(grad.view(xa.size(0), -1, grad.size(-1)), b_i, xa_i)
        ds.append(found[0])
        db.append(found[1])
    return ds[0] if len(ds) == 1 else torch.cat(ds, dim=-1), db


def _parts(stacked: Tensor, b: Sequence[Tensor]) -> Sequence[Tensor]:
    """The layers' parts of [K, M, n·r]."""
    return (stacked,) if len(b) == 1 else stacked.chunk(len(b), dim=-1)


def _write(
    kernels: ModuleType, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, xa: Tensor, b: Tensor
) -> None:
    """Writes one layer's output, [K·M, l]."""
    transposed = _as(weight, x).t()
    if bias is None:
        torch.mm(x, transposed, out=out)
    else:
        torch.addmm(_as(bias, x), x, transposed, out=out)
    kernels.add_delta(out.view(b.size(0), -1, out.size(-1)), xa, b)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in another's type; asking first is cheaper than a conversion that does nothing."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _may_overwrite(output: Tensor) -> bool:
    return output.is_contiguous() and not compat.is_view(output) and not (output.is_leaf and output.requires_grad)

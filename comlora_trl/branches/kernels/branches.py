"""LoRA products of K branches on linear layers that read one input, as one autograd function.

Rows are branch-major: the first M rows belong to branch 0, the next M to branch 1, and so on. The shares are equal, so
the activations are simply viewed as (K, M, features). Layers that read the same input (q, k and v; gate and up) share
one product with all their A, one saved input, and one gradient of the input, to which every product adds. The backward
pass needs x (a reference, not a copy) and x Aᵀ, whose last dimension is only n·r.

In the text here, n is the number of layers in a group and r the rank. "Thin products" are the products with A and B.
[`selected_kernels`] chooses the code for them, and [`stack_branches`] makes their weights.
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
    """The kernels that compute the thin products on a device: "torch" or "triton".

    Triton is chosen on CUDA if there is dropout. Without dropout, cuBLAS is as fast and takes less time to launch
    (README.md in this folder has measurements). The environment variable `COMLORA_KERNELS` (`torch` or `triton`)
    overrides the choice. With `TRITON_INTERPRET=1` the Triton kernels run on the CPU.

    Args:
        device: the device of the activations.
        dropout: probability of LoRA dropout.

    Raises:
        ValueError: if `COMLORA_KERNELS` has another value, or names kernels that can't run on this device.
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
    """The module with the thin products for x and A, [K, n·r, d]; they compute in the dtype of A.

    The Triton kernels do not support float64, n·r above 128 (the tiles would be too large) and empty inputs. The
    PyTorch path is used for these.
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


# The parameters of a group of layers: [K][n] matrices
Masters = Sequence[Sequence[Tensor]]


def stack_branches(
    lora_a: Sequence[Masters], lora_b: Sequence[Masters], scaling: float, dtype: torch.dtype
) -> list[BranchWeights]:
    """Stacks and casts the weights of G groups of layers with equal shapes.

    The number of kernel launches does not depend on G and K. The function is differentiable, and its backward has few
    launches too.

    Args:
        lora_a: [G][K][n] matrices [r, d].
        lora_b: [G][K][n] matrices [l_i, r]; l_i may differ within a group but not between groups.
        scaling: lora_alpha / r, which A is multiplied by.
        dtype: dtype of the result.

    Returns:
        the weights of the G groups.
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
        a: A of all branches and layers times lora_alpha / r, [K, n·r, d]. The products are computed in its dtype.
        b: B of all branches, n of [K, l_i, r].
        dropout: probability of dropping an element of the adapters' input. Each layer draws its own mask.

    Returns:
        n outputs, [K·B, ..., l_i].
    """
    if x.dtype != a.dtype:
        x = x.to(a.dtype)
    kernels = products(x, a, dropout)
    noise = kernels.draw_noise(x, dropout, len(b)) if dropout else None
    # The outputs are filled after the function has saved its tensors. The second run of a checkpointed layer stops at
    # the last saved tensor, so it does not compute the product of its last layer (down) again
    later: list[tuple[Tensor, ...]] = []
    outputs = _SharedInputLinears.apply(kernels, noise, weights, biases, later, x, a, *b)
    with torch.no_grad():
        for product in later:
            _write(kernels, *product)
    return outputs


def branch_delta(
    x: Tensor, base_output: Tensor, a: Tensor, b: Tensor, dropout: float = 0.0, overwrite: bool = True
) -> Tensor:
    """base_output + dropout(x) A_kᵀ B_kᵀ, for one layer whose frozen product has been computed already.

    Args:
        x: the layer's input, [K·B, ..., d], branch-major.
        base_output: the output of the frozen layer, [K·B, ..., l].
        a: A times lora_alpha / r, [K, r, d].
        b: B, [K, l, r].
        dropout: probability of dropping an element of the adapters' input.
        overwrite: whether the result may be written into `base_output`.

    Returns:
        [K·B, ..., l].
    """
    if is_compiling():
        return _traceable_delta(x, base_output, a, b, dropout)
    return _BranchDelta.apply(x, base_output, a, b, dropout, overwrite)


def _traceable_delta(x: Tensor, base_output: Tensor, a: Tensor, b: Tensor, dropout: float) -> Tensor:
    """[`branch_delta`] in plain operations for `torch.compile`, which fuses them and decides what to save for the
    backward pass. Dropout's masks come from the compiler's own seeds."""
    rows = x.reshape(a.size(0), -1, x.size(-1))
    rows = _as(functional.dropout(rows, dropout) if dropout else rows, a)
    return base_output + torch.bmm(torch.bmm(rows, a.mT), b.mT).view_as(base_output)


class _SharedInputLinears(torch.autograd.Function):
    """Computes x Aᵀ, saves tensors for the backward pass and allocates the outputs, which the caller fills."""

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
            later.append((output.view(-1, output.size(-1)), flat, *operands))  # these views have no autograd graph
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
            # The adapters' part of dx first: the large products then add to it in their epilogue at almost no cost
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
    """The gradients of x Aᵀ and of each layer's B.

    Args:
        kernels: the module with the thin products.
        grads: the gradients of the outputs, n of [K·M, l_i]; None for an output that was not used.
        xa: x Aᵀ, [K, M, n·r].
        b: n of [K, l_i, r].

    Returns:
        dS, [K, M, n·r], and dB, n of [K, l_i, r]; None in dB for an output that was not used.
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
    """The part of each layer in a tensor [K, M, n·r]."""
    return (stacked,) if len(b) == 1 else stacked.chunk(len(b), dim=-1)


def _write(
    kernels: ModuleType, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, xa: Tensor, b: Tensor
) -> None:
    """Writes x Wᵀ + bias + (x Aᵀ) Bᵀ of one layer into `out`, [K·M, l]."""
    transposed = _as(weight, x).t()
    if bias is None:
        torch.mm(x, transposed, out=out)
    else:
        torch.addmm(_as(bias, x), x, transposed, out=out)
    kernels.add_delta(out.view(b.size(0), -1, out.size(-1)), xa, b)


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the dtype of `like`. Comparing first is cheaper than a call of `to` that changes nothing."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _may_overwrite(output: Tensor) -> bool:
    return output.is_contiguous() and not compat.is_view(output) and not (output.is_leaf and output.requires_grad)

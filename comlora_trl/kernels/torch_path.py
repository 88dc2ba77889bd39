"""The thin products of K LoRA branches as batched matrix products (torch.bmm).

Here rows are a view (K, M, features) of the activations, M rows for each branch. A `Noise` says which elements of x
dropout leaves out; it holds the random state from which they are drawn again, never a mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Noise(NamedTuple):
    """What dropout's mask is drawn from.

    Attributes:
        p: probability of dropping an element.
        state: the default random generator's state before the draw.
    """

    p: float
    state: Tensor


def draw_noise(x: Tensor, p: float) -> Noise:
    """The noise of one forward; the mask itself is that of `F.dropout`, so that K = 1 equals PEFT's layer."""
    state = torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
    return Noise(p, state)


def project_down(x: Tensor, a: Tensor, noise: Noise | None) -> Tensor:
    """dropout(x) A_kᵀ, [K, M, r].

    Args:
        x: [K·M..., d].
        a: [K, r, d].
    """
    rows = x if noise is None else F.dropout(x, noise.p)
    return torch.bmm(rows.to(a.dtype).reshape(a.size(0), -1, a.size(-1)), a.mT)


def add_delta(out: Tensor, xa: Tensor, b: Tensor, scaling: float) -> None:
    """Adds scaling · (x A_kᵀ) B_kᵀ to `out`, [K, M, l], in place."""
    out.baddbmm_(xa, b.mT, alpha=scaling)


def rank_gradients(grad: Tensor, b: Tensor, xa: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(dS, dB): dS = scaling · g B_k, [K, M, r], the gradient of x A_kᵀ, and dB = scaling · gᵀ (x A_kᵀ), [K, l, r].

    Args:
        grad: [K, M, l].
        b: [K, l, r].
        xa: [K, M, r].
    """
    nothing = grad.new_empty(1, 1, 1)  # beta = 0: not read
    ds = torch.baddbmm(nothing, grad, b, beta=0, alpha=scaling)
    return ds, torch.baddbmm(nothing, grad.mT, xa, beta=0, alpha=scaling)


def a_gradient(ds: Tensor, x: Tensor, noise: Noise | None) -> Tensor:
    """dA = dSᵀ dropout(x), [K, r, d]."""
    rows = x if noise is None else x * _mask(x, noise)
    return torch.bmm(ds.mT, rows.to(ds.dtype).reshape(ds.size(0), -1, x.size(-1)))


def project_back(ds: Tensor, a: Tensor, x: Tensor, noise: Noise | None) -> Tensor:
    """The branches' share of dx, dropout's mask on dS A_k, [K, M, d]."""
    through = torch.bmm(ds, a)
    return through if noise is None else through.mul_(_mask(x, noise).view_as(through))


def _mask(x: Tensor, noise: Noise) -> Tensor:
    """The forward's mask (0 or 1/(1−p)), drawn again from the random state that the forward began with."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        if x.is_cuda:
            torch.cuda.set_rng_state(noise.state, x.device)
        else:
            torch.set_rng_state(noise.state)
        return F.dropout(torch.ones_like(x), noise.p)

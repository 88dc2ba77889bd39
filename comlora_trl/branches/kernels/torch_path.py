"""The products with A and B of K LoRA branches, as batched matrix products (`torch.bmm`).

The activations are viewed as (K, M, features), with M rows for each branch. The n layers that read the same input are
concatenated along the rank dimension, n·r. A `Noise` describes dropout's masks by the random state from which they are
drawn. The masks themselves are not stored, but drawn again in the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Noise(NamedTuple):
    """The description of dropout's masks in one forward.

    Attributes:
        p: probability of dropping an element.
        layers: number of layers that read x; each has its own mask.
        state: state of the default random generator before the masks are drawn.
    """

    p: float
    layers: int
    state: Tensor


def draw_noise(x: Tensor, p: float, layers: int) -> Noise:
    """The noise of one forward. The masks are those of `F.dropout`, layer after layer, as in PEFT if K = 1."""
    state = torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
    return Noise(p, layers, state)


def project_down(x: Tensor, a: Tensor, noise: Noise | None) -> Tensor:
    """dropout_i(x) A_kiᵀ, [K, M, n·r].

    Args:
        x: [K·M, d], or with the first dimension split as in [K·B, T, d].
        a: [K, n·r, d].
        noise: the dropout; None for no dropout.
    """
    if noise is None:
        return torch.bmm(_by_branch(x, a), a.mT)
    parts = [torch.bmm(_by_branch(F.dropout(x, noise.p), a), a_i.mT) for a_i in a.chunk(noise.layers, dim=1)]
    return torch.cat(parts, dim=-1)


def add_delta(out: Tensor, xa: Tensor, b: Tensor) -> None:
    """Adds (x A_kᵀ) B_kᵀ to `out`, [K, M, l], in place.

    Args:
        out: [K, M, l].
        xa: [K, M, r]; it need not be contiguous.
        b: [K, l, r].
    """
    out.baddbmm_(xa, b.mT)


def rank_gradients(grad: Tensor, b: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
    """(dS, dB): dS = g B_k, the gradient of x A_kᵀ, [K, M, r], and dB = gᵀ (x A_kᵀ), [K, l, r].

    Args:
        grad: [K, M, l].
        b: [K, l, r].
        xa: [K, M, r]; it need not be contiguous.
    """
    return torch.bmm(grad, b), torch.bmm(grad.mT, xa)


def a_gradient(ds: Tensor, x: Tensor, noise: Noise | None) -> Tensor:
    """dA = dS_iᵀ dropout_i(x), [K, n·r, d]."""
    if noise is None:
        return torch.bmm(ds.mT, _by_branch(x, ds))
    with _drawn_again(noise, x):
        parts = [torch.bmm(ds_i.mT, _by_branch(F.dropout(x, noise.p), ds)) for ds_i in ds.chunk(noise.layers, dim=-1)]
    return torch.cat(parts, dim=1)


def project_back(ds: Tensor, a: Tensor, x: Tensor, noise: Noise | None) -> Tensor:
    """The adapters' part of dx: the sum over layers of dropout_i(dS_i A_i) with the forward's masks, [K, M, d]."""
    if noise is None:
        return torch.bmm(ds, a)
    parts = zip(ds.chunk(noise.layers, dim=-1), a.chunk(noise.layers, dim=1), strict=True)
    with _drawn_again(noise, x):
        # In the dtype of x, because the drawn masks depend on the dtype
        return sum(F.dropout(torch.bmm(ds_i, a_i).to(x.dtype), noise.p) for ds_i, a_i in parts)


def _by_branch(x: Tensor, like: Tensor) -> Tensor:
    """x as [K, M, d], in the dtype of `like`."""
    x = x if x.dtype == like.dtype else x.to(like.dtype)
    return x.reshape(like.size(0), -1, x.size(-1))


@contextmanager
def _drawn_again(noise: Noise, x: Tensor) -> Iterator[None]:
    """Within the block, dropout draws the same masks as in the forward on x, one layer after the other."""
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        if x.is_cuda:
            torch.cuda.set_rng_state(noise.state, x.device)
        else:
            torch.set_rng_state(noise.state)
        yield

"""The products with A and B of K LoRA branches that involve dropout, as Triton kernels with `torch_path`'s signatures.

The kernels are limited by memory bandwidth, because r is only 8 to 32. So each kernel reads its large operand once for
all layers that read the same x, and draws dropout's masks from a seed at the same time. Sums over many rows are split
among programs, and their float32 parts are added in a fixed order: the same input gives the same bits. The products
without dropout are those of `torch_path`. README.md in this folder has the measurements.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from comlora_trl.branches.kernels.torch_path import add_delta, rank_gradients

__all__ = ["Noise", "a_gradient", "add_delta", "draw_noise", "project_back", "project_down", "rank_gradients"]

# Arguments that change from step to step; Triton must not compile a new kernel for each value
_VARYING = ("rows", "seed", "threshold", "factor")


class Noise(NamedTuple):
    """The description of dropout's masks in one forward.

    Attributes:
        p: probability of dropping an element.
        layers: number of layers that read x; each has its own mask.
        seed: seed of the hash that decides which elements are dropped.
    """

    p: float
    layers: int
    seed: int


def draw_noise(x: Tensor, p: float, layers: int) -> Noise:
    """The noise of one forward.

    The seed comes from PyTorch's CPU generator, so nothing waits for the device. Gradient checkpointing restores the
    state of this generator.
    """
    return Noise(p, layers, int(torch.randint(2**31 - 1, ())))


def project_down(x: Tensor, a: Tensor, noise: Noise | None) -> Tensor:
    """dropout_i(x) A_kiᵀ, [K, M, n·r]; see `torch_path`."""
    x = x.reshape(-1, x.size(-1))
    k, rank, width = a.shape
    rows = x.size(0) // k
    out = a.new_empty(k, rows, rank)
    block = 16 if x.size(0) <= 4096 else 64
    _project_down[triton.cdiv(rows, block), k](
        x, a, out, rows, width, rank, *_dropout(noise), BM=block, BD=128, **_options(rank, a, noise)
    )
    return out


def a_gradient(ds: Tensor, x: Tensor, noise: Noise | None) -> Tensor:
    """dA = dS_iᵀ dropout_i(x), [K, n·r, d], float32; see `torch_path`."""
    x = x.reshape(-1, x.size(-1))
    (k, rows, rank), width = ds.shape, x.size(-1)
    block, columns = 64, 128
    tiles, blocks = triton.cdiv(width, columns), triton.cdiv(rows, block)
    splits = _splits(blocks, tiles * k)
    parts = ds.new_empty(splits, k, rank, width, dtype=torch.float32)
    _a_gradient[tiles, k, splits](
        x,
        ds,
        parts,
        rows,
        width,
        rank,
        triton.cdiv(blocks, splits),
        *_dropout(noise),
        BM=block,
        BD=columns,
        **_options(rank, ds, noise),
    )
    return parts.sum(0) if splits > 1 else parts[0]


def project_back(ds: Tensor, a: Tensor, x: Tensor, noise: Noise | None) -> Tensor:
    """The adapters' part of dx, [K, M, d]; see `torch_path`."""
    (k, rows, rank), width = ds.shape, a.size(-1)
    out = ds.new_empty(k, rows, width)
    _project_back[triton.cdiv(rows, 64), triton.cdiv(width, 128), k](
        ds, a, out, rows, width, rank, *_dropout(noise), BM=64, BD=128, **_options(rank, a, noise)
    )
    return out


def _splits(work: int, programs: int) -> int:
    """The number of parts of a sum over `work` tiles, for about 528 programs in total (4 for each of 132 SMs)."""
    return max(1, min(work, 528 // max(programs, 1)))


def _dropout(noise: Noise | None) -> tuple[int, int, float]:
    """The seed, the threshold for a 16-bit hash (0 keeps all elements), and the factor for kept elements."""
    if noise is None:
        return 0, 0, 1.0
    return noise.seed, round(noise.p * 2**16), 1.0 / (1.0 - noise.p)


def _options(rank: int, like: Tensor, noise: Noise | None) -> dict[str, object]:
    return {"R": _padded(rank), "LAYERS": 1 if noise is None else noise.layers, "PRECISION": _precision(like)}


def _padded(rank: int) -> int:
    """The rank rounded up to a tile size: a power of two, at least 16, which is the minimum of the matrix units."""
    return max(16, triton.next_power_of_2(rank))


def _precision(like: Tensor) -> str:
    exact = like.dtype == torch.float32 or not like.is_cuda
    return "ieee" if exact else "tf32"  # half precisions ignore "tf32"


@triton.jit
def _kept(row, first, width, seed, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile dropout keeps: those whose 16-bit hash of position and seed is at least the threshold.

    One 32-bit hash (Wellons' lowbias32) serves two neighbouring elements. `first` is the tile's first column and must
    be even.
    """
    seed = seed.to(tl.uint32)
    pair = first // 2 + tl.arange(0, COLUMNS // 2)
    bits = (row[:, None] * ((width + 1) // 2) + pair[None, :]).to(tl.uint32) ^ seed
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D + seed
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    halves = tl.join(bits & 0xFFFF, bits >> 16)
    return tl.reshape(halves, [ROWS, COLUMNS]).to(tl.int32) >= threshold


@triton.jit
def _layer_seed(seed, layer):
    """The seed of a layer; each layer that reads x has its own mask."""
    return seed + layer * 0x3C6EF372


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr):
    """left · right in float32. Triton's interpreter reads bf16 operands as integers, so they are cast to float32."""
    if PRECISION == "ieee":
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit(do_not_specialize=_VARYING)
def _project_down(
    x, a, out, rows, width, rank, seed, threshold, factor,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, LAYERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    branch = tl.program_id(1)
    inside = tl.program_id(0) * BM + tl.arange(0, BM)
    row = (branch * rows + inside).to(tl.int64)
    ranks = tl.arange(0, R)
    total = tl.zeros([BM, R], tl.float32)
    for start in range(0, width, BD):
        col = start + tl.arange(0, BD)
        tile = tl.load(x + row[:, None] * width + col[None, :], (inside < rows)[:, None] & (col < width)[None, :], 0.0)
        weights = tl.load(
            a + (branch * rank + ranks)[None, :] * width + col[:, None],
            (col < width)[:, None] & (ranks < rank)[None, :],
            0.0,
        )
        for layer in tl.static_range(LAYERS):
            kept = _kept(row, start, width, _layer_seed(seed, layer), threshold, BM, BD)
            own = ranks // (rank // LAYERS) == layer
            left = tl.where(kept, tile, 0.0).to(weights.dtype)
            total += _dot(left, tl.where(own[None, :], weights, 0.0).to(weights.dtype), PRECISION)
    place = out + row[:, None] * rank + ranks[None, :]
    tl.store(place, (total * factor).to(out.dtype.element_ty), (inside < rows)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=(*_VARYING, "steps"))
def _a_gradient(
    x, ds, parts, rows, width, rank, steps, seed, threshold, factor,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, LAYERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    branch, split = tl.program_id(1), tl.program_id(2)
    branches = tl.num_programs(1)
    first = tl.program_id(0) * BD
    col = first + tl.arange(0, BD)
    ranks = tl.arange(0, R)
    total = tl.zeros([BD, R], tl.float32)
    for step in range(steps):
        inside = (split * steps + step) * BM + tl.arange(0, BM)
        row = (branch * rows + inside).to(tl.int64)
        tile = tl.load(x + row[:, None] * width + col[None, :], (inside < rows)[:, None] & (col < width)[None, :], 0.0)
        back = tl.load(
            ds + row[:, None] * rank + ranks[None, :], (inside < rows)[:, None] & (ranks < rank)[None, :], 0.0
        )
        for layer in tl.static_range(LAYERS):
            kept = _kept(row, first, width, _layer_seed(seed, layer), threshold, BM, BD)
            own = ranks // (rank // LAYERS) == layer
            left = tl.trans(tl.where(kept, tile, 0.0).to(back.dtype))
            total += _dot(left, tl.where(own[None, :], back, 0.0).to(back.dtype), PRECISION)
    line = ((split * branches + branch) * rank + ranks).to(tl.int64)
    place = parts + line[None, :] * width + col[:, None]
    tl.store(place, total * factor, (col < width)[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=_VARYING)
def _project_back(
    ds, a, out, rows, width, rank, seed, threshold, factor,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, LAYERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    branch = tl.program_id(2)
    inside = tl.program_id(0) * BM + tl.arange(0, BM)
    row = (branch * rows + inside).to(tl.int64)
    first = tl.program_id(1) * BD
    col = first + tl.arange(0, BD)
    ranks = tl.arange(0, R)
    back = tl.load(ds + row[:, None] * rank + ranks[None, :], (inside < rows)[:, None] & (ranks < rank)[None, :], 0.0)
    weights = tl.load(
        a + (branch * rank + ranks)[:, None] * width + col[None, :],
        (ranks < rank)[:, None] & (col < width)[None, :],
        0.0,
    )
    total = tl.zeros([BM, BD], tl.float32)
    for layer in tl.static_range(LAYERS):
        kept = _kept(row, first, width, _layer_seed(seed, layer), threshold, BM, BD)
        own = ranks // (rank // LAYERS) == layer
        part = _dot(tl.where(own[None, :], back, 0.0).to(back.dtype), weights, PRECISION)
        total += tl.where(kept, part, 0.0)
    place = out + row[:, None] * width + col[None, :]
    tl.store(place, (total * factor).to(out.dtype.element_ty), (inside < rows)[:, None] & (col < width)[None, :])

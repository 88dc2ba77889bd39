"""The branches' weights as the products take them: stacked, scaled and cast, many layers at a time."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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

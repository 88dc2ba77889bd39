"""What K·n leaves of autograd cost, for `run.py`: against a handful, and against gradients written past them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cases import Bench
from report import Results
from torch import Tensor, nn

from comlora_trl.branches import layers
from comlora_trl.branches.kernels import BranchWeights
from comlora_trl.branches.kernels.branches import Masters


def stacked_parameters(bench: Bench, results: Results) -> None:
    """K = 4 as it is; with weights that already lie stacked, as parameters; with gradients written past autograd.

    The stacked arm gets neither PEFT's tensors as views nor gradients in them, so a real one would win less. The one
    that writes `.grad` itself has both, but no hook of a leaf (DDP's, say) would run.
    """
    frozen, four = bench.frozen(), bench.competing(4)
    for rows in (bench.shape.rows, bench.shape.rows // 4):
        own, parameters = bench.branch_step(four, rows), _Stacked()

        def stacked(own=own, parameters=parameters) -> None:
            parameters.forget_gradients()
            with stacking(parameters.stack):
                own()

        def written(own=own) -> None:
            with stacking(_written):
                own()

        arms = {"frozen model": bench.frozen_step(frozen, 4 * rows), "K=4": own}
        arms |= {"K=4, stacked parameters": stacked, "K=4, gradients written": written}
        found = results.figures[f"stacked parameters, {rows} rows"] = bench.alternate(arms)
        detail = "; ".join(f"{arm} {one['ms']:.1f} ms" for arm, one in found.items())
        for arm in ("stacked parameters", "gradients written"):
            ratio = found[f"K=4, {arm}"]["ms"] / found["frozen model"]["ms"]
            results.row(f"K=4 / frozen model, {rows} rows, {arm} (at best)", ratio, None, detail)


@contextmanager
def stacking(function: Callable[..., list[BranchWeights]]) -> Iterator[None]:
    """Has a function in place of `stack_branches` for a while."""
    original = layers.kernels.stack_branches
    layers.kernels.stack_branches = function
    try:
        yield
    finally:
        layers.kernels.stack_branches = original


class _Stacked:
    """Parameters in place of `stack_branches`' stacks, made when a group of layers is first asked for."""

    def __init__(self) -> None:
        self.parameters: dict[int, list[nn.Parameter]] = {}

    def forget_gradients(self) -> None:
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.grad = None

    def stack(
        self, lora_a: Sequence[Masters], lora_b: Sequence[Masters], scaling: float, dtype: torch.dtype
    ) -> list[BranchWeights]:
        """As `stack_branches`, but for the stacking."""
        groups, branches, layers = len(lora_a), len(lora_a[0]), len(lora_a[0][0])
        key = id(lora_a[0][0][0])
        if key not in self.parameters:
            a = [matrix for group in lora_a for branch in group for matrix in branch]
            b = [[branch[layer] for group in lora_b for branch in group] for layer in range(layers)]
            self.parameters[key] = [_parameter(matrices) for matrices in (a, *b)]
        stacked_a, *stacked_b = self.parameters[key]
        rank, width = stacked_a.shape[1:]
        a_all = (stacked_a * scaling).to(dtype).view(groups, branches, layers * rank, width)
        b_all = [one.to(dtype).view(groups, branches, -1, rank).unbind() for one in stacked_b]
        return [BranchWeights(a, tuple(b)) for a, *b in zip(a_all.unbind(), *b_all, strict=True)]


def _parameter(matrices: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([matrix.detach() for matrix in matrices]))


def _written(
    lora_a: Sequence[Masters], lora_b: Sequence[Masters], scaling: float, dtype: torch.dtype
) -> list[BranchWeights]:
    groups, branches, layers = len(lora_a), len(lora_a[0]), len(lora_a[0][0])
    tie = torch.zeros((), requires_grad=True)
    a = [matrix for group in lora_a for branch in group for matrix in branch]
    b = [[branch[layer] for group in lora_b for branch in group] for layer in range(layers)]
    a_all = _WriteGradients.apply(tie, a, scaling, dtype)
    b_all = [_WriteGradients.apply(tie, one, 1.0, dtype).view(groups, branches, -1, a[0].size(0)) for one in b]
    a_all = a_all.view(groups, branches, -1, a[0].size(1))
    return [BranchWeights(a, tuple(b)) for a, *b in zip(a_all.unbind(), *(one.unbind() for one in b_all), strict=True)]


class _WriteGradients(torch.autograd.Function):
    """Matrices stacked, scaled and cast, whose gradients are written as views of one tensor."""

    @staticmethod
    def forward(ctx: Any, tie: Tensor, matrices: list[Tensor], scaling: float, dtype: torch.dtype) -> Tensor:
        ctx.matrices, ctx.scaling = matrices, scaling
        stack = torch.stack([matrix.detach() for matrix in matrices])
        return (stack if scaling == 1 else stack * scaling).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        gradient = gradient.to(ctx.matrices[0].dtype)
        for matrix, own in zip(ctx.matrices, (gradient * ctx.scaling).unbind(), strict=True):
            matrix.grad = own if matrix.grad is None else matrix.grad + own
        return None, None, None, None

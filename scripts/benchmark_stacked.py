"""What one parameter for many layers would save, for `benchmark.py`: K·n leaves of autograd against a handful."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from benchmark_cases import Bench
from benchmark_report import Results
from torch import Tensor, nn

from comlora_trl.branches import layer_groups
from comlora_trl.branches.kernels import BranchWeights
from comlora_trl.branches.kernels.stacking import Masters


def stacked_parameters(bench: Bench, results: Results) -> None:
    """K = 4 as it is, and with weights that already lie stacked, as parameters: the most that storing them so can win.

    The stacked arm gets neither PEFT's tensors as views nor gradients in them, so a real one would win less.
    """
    frozen, four = bench.frozen(), bench.competing(4)
    for rows in (bench.shape.rows, bench.shape.rows // 4):
        own, parameters = bench.branch_step(four, rows), _Stacked()

        def stacked(own=own, parameters=parameters) -> None:
            with parameters.instead():
                own()

        arms = {"floor": bench.floor_step(frozen, 4 * rows), "K=4": own, "K=4, stacked parameters": stacked}
        found = results.figures[f"stacked parameters, {rows} rows"] = bench.alternate(arms)
        detail = "; ".join(f"{arm} {one['ms']:.1f} ms" for arm, one in found.items())
        ratio = found["K=4, stacked parameters"]["ms"] / found["floor"]["ms"]
        results.row(f"K=4 / floor, {rows} rows, stacked parameters (at best)", ratio, None, detail)


class _Stacked:
    """Parameters in place of `stack_branches`' stacks, made when a group of layers is first asked for."""

    def __init__(self) -> None:
        self.parameters: dict[int, list[nn.Parameter]] = {}

    @contextmanager
    def instead(self) -> Iterator[None]:
        original = layer_groups.kernels.stack_branches
        layer_groups.kernels.stack_branches = self.stack
        for parameters in self.parameters.values():
            for parameter in parameters:
                parameter.grad = None
        try:
            yield
        finally:
            layer_groups.kernels.stack_branches = original

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

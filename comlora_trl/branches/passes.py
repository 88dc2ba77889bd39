"""A pass: one run of the base model over some branches, from its forward's beginning to its backward's end.

Which branches run, how often the batch is repeated, stacked weights, outputs that wait: all of it belongs to a pass.
Outside its forward and its backward the layers are PEFT's own, whoever calls them.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from comlora_trl import compat

if TYPE_CHECKING:
    from comlora_trl.branches.kernels import BranchWeights
    from comlora_trl.branches.layer_groups import LayerGroup
    from comlora_trl.branches.layers import CompetingBranches


class Pass:
    """One run over the named branches; a context manager around its forward.

    Gradient checkpointing runs layers again during the backward pass, which must then find what their forward found:
    after [`resume_in_backward`] the pass is active again from the first gradient to the last.

    Args:
        branches: the model's layers, which ask for the active pass.
        names: adapters whose rows are in the batch, in order, in equal shares.
        copies: how often a batch is repeated; 1 for rows that are dealt out among the branches already.
        rows: lines of tokens in the batch before it is repeated.
        inputs_are_wide: whether the model's inputs are repeated, and not those of its layers.
        compiled: whether `torch.compile` runs the model.

    Attributes:
        differentiable: whether gradients are wanted of the pass; a model may run layers without them meanwhile.
    """

    def __init__(
        self,
        branches: "CompetingBranches",
        names: tuple[str, ...],
        copies: int,
        rows: int,
        inputs_are_wide: bool = False,
        compiled: bool = False,
    ) -> None:
        self.branches, self.names, self.copies, self.rows = branches, names, copies, rows
        self.inputs_are_wide, self.compiled = inputs_are_wide, compiled
        self.differentiable = torch.is_grad_enabled()
        self.weights: list[tuple[LayerGroup, BranchWeights | None]] | None = None
        self.expanded: dict[int, tuple[Any, Any]] = {}
        self.router_logits: tuple[Tensor, ...] | None = None
        self._backward: int | None = None

    def __enter__(self) -> "Pass":
        self.branches.begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.branches.end(self)

    def resume_in_backward(self, *outputs: Tensor | None) -> None:
        """Makes the pass active while gradients of these outputs are computed, and no longer."""
        for output in outputs:
            if output is not None and output.requires_grad:
                output.register_hook(self._resume)

    def _resume(self, _: Tensor) -> None:
        active = self.branches.current()
        if active is self:
            return  # by another of its outputs
        if active is not None and self.branches.checkpointing:
            raise RuntimeError(
                "one backward pass runs through two passes over branches, whose layers gradient checkpointing can't "
                "tell apart: call backward() after each forward, or switch gradient checkpointing off."
            )
        self.branches.begin(self)
        self._backward = compat.running_backward()
        compat.at_the_end_of_backward(lambda: self.branches.end(self))

    @property
    def is_over(self) -> bool:
        """Whether the backward that the pass became active for has failed, so that its end was never announced."""
        return self._backward is not None and self._backward != compat.running_backward()

"""The K-branch forward of PEFT's LoRA layers.

PEFT makes the layers and owns their parameters; `make_branch_layer` gives such a layer a second way to run. While
branches compete, its input holds the rows of several branches one after the other (branch-major), and each group of
rows must meet its own adapter. Plain linear LoRA does that with batched products (`comlora_trl.kernels`); any other
kind (DoRA, embeddings, convolutions, biased LoRA) runs PEFT's own forward branch by branch. Outside the competition
the layer is PEFT's, untouched.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from comlora_trl import kernels


@dataclass
class CompetingBranches:
    """Which branches the rows of the current forward belong to; shared by all layers of a model.

    Attributes:
        names: adapter names of the branches whose rows are in the batch, in order; empty outside the competition.

    The value stays after a forward until the next one begins, since gradient checkpointing runs the layers again
    during the backward pass.
    """

    names: tuple[str, ...] = ()


class BranchLayer:
    """Mixin over a PEFT LoRA layer class: with competing branches, each group of rows meets its own adapter."""

    competing: CompetingBranches

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.competing.names
        if not names:
            return super().forward(x, *args, **kwargs)
        if x.size(0) % len(names):
            raise RuntimeError(
                f"{type(self).__name__} got {x.size(0)} rows for {len(names)} branches: each branch needs the same "
                "number. A layer that receives a varying share of the tokens (a routed expert) can't be adapted here; "
                "leave it out of target_modules."
            )
        if self.has_batched_path(names):
            return self.forward_batched(x, names, *args, **kwargs)
        return self.forward_one_by_one(x, names, *args, **kwargs)

    def has_batched_path(self, names: tuple[str, ...]) -> bool:
        """Whether the layer is a plain linear LoRA, which the batched products compute."""
        return (
            isinstance(self.lora_A[names[0]] if names[0] in self.lora_A else None, nn.Linear)
            and not any(name in self.lora_variant or self.lora_bias[name] for name in names)
            and not self.merged
        )

    def forward_batched(self, x: Tensor, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Tensor:
        """All branches at once: one base product and one batched LoRA product, x is [len(names)·rows, ..., d]."""
        lora_a = [self.lora_A[name].weight for name in names]
        lora_b = [self.lora_B[name].weight for name in names]
        dropout = self.lora_dropout[names[0]]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        scaling = self.scaling[names[0]]
        base = self.base_layer
        if _is_plain_linear(base) and not args and not kwargs:
            return kernels.branch_linear_fused_base(x, base.weight, base.bias, lora_a, lora_b, scaling, p)
        return kernels.branch_linear(x, base(x, *args, **kwargs), lora_a, lora_b, scaling, p)

    def forward_one_by_one(self, x: Tensor, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Tensor:
        """Each branch through PEFT's own forward, with that branch as the active adapter."""
        before = self._active_adapter
        try:
            outputs = []
            for name, rows in zip(names, x.chunk(len(names)), strict=True):
                self._active_adapter = [name]
                outputs.append(super().forward(rows, *args, **kwargs))
        finally:
            self._active_adapter = before
        return torch.cat(outputs)


def make_branch_layer(layer: LoraLayer, competing: CompetingBranches) -> None:
    """Gives a PEFT LoRA layer the K-branch forward, in place.

    The layer's class becomes a subclass of its own with [`BranchLayer`] in front, whatever PEFT chose for the base
    layer (plain, 4-bit, 8-bit, GPTQ, …). A dispatch by base-layer class would have to repeat PEFT's choice.
    """
    layer.competing = competing
    layer.__class__ = _branch_class(type(layer))


def _branch_class(layer_class: type[LoraLayer]) -> type[LoraLayer]:
    if layer_class not in _BRANCH_CLASSES:
        _BRANCH_CLASSES[layer_class] = type(f"Branch{layer_class.__name__}", (BranchLayer, layer_class), {})
    return _BRANCH_CLASSES[layer_class]


_BRANCH_CLASSES: dict[type[LoraLayer], type[LoraLayer]] = {}


def _is_plain_linear(layer: nn.Module) -> bool:
    """A frozen `nn.Linear` itself, without hooks, whose product may be fused with the branches' deltas."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and not layer.weight.requires_grad
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
    )

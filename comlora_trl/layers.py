"""The K-branch forward of PEFT's LoRA layers.

PEFT makes the layers and owns their parameters; `make_branch_layers` gives them a second way to run. While branches
compete, a layer's input holds the rows of several branches one after the other (branch-major), and each group of rows
must meet its own adapter. Plain linear LoRA does that with batched products, together with the layers that read the
same input (`comlora_trl.layer_groups`); any other kind (DoRA, embeddings, convolutions, biased LoRA) runs PEFT's own
forward branch by branch. Outside the competition the layer is PEFT's, untouched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.compiler import is_compiling

from comlora_trl.layer_groups import LayerGroup, form_groups, stack_weights

# Groups whose weights are stacked together: those of some five decoder layers with the default targets
_GROUPS_AT_A_TIME = 16


@dataclass
class CompetingBranches:
    """Which branches the rows of the current forward belong to; shared by all layers of a model.

    Attributes:
        model: the base model.
        first: name in it of the first adapted layer.
        groups: the groups of layers with batched products, in the order they run.
        names: adapter names of the branches whose rows are in the batch, in order; empty outside the competition.

    The values stay after a forward until the next one begins, since gradient checkpointing runs the layers again
    during the backward pass.
    """

    model: nn.Module
    first: str
    groups: list[LayerGroup] = field(default_factory=list)
    names: tuple[str, ...] = ()

    def begin(self, names: tuple[str, ...]) -> None:
        """Begins a pass over the named branches, or over none."""
        self.names = names
        if any(group.broken for group in self.groups):
            self.groups = [one for group in self.groups for one in (self._alone(group) if group.broken else [group])]
        for group in self.groups:
            group.begin()
        if names and self._compiled():
            # A compiled layer that finds its weights and one that has to stack them would be two graphs
            stack_weights(self.groups, names)

    def stack_weights(self, group: LayerGroup) -> None:
        """Stacks and casts the weights of a group, and of the next ones with it.

        All layers at once would keep the GPU waiting at the pass's beginning and at its end; layer by layer costs
        launches for every matrix.
        """
        first = self.groups.index(group)
        stack_weights(self.groups[first : first + _GROUPS_AT_A_TIME], self.names)

    def _compiled(self) -> bool:
        """Whether `torch.compile` runs the model, or a module of it around the first adapted layer."""
        module, compiled = self.model, is_compiling()
        for part in self.first.split("."):
            # Module.compile() leaves no other trace
            compiled = compiled or is_compiled_module(module) or module._compiled_call_impl is not None
            module = getattr(module, part)
        return compiled

    @staticmethod
    def _alone(group: LayerGroup) -> list[LayerGroup]:
        for layer in group.layers:
            layer.group = LayerGroup([layer], group.adapter)
        return [layer.group for layer in group.layers]


class BranchLayer:
    """Mixin over a PEFT LoRA layer class: with competing branches, each group of rows meets its own adapter."""

    competing: CompetingBranches
    group: LayerGroup | None

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
        if self.group is None or args or kwargs or self.merged_adapters:
            return self.forward_one_by_one(x, names, *args, **kwargs)
        if self.group.weights is None:
            self.competing.stack_weights(self.group)
        if self.group.weights is None:  # sharded, wrapped or on their way (FSDP, ZeRO-3)
            return self.forward_one_by_one(x, names)
        return self.group.output(self, x)

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


def make_branch_layers(model: nn.Module, adapter: str) -> tuple[dict[str, LoraLayer], CompetingBranches]:
    """Gives every PEFT LoRA layer of a model the K-branch forward, in place.

    A layer's class becomes a subclass of its own with [`BranchLayer`] in front, whatever PEFT chose for the base layer
    (plain, 4-bit, 8-bit, GPTQ, …). A dispatch by base-layer class would have to repeat PEFT's choice.

    Args:
        model: the base model with all branches' adapters in it.
        adapter: name of one of them; its settings are those of every branch.

    Returns:
        the adapted layers by name, and the state that they share.
    """
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    competing = CompetingBranches(model, next(iter(adapted)))
    for layer in adapted.values():
        layer.competing, layer.group = competing, None
        layer.__class__ = _branch_class(type(layer))
    places = ((*name.rpartition(".")[::2], layer) for name, layer in adapted.items())
    batched = [
        (model.get_submodule(parent), child, layer)
        for parent, child, layer in places
        if _has_batched_path(layer, adapter)
    ]
    for layer, group in form_groups(batched, adapter).items():
        layer.group = group
        if group not in competing.groups:
            competing.groups.append(group)
    return adapted, competing


def _has_batched_path(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer is a plain linear LoRA, which the batched products compute."""
    linear: Mapping[str, nn.Module] = layer.lora_A
    return (
        adapter in linear
        and isinstance(linear[adapter], nn.Linear)
        and adapter not in layer.lora_variant
        and not layer.lora_bias[adapter]
    )


def _branch_class(layer_class: type[LoraLayer]) -> type[LoraLayer]:
    if layer_class not in _BRANCH_CLASSES:
        _BRANCH_CLASSES[layer_class] = type(f"Branch{layer_class.__name__}", (BranchLayer, layer_class), {})
    return _BRANCH_CLASSES[layer_class]


_BRANCH_CLASSES: dict[type[LoraLayer], type[LoraLayer]] = {}

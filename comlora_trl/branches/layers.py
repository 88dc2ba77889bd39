"""The K-branch forward of PEFT's LoRA layers.

PEFT makes the layers and owns their parameters; `make_branch_layers` gives them a second way to run. While branches
compete, a layer's input holds the rows of several branches one after the other (branch-major), and each group of rows
must meet its own adapter. Plain linear LoRA does that with batched products, together with the layers that read the
same input (`comlora_trl.branches.layer_groups`); any other kind (DoRA, embeddings, convolutions, biased LoRA,
experts' fused weights) runs PEFT's own forward branch by branch. Outside a pass the layer is PEFT's, untouched.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.compiler import is_compiling

from comlora_trl import compat
from comlora_trl.branches.layer_groups import LayerGroup, form_groups, stack_weights
from comlora_trl.branches.passes import Pass

# Groups whose weights are stacked together: those of some five decoder layers with the default targets
_GROUPS_AT_A_TIME = 16


class CompetingBranches:
    """What the adapted layers of a model share: the pass that is active, if any, and their groups.

    Attributes:
        model: the base model.
        first: name in it of the first adapted layer.
        groups: the groups of layers with batched products, in the order they run.
        active: the pass whose forward or backward is running.
        names: adapter names of the branches whose rows are in the batch, in order; empty without a pass.
    """

    def __init__(self, model: nn.Module, first: str) -> None:
        self.model, self.first = model, first
        self.groups: list[LayerGroup] = []
        self.active: Pass | None = None
        self.names: tuple[str, ...] = ()

    def begin(self, one: Pass) -> None:
        """Makes a pass active: at its forward's beginning, or again when its backward begins."""
        self.abandon()
        self.active, self.names = one, one.names
        if one.weights is not None:
            for group, weights in one.weights:
                group.weights = weights
            return
        if any(group.broken for group in self.groups):
            self.groups = [one for group in self.groups for one in (self._alone(group) if group.broken else [group])]
        if one.compiled or self._compiled():
            # A compiled layer that finds its weights and one that has to stack them would be two graphs
            stack_weights(self.groups, one.names)

    def end(self, one: Pass) -> None:
        """Ends the forward or the backward of a pass; its weights are its own, for layers that run again."""
        if self.active is not one:
            return
        one.weights = [(group, group.weights) for group in self.groups]
        self.active, self.names = None, ()
        for group in self.groups:
            group.forget()

    def current(self) -> Pass | None:
        """The active pass, but for one whose backward has failed, out of memory say: that one ends here."""
        if self.active is not None and not is_compiling() and self.active.is_over:
            self.abandon()
        return self.active

    def abandon(self) -> None:
        """Ends the active pass, if there is one."""
        if self.active is not None:
            self.end(self.active)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which never hold a pass."""
        return {**self.__dict__, "active": None, "names": ()}

    @property
    def checkpointing(self) -> bool:
        """Whether layers run again during the backward pass."""
        newer = "is_activation_checkpointing"  # transformers renamed it
        name = newer if hasattr(self.model, newer) else "is_gradient_checkpointing"
        return bool(getattr(self.model, name, False))

    def stack_weights(self, group: LayerGroup) -> None:
        """Stacks and casts the weights of a group, and of the next ones with it.

        All layers at once would keep the GPU waiting at the pass's beginning and at its end; layer by layer costs
        launches for every matrix.
        """
        first = self.groups.index(group)
        with torch.set_grad_enabled(self.active.differentiable):  # all runs of a layer share its weights
            stack_weights(self.groups[first : first + _GROUPS_AT_A_TIME], self.names)

    def _compiled(self) -> bool:
        """Whether `torch.compile` runs a module of the model around the first adapted layer."""
        module, compiled = self.model, False
        for part in self.first.split("."):
            # Module.compile() leaves no other trace
            compiled = compiled or is_compiled_module(module) or compat.is_compiled_in_place(module)
            module = getattr(module, part)
        return compiled

    @staticmethod
    def _alone(group: LayerGroup) -> list[LayerGroup]:
        for layer in group.layers:
            layer.group = LayerGroup([layer], group.adapter)
        return [layer.group for layer in group.layers]


class BranchRowsError(RuntimeError):
    """A layer got rows that can't be dealt out to the branches."""


class BranchLayer:
    """Mixin over a PEFT LoRA layer class: with competing branches, each group of rows meets its own adapter."""

    competing: CompetingBranches
    group: LayerGroup | None

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Copies and pickles by PEFT's class, for the layer's own is made at run time."""
        return _new_layer, (plain_class(self),), self.__dict__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.competing.names
        if not names or self.competing.current() is None:
            return super().forward(x, *args, **kwargs)
        if x.size(0) % len(names):
            raise BranchRowsError(
                f"{type(self).__name__} got {x.size(0)} rows for {len(names)} branches, which can't all have the same "
                "number: run the branches one after the other (comlora_branch_chunk=1)."
            )
        if self.group is None or args or kwargs or self.merged_adapters:
            return self.forward_one_by_one(x, names, *args, **kwargs)
        if self.group.weights is None:
            self.competing.stack_weights(self.group)
        if self.group.weights is None:  # sharded, wrapped or on their way (FSDP, ZeRO-3)
            return self.forward_one_by_one(x, names)
        return self.group.output(self, x)

    def forward_one_by_one(self, x: Tensor, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        """Each branch through PEFT's own forward, with that branch as the active adapter.

        Tensors among the arguments with as many rows as x (the experts that a router chose) are dealt out like it.
        """
        competing, rows = self.competing, x.size(0) // len(names)
        own, all_names = self._active_adapter, competing.names
        outputs = []
        try:
            for branch, name in enumerate(names):
                part = lambda value, first=branch * rows: _rows_of(value, x.size(0), first, rows)
                # PEFT nests the wrappers of a module's parameters: those inside get this branch's rows alone
                self._active_adapter, competing.names = [name], (name,)
                given = {key: part(value) for key, value in kwargs.items()}
                outputs.append(super().forward(part(x), *map(part, args), **given))
        finally:
            self._active_adapter, competing.names = own, all_names
        return _joined(outputs)


def _rows_of(value: Any, size: int, first: int, rows: int) -> Any:
    """Some rows of a tensor that has `size` of them; anything else as it is."""
    if size == rows or not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != size:
        return value
    return value[first : first + rows]


def _joined(outputs: list[Any]) -> Any:
    """The branches' outputs, tensors or tuples of tensors, as one."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return tuple(map(_joined, map(list, zip(*outputs, strict=True))))
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
    if not adapted:
        raise ValueError("the model has no LoRA layer, so there is nothing for the branches to train.")
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


def make_plain_layers(layers: Iterable[LoraLayer]) -> None:
    """Gives layers PEFT's own classes back."""
    for layer in layers:
        if isinstance(layer, BranchLayer):
            layer.__class__ = plain_class(layer)
            del layer.competing, layer.group


def plain_class(layer: BranchLayer) -> type[LoraLayer]:
    """PEFT's class of a layer."""
    return next(kind for kind, own in _BRANCH_CLASSES.items() if own is type(layer))


def _new_layer(kind: type[LoraLayer]) -> LoraLayer:
    own = _branch_class(kind)
    return own.__new__(own)


def _has_batched_path(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer is a plain linear LoRA, which the batched products compute."""
    linear: Mapping[str, nn.Module] = layer.lora_A
    return (
        not isinstance(layer, ParamWrapper)
        and adapter in linear
        and isinstance(linear[adapter], nn.Linear)
        and adapter not in layer.lora_variant
        and not layer.lora_bias[adapter]
    )


def _branch_class(layer_class: type[LoraLayer]) -> type[LoraLayer]:
    if layer_class not in _BRANCH_CLASSES:
        _BRANCH_CLASSES[layer_class] = type(f"Branch{layer_class.__name__}", (BranchLayer, layer_class), {})
    return _BRANCH_CLASSES[layer_class]


_BRANCH_CLASSES: dict[type[LoraLayer], type[LoraLayer]] = {}

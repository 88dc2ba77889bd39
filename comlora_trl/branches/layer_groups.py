"""Adapted layers that read the same input and run as one: q, k and v of an attention block, gate and up of an MLP.

A group computes the outputs of all its layers when the first of them is called, and hands each out when its own turn
comes. Its layers are those of one parent module whose names say that they read the same input. Should one of them be
called with another input all the same, it is computed alone, and from the next pass on all of them are.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.compiler import is_compiling

from comlora_trl import compat
from comlora_trl.branches import kernels
from comlora_trl.branches.kernels import BranchWeights

# Names of layers that read the same input where they are children of one module, in the order they are called
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


class LayerGroup:
    """Linear LoRA layers that read the same input, alike in rank, scaling and dropout; often just one.

    Args:
        layers: the layers, in the order they are called.
        adapter: name of an adapter; its settings are those of every branch.
    """

    def __init__(self, layers: Sequence[LoraLayer], adapter: str) -> None:
        self.layers = list(layers)
        self.adapter = adapter
        self.scaling, self.dropout = layers[0].scaling[adapter], layers[0].lora_dropout[adapter]
        self.shapes = tuple(
            (layer.lora_A[adapter].weight.shape, layer.lora_B[adapter].weight.shape) for layer in layers
        )
        self.weights: BranchWeights | None = None
        self.broken = False
        self._waiting: tuple[Tensor, dict[LoraLayer, Tensor]] | None = None
        self._linears: dict[str, list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which never hold anything of a pass, nor another model's parameters."""
        return {**self.__dict__, "weights": None, "_waiting": None, "_linears": {}}

    def drop(self, name: str) -> None:
        """Forgets a branch that is gone for good."""
        self._linears.pop(name, None)
        if self.adapter == name:
            self.adapter = next(other for other in self.layers[0].lora_A if other != name)

    def forget(self) -> None:
        """Forgets a pass that is over: its weights, and outputs that nobody asked for."""
        self.weights = self._waiting = None

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The output of one layer; those of the others wait for their own call with the same x.

        Args:
            x: [K·B, ..., d], branch-major, for the K branches of `weights`.
        """
        if is_compiling():  # outputs that wait are state, which the compiler refuses under checkpointing
            return self._compute([layer], x, self._part(self.weights, layer))[0]
        source, waiting = self._waiting or (None, {})
        if source is x and layer in waiting:
            result = waiting.pop(layer)
            if not waiting:
                self._waiting = None
            return result
        if waiting:  # with another input than its siblings', or without any call of theirs
            self.broken = True
            if layer in waiting:
                return self._compute([layer], x, self._part(self.weights, layer))[0]
        outputs = dict(zip(self.layers, self._compute(self.layers, x, self.weights), strict=True))
        result = outputs.pop(layer)
        self._waiting = (x, outputs) if outputs else None
        return result

    def masters(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """The layers' A and B of a branch, or None if they are not at hand: sharded, or on their way (FSDP, ZeRO-3).

        The modules are looked up once and their weights read past `__getattr__`: a pass asks for thousands of them.
        """
        if name not in self._linears:
            pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer in self.layers]
            if not all(type(linear) is nn.Linear for pair in pairs for linear in pair):
                return None  # wrapped
            self._linears[name] = [(compat.parameters_of(a), compat.parameters_of(b)) for a, b in pairs]
        found = [(a.get("weight"), b.get("weight")) for a, b in self._linears[name]]
        for weights, shapes in zip(found, self.shapes, strict=True):
            for weight, shape in zip(weights, shapes, strict=True):
                if type(weight) is not nn.Parameter or weight.shape != shape or hasattr(weight, "ds_id"):
                    return None
        return found

    def _compute(self, layers: Sequence[LoraLayer], x: Tensor, weights: BranchWeights) -> Sequence[Tensor]:
        p = self.dropout.p if layers[0].training and isinstance(self.dropout, nn.Dropout) else 0.0
        bases = [layer.base_layer for layer in layers]
        if not is_compiling() and all(map(_is_plain_linear, bases)):  # a compiler fuses what it is shown by itself
            frozen, biases = [base.weight for base in bases], [base.bias for base in bases]
            return kernels.branch_linears(x, frozen, biases, weights.a, weights.b, p)
        outputs = []
        for layer, base in zip(layers, bases, strict=True):
            a, (b,) = weights if len(layers) == 1 else self._part(weights, layer)
            output = base(x)
            seen = _is_watched(base)  # a hook may have kept the frozen output, which must stay as it is
            outputs.append(kernels.branch_delta(x, output, a.to(output.dtype), b.to(output.dtype), p, not seen))
        return outputs

    def _part(self, weights: BranchWeights, layer: LoraLayer) -> BranchWeights:
        index = self.layers.index(layer)
        return BranchWeights(weights.a.chunk(len(self.layers), dim=1)[index], (weights.b[index],))


def form_groups(layers: Iterable[tuple[nn.Module, str, LoraLayer]], adapter: str) -> dict[LoraLayer, LayerGroup]:
    """Puts layers that read the same input into one group, each other one into a group of its own.

    Args:
        layers: (parent, name in it, layer) of linear LoRA layers.
        adapter: name of an adapter that all have.

    Returns:
        the group of every layer.
    """
    families: dict[tuple[object, ...], list[tuple[int, LoraLayer]]] = {}
    for parent, name, layer in layers:
        family = next((names for names in _SIBLINGS if name in names), None)
        key: tuple[object, ...] = (layer,)
        if family is not None:
            dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
            key = (parent, family, layer.lora_A[adapter].weight.shape, layer.scaling[adapter], dropout)
        families.setdefault(key, []).append((family.index(name) if family else 0, layer))
    groups = {}
    for members in families.values():
        group = LayerGroup([layer for _, layer in sorted(members, key=lambda member: member[0])], adapter)
        groups |= dict.fromkeys(group.layers, group)
    return groups


def stack_weights(groups: Iterable[LayerGroup], names: Sequence[str]) -> None:
    """Gives groups the weights of the named branches for a pass; groups that are alike get theirs in a few launches.

    They come in the type that the frozen product computes in: autocast's, or the frozen weight's own. A group whose
    weights are not at hand stays without.
    """
    kinds: dict[tuple[object, ...], list[tuple[LayerGroup, list[list[tuple[Tensor, Tensor]]]]]] = {}
    for group in groups:
        masters = [group.masters(name) for name in names] if group.weights is None else [None]
        if None not in masters:
            base, master = group.layers[0].base_layer.weight, masters[0][0][0]
            dtype = _autocast_dtype(master.device.type) or (base if base.is_floating_point() else master).dtype
            kinds.setdefault((group.shapes, group.scaling, master.device, dtype), []).append((group, masters))
    for (_, scaling, _, dtype), alike in kinds.items():
        lora_a, lora_b = (
            [[[pair[side] for pair in branch] for branch in masters] for _, masters in alike] for side in (0, 1)
        )
        stacked = kernels.stack_branches(lora_a, lora_b, scaling, dtype)
        for (group, _), weights in zip(alike, stacked, strict=True):
            group.weights = weights


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_plain_linear(layer: nn.Module) -> bool:
    """A frozen `nn.Linear` itself, without hooks, whose product may be fused with the branches' deltas."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and not layer.weight.requires_grad
        and not _is_watched(layer)
    )


def _is_watched(layer: nn.Module) -> bool:
    """Whether somebody sees or changes what passes a layer: a hook of any kind, its own or one for all modules, or a
    forward put in the place of its own (accelerate's offloading)."""
    return compat.has_hooks(layer) or "forward" in layer.__dict__

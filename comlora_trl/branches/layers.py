"""The K-branch forward of PEFT's LoRA layers.

PEFT makes the layers and owns their parameters; `make_branch_layers` gives them a second way to run. While branches
compete, a layer's input holds the rows of several branches one after the other (branch-major), and each group of rows
must meet its own adapter. Plain linear LoRA does that with batched products, together with the layers that read the
same input ([`LayerGroup`]: q, k and v of an attention block, gate and up of an MLP). Any other kind (DoRA, embeddings,
convolutions, biased LoRA, experts' fused weights) runs PEFT's own forward branch by branch. Outside a pass the layer
is PEFT's, untouched.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import is_compiled_module
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.compiler import is_compiling

from comlora_trl import compat
from comlora_trl.branches import kernels
from comlora_trl.branches.kernels import BranchWeights
from comlora_trl.branches.kernels.ops import traceable_linears

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
        self.kept: tuple[Tensor, int, torch.dtype] | None = None
        self.broken = False
        self._traced: list[Tensor] | None = None
        self._waiting: tuple[Tensor, dict[LoraLayer, Tensor]] | None = None
        self._linears: dict[str, list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which never hold anything of a pass, nor another model's parameters."""
        return {**self.__dict__, "weights": None, "kept": None, "_waiting": None, "_traced": None, "_linears": {}}

    def drop(self, name: str) -> None:
        """Forgets a branch that is gone for good."""
        self._linears.pop(name, None)
        if self.adapter == name:
            self.adapter = next(other for other in self.layers[0].lora_A if other != name)

    def forget(self) -> None:
        """Forgets a pass that is over: its weights, and outputs that nobody asked for."""
        self.weights = self.kept = self._waiting = self._traced = None

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

    def traced_output(self, place: int, x: Tensor) -> Tensor:
        """[`output`] in a decoder layer that is compiled as one region, with weights that `kept` names.

        Args:
            place: the layer's place in the group; layers are called in that order, with the same x.
        """
        outputs = self._traced
        if place == 0:
            bases = [layer.base_layer for layer in self.layers]
            outputs = traceable_linears(x, [base.weight for base in bases], [base.bias for base in bases], *self.kept)
        # None once the last has been handed out: what is left in an attribute, a compiler has to keep
        self._traced = outputs if place < len(self.layers) - 1 else None
        return outputs[place]

    @property
    def is_plain(self) -> bool:
        """Whether nothing but plain linear products without dropout is computed here."""
        dropout = isinstance(self.dropout, nn.Dropout) and self.dropout.p > 0
        return not dropout and all(_is_plain_linear(layer.base_layer) for layer in self.layers)

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
            master = masters[0][0][0]
            dtype = compute_dtype(group, master)
            kinds.setdefault((group.shapes, group.scaling, master.device, dtype), []).append((group, masters))
    for (_, scaling, _, dtype), alike in kinds.items():
        lora_a, lora_b = (
            [[[pair[side] for pair in branch] for branch in masters] for _, masters in alike] for side in (0, 1)
        )
        stacked = kernels.stack_branches(lora_a, lora_b, scaling, dtype)
        for (group, _), weights in zip(alike, stacked, strict=True):
            group.weights = weights


def compute_dtype(group: LayerGroup, master: Tensor) -> torch.dtype:
    """The type that a group's frozen product computes in: autocast's, or the frozen weight's own."""
    base = group.layers[0].base_layer.weight
    return _autocast_dtype(master.device.type) or (base if base.is_floating_point() else master).dtype


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


# Groups whose weights are stacked together: those of some five decoder layers with the default targets
_GROUPS_AT_A_TIME = 16


class ActivePass(Protocol):
    """What the layers read of a pass ([`comlora_trl.branches.passes.Pass`]).

    Attributes:
        names: adapters whose rows are in the batch, in order, in equal shares.
        compiled: whether `torch.compile` runs the model.
        differentiable: whether gradients are wanted of the pass.
        weights: the groups' stacked weights, from its forward on.
        is_over: whether its backward has failed.
    """

    names: tuple[str, ...]
    compiled: bool
    differentiable: bool
    weights: list[tuple["LayerGroup", BranchWeights | None]] | None

    @property
    def is_over(self) -> bool: ...


class Replays(Protocol):
    """What the layers ask of graphs that replay them ([`comlora_trl.branches.graphs.LayerGraphs`])."""

    def begin(self, one: Any) -> None: ...

    def end(self) -> None: ...

    def forget_more_than(self, branches: int) -> None: ...


class CompetingBranches:
    """What the adapted layers of a model share: the pass that is active, if any, and their groups.

    Attributes:
        model: the base model.
        first: name in it of the first adapted layer.
        groups: the groups of layers with batched products, in the order they run.
        active: the pass whose forward or backward is running.
        names: adapter names of the branches whose rows are in the batch, in order; empty without a pass.
        branches: adapter names of all branches; what trains in them PEFT's switches leave as it was.
        graphs: replays decoder layers, None where they run as they are.
    """

    def __init__(self, model: nn.Module, first: str) -> None:
        self.model, self.first = model, first
        self.branches: tuple[str, ...] = ()
        self.groups: list[LayerGroup] = []
        self.active: ActivePass | None = None
        self.names: tuple[str, ...] = ()
        self.graphs: Replays | None = None

    def begin(self, one: ActivePass) -> None:
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
        elif self.graphs is not None:
            self.graphs.begin(one)

    def end(self, one: ActivePass) -> None:
        """Ends the forward or the backward of a pass; its weights are its own, for layers that run again."""
        if self.active is not one:
            return
        one.weights = [(group, group.weights) for group in self.groups]
        if self.graphs is not None:
            self.graphs.end()
        self.active, self.names = None, ()
        for group in self.groups:
            group.forget()

    def current(self) -> ActivePass | None:
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
        return {**self.__dict__, "active": None, "names": (), "graphs": None}

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
            layer.group, layer.place = LayerGroup([layer], group.adapter), 0
        return [layer.group for layer in group.layers]


# What a layer with branches has besides PEFT's
_OWN_ATTRIBUTES = ("competing", "group", "place", "_trained_when_on", "_trained_before_inference", "_merged_when_on")


class BranchRowsError(RuntimeError):
    """A layer got rows that can't be dealt out to the branches."""


class SwitchedOffError(RuntimeError):
    """Branches were asked to run while PEFT has switched their adapters off, or merged one into the base."""


class BranchLayer:
    """Mixin over a PEFT LoRA layer class: with competing branches, each group of rows meets its own adapter.

    PEFT's switches (`set_adapter`, `enable_adapters`, and all that is made of them, `disable_adapter()` say) let one
    adapter train at most. Here they leave what trains in each branch as they found it; while the adapters are switched
    off, or in inference mode, nothing trains, as in PEFT.
    """

    competing: CompetingBranches
    group: LayerGroup | None
    # What trained, by place, before the adapters were switched off, and before they were set to inference mode; and
    # which adapters were merged into the base when they were switched off
    _trained_when_on: dict[str, bool] | None = None
    _trained_before_inference: dict[str, bool] | None = None
    _merged_when_on: tuple[str, ...] = ()
    place: int  # in the group

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Copies and pickles by PEFT's class, for the layer's own is made at run time."""
        return _new_layer, (plain_class(self),), self.__dict__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.group is not None and self.group.kept is not None:
            return self.group.traced_output(self.place, x)
        names = self.competing.names
        if not names or self.competing.current() is None:
            return super().forward(x, *args, **kwargs)
        if x.size(0) % len(names):
            raise BranchRowsError(
                f"{type(self).__name__} got {x.size(0)} rows for {len(names)} branches, which can't all have the same "
                "number: run the branches one after the other (comlora_branch_chunk=1)."
            )
        if self.merged_adapters or self.disable_adapters:
            raise SwitchedOffError(self._why_off())
        if self.group is None or args or kwargs:
            return self.forward_one_by_one(x, names, *args, **kwargs)
        if self.group.weights is None:
            self.competing.stack_weights(self.group)
        if self.group.weights is None:  # sharded, wrapped or on their way (FSDP, ZeRO-3)
            return self.forward_one_by_one(x, names)
        return self.group.output(self, x)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Chooses the adapters of ordinary forwards; in inference mode nothing trains until one is chosen again."""
        found = self._trained_before_inference or self._trained()
        super().set_adapter(adapter_names, inference_mode)
        self._trained_before_inference = found if inference_mode else None
        off = inference_mode or self.disable_adapters
        self._let_train(dict.fromkeys(found, False) if off else found)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off; what trained before they were switched off trains again."""
        if not enabled:
            found = self._trained()
            super().enable_adapters(False)
            if self._trained_when_on is None:
                self._trained_when_on, self._merged_when_on = found, tuple(self.merged_adapters)
            return
        found, self._trained_when_on = self._trained_when_on, None
        merged, self._merged_when_on = self._merged_when_on, ()
        inference = self._trained_before_inference
        super().enable_adapters(True)
        if merged and not self.merged_adapters:  # a forward without adapters takes them out of the base
            self.merge(adapter_names=list(merged))
        if found is not None:
            self._let_train(found)
            self._trained_before_inference = inference

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's: what is asked for by name holds, whatever trained before."""
        self._trained_before_inference = None
        super().set_requires_grad(adapter_names, requires_grad)

    def _trained(self) -> dict[str, bool]:
        names = self.competing.branches
        return {place: p.requires_grad for name in names for place, p in layer_parameters(self, name)}

    def _let_train(self, trained: Mapping[str, bool]) -> None:
        for name in self.competing.branches:
            for place, parameter in layer_parameters(self, name):
                trains = trained.get(place, parameter.requires_grad)
                if parameter.is_leaf and parameter.requires_grad is not trains:
                    parameter.requires_grad_(trains)

    def _why_off(self) -> str:
        if self.merged_adapters:
            return (
                f"{self.merged_adapters[0]} is merged into the base model, which all branches share, so they can't "
                "run: call unmerge_adapter() first."
            )
        return (
            "the adapters are switched off (disable_adapter), so the branches can't run: call enable_adapter_layers() "
            "first, or leave the block."
        )

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
        layer.competing, layer.group, layer.place = competing, None, 0
        layer.__class__ = _branch_class(type(layer))
    places = ((*name.rpartition(".")[::2], layer) for name, layer in adapted.items())
    batched = [
        (model.get_submodule(parent), child, layer)
        for parent, child, layer in places
        if _has_batched_path(layer, adapter)
    ]
    for layer, group in form_groups(batched, adapter).items():
        layer.group, layer.place = group, group.layers.index(layer)
        if group not in competing.groups:
            competing.groups.append(group)
    return adapted, competing


def make_plain_layers(layers: Iterable[LoraLayer]) -> None:
    """Gives layers PEFT's own classes back."""
    for layer in layers:
        if isinstance(layer, BranchLayer):
            layer.__class__ = plain_class(layer)
            for own in (
                "competing",
                "group",
                "place",
                "_trained_when_on",
                "_trained_before_inference",
                "_merged_when_on",
            ):
                layer.__dict__.pop(own, None)


def layer_parameters(layer: LoraLayer, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """An adapter's parameters in a layer, by their places in it."""
    # a set: PEFT's DoRA layers name their magnitudes twice
    for kind in sorted({*layer.adapter_layer_names}):
        container = getattr(layer, kind)
        if name in container:
            part, place = container[name], f"{kind}.{name}"
            if isinstance(part, nn.Parameter):
                yield place, part
            else:
                yield from ((f"{place}.{own}", parameter) for own, parameter in part.named_parameters())


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

"""The K-branch forward of PEFT's LoRA layers.

PEFT makes the layers and owns their parameters. [`make_branch_layers`] gives them a second forward. In a pass over
several branches, a layer's input holds the rows of the branches one after the other (branch-major), and the rows of
each branch go through the adapter of that branch.

- Plain linear LoRA layers use batched products. Layers that read the same input are computed together in a
  [`LayerGroup`]: q, k and v of an attention block, gate and up of an MLP.
- All other layers (DoRA, embeddings, convolutions, LoRA with bias, fused weights of experts) run PEFT's own forward
  branch by branch.

Outside a pass, a layer runs PEFT's own forward.
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

# Names of layers that read the same input if they are children of one module, in the order of their calls
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


class LayerGroup:
    """Linear LoRA layers that read the same input and have the same rank, scaling and dropout; often a single layer.

    Args:
        layers: the layers, in the order of their calls.
        adapter: name of an adapter. All branches have the same settings as this one.

    Attributes:
        shapes: for each layer the shapes of A and B.
        weights: stacked weights of the branches of the active pass; None outside a pass, or if they can't be stacked.
        kept: while a layer is compiled for a CUDA graph, what [`traceable_linears`] needs to find the weights: number,
            n·r and dtype.
        broken: whether the layers turned out to read different inputs, so that the group must be split.
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
        """Leaves out everything that belongs to a pass or refers to parameters, for copies and pickles."""
        return {**self.__dict__, "weights": None, "kept": None, "_waiting": None, "_traced": None, "_linears": {}}

    def drop(self, name: str) -> None:
        """Forgets a branch that has been deleted."""
        self._linears.pop(name, None)
        if self.adapter == name:
            self.adapter = next(other for other in self.layers[0].lora_A if other != name)

    def forget(self) -> None:
        """Frees the weights and the remaining outputs of a pass that has ended."""
        self.weights = self.kept = self._waiting = self._traced = None

    def output(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """The output of one layer. The first call computes all layers of the group; the other outputs are kept until
        their layers are called with the same x.

        Args:
            layer: the layer.
            x: [K·B, ..., d], branch-major, for the K branches of `weights`.
        """
        if is_compiling():  # kept outputs are state, which the compiler does not allow under checkpointing
            return self._compute([layer], x, self._part(self.weights, layer))[0]
        source, waiting = self._waiting or (None, {})
        if source is x and layer in waiting:
            result = waiting.pop(layer)
            if not waiting:
                self._waiting = None
            return result
        if waiting:  # this layer got another input than its siblings, or a sibling was not called
            self.broken = True
            if layer in waiting:
                return self._compute([layer], x, self._part(self.weights, layer))[0]
        outputs = dict(zip(self.layers, self._compute(self.layers, x, self.weights), strict=True))
        result = outputs.pop(layer)
        self._waiting = (x, outputs) if outputs else None
        return result

    def traced_output(self, place: int, x: Tensor) -> Tensor:
        """[`output`] in a decoder layer that is compiled as a whole, with the weights that `kept` refers to.

        Args:
            place: the layer's index in the group. The layers must be called in this order and with the same x.
            x: as for [`output`].
        """
        outputs = self._traced
        if place == 0:
            bases = [layer.base_layer for layer in self.layers]
            outputs = traceable_linears(x, [base.weight for base in bases], [base.bias for base in bases], *self.kept)
        # None after the last layer: a compiler must keep whatever is left in an attribute
        self._traced = outputs if place < len(self.layers) - 1 else None
        return outputs[place]

    @property
    def is_plain(self) -> bool:
        """Whether the group only computes plain linear products, without dropout."""
        dropout = isinstance(self.dropout, nn.Dropout) and self.dropout.p > 0
        return not dropout and all(_is_plain_linear(layer.base_layer) for layer in self.layers)

    def masters(self, name: str) -> list[tuple[Tensor, Tensor]] | None:
        """The parameters A and B of a branch in each layer; None if they are wrapped or sharded (FSDP, ZeRO-3).

        The modules are looked up once and their weights are read without `__getattr__`, which is slow: a pass reads
        thousands of weights.
        """
        if name not in self._linears:
            pairs = [(layer.lora_A[name], layer.lora_B[name]) for layer in self.layers]
            if not all(type(linear) is nn.Linear for pair in pairs for linear in pair):
                return None  # a wrapper has replaced the module
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
        if not is_compiling() and all(map(_is_plain_linear, bases)):  # a compiler fuses the plain operations below
            frozen, biases = [base.weight for base in bases], [base.bias for base in bases]
            return kernels.branch_linears(x, frozen, biases, weights.a, weights.b, p)
        outputs = []
        for layer, base in zip(layers, bases, strict=True):
            a, (b,) = weights if len(layers) == 1 else self._part(weights, layer)
            output = base(x)
            seen = _is_watched(base)  # a hook may have kept the frozen output, which must not be overwritten then
            outputs.append(kernels.branch_delta(x, output, a.to(output.dtype), b.to(output.dtype), p, not seen))
        return outputs

    def _part(self, weights: BranchWeights, layer: LoraLayer) -> BranchWeights:
        index = self.layers.index(layer)
        return BranchWeights(weights.a.chunk(len(self.layers), dim=1)[index], (weights.b[index],))


def form_groups(layers: Iterable[tuple[nn.Module, str, LoraLayer]], adapter: str) -> dict[LoraLayer, LayerGroup]:
    """Puts layers that read the same input into one group, and each other layer into a group by itself.

    Args:
        layers: linear LoRA layers, as (parent module, name in the parent, layer).
        adapter: name of an adapter that all layers have.

    Returns:
        the group of each layer.
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
    """Stacks the weights of the named branches for a pass, and stores them in `group.weights`.

    The weights of groups with equal shapes are stacked together, in few kernel launches. The dtype is that of the
    frozen product, see [`compute_dtype`]. A group with sharded or wrapped weights gets none.
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
    """The dtype of a group's frozen product: that of autocast, or else that of the frozen weight."""
    base = group.layers[0].base_layer.weight
    return _autocast_dtype(master.device.type) or (base if base.is_floating_point() else master).dtype


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is a frozen `nn.Linear` without hooks, whose product may be fused with the branches' deltas."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and not layer.weight.requires_grad
        and not _is_watched(layer)
    )


def _is_watched(layer: nn.Module) -> bool:
    """Whether other code may see or change a layer's input or output: by a hook, or by a replaced forward, as
    accelerate's offloading does it."""
    return compat.has_hooks(layer) or "forward" in layer.__dict__


# Number of groups whose weights are stacked together: about five decoder layers with the default targets
_GROUPS_AT_A_TIME = 16


class ActivePass(Protocol):
    """The part of a pass that the layers read ([`comlora_trl.branches.passes.Pass`]).

    Attributes:
        names: the adapters whose rows are in the batch, in order and with equal shares.
        compiled: whether `torch.compile` runs the model.
        differentiable: whether the pass needs gradients.
        weights: the stacked weights of the groups; None before the forward has ended.
        is_over: whether the backward of the pass has failed.
    """

    names: tuple[str, ...]
    compiled: bool
    differentiable: bool
    weights: list[tuple["LayerGroup", BranchWeights | None]] | None

    @property
    def is_over(self) -> bool: ...


class Replays(Protocol):
    """The part of the CUDA graphs' interface that the layers use ([`comlora_trl.branches.graphs.LayerGraphs`])."""

    def begin(self, one: Any) -> None: ...

    def end(self) -> None: ...

    def forget_more_than(self, branches: int) -> None: ...


class CompetingBranches:
    """The state that all adapted layers of a model share: the active pass and the groups.

    Attributes:
        model: the base model.
        first: name of the first adapted layer in the base model.
        groups: the groups of layers with batched products, in the order in which they run.
        active: the pass whose forward or backward is running; None outside a pass.
        names: adapter names of the branches whose rows are in the batch, in order; empty outside a pass.
        branches: adapter names of all branches. PEFT's switches do not change which of their parameters train.
        graphs: replays decoder layers as CUDA graphs; None without graphs.
        switched_off: whether ordinary forwards run without adapters, whatever PEFT's own switch of a layer says.
    """

    def __init__(self, model: nn.Module, first: str) -> None:
        self.model, self.first = model, first
        self.switched_off = False
        self.branches: tuple[str, ...] = ()
        self.groups: list[LayerGroup] = []
        self.active: ActivePass | None = None
        self.names: tuple[str, ...] = ()
        self.graphs: Replays | None = None

    def begin(self, one: ActivePass) -> None:
        """Makes a pass active, at the start of its forward or of its backward."""
        self.abandon()
        self.active, self.names = one, one.names
        if one.weights is not None:
            for group, weights in one.weights:
                group.weights = weights
            return
        if any(group.broken for group in self.groups):
            self.groups = [one for group in self.groups for one in (self._alone(group) if group.broken else [group])]
        if one.compiled or self._compiled():
            # Stacked now, because a compiled layer that stacks its own weights would be compiled a second time
            stack_weights(self.groups, one.names)
        elif self.graphs is not None:
            self.graphs.begin(one)

    def end(self, one: ActivePass) -> None:
        """Ends the forward or the backward of a pass. The pass keeps its stacked weights for layers that run again."""
        if self.active is not one:
            return
        one.weights = [(group, group.weights) for group in self.groups]
        if self.graphs is not None:
            self.graphs.end()
        self.active, self.names = None, ()
        for group in self.groups:
            group.forget()

    def current(self) -> ActivePass | None:
        """The active pass. A pass whose backward has failed, for example out of memory, ends here."""
        if self.active is not None and not is_compiling() and self.active.is_over:
            self.abandon()
        return self.active

    def abandon(self) -> None:
        """Ends the active pass, if there is one."""
        if self.active is not None:
            self.end(self.active)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the active pass and the graphs, for copies and pickles."""
        return {**self.__dict__, "active": None, "names": (), "graphs": None}

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is on, so that layers run again during the backward pass."""
        newer = "is_activation_checkpointing"  # transformers has renamed this attribute
        name = newer if hasattr(self.model, newer) else "is_gradient_checkpointing"
        return bool(getattr(self.model, name, False))

    def stack_weights(self, group: LayerGroup) -> None:
        """Stacks and casts the weights of a group and of the groups after it.

        Stacking all groups at once would make the GPU wait at the start and at the end of a pass. Stacking each group
        separately would cost too many kernel launches.
        """
        first = self.groups.index(group)
        # A layer may run without gradients first and with them later, and both runs use the same stacked weights
        with torch.set_grad_enabled(self.active.differentiable):
            stack_weights(self.groups[first : first + _GROUPS_AT_A_TIME], self.names)

    def _compiled(self) -> bool:
        """Whether `torch.compile` runs a module that contains the first adapted layer."""
        module, compiled = self.model, False
        for part in self.first.split("."):
            # A module on which Module.compile() was called is not an OptimizedModule
            compiled = compiled or is_compiled_module(module) or compat.is_compiled_in_place(module)
            module = getattr(module, part)
        return compiled

    @staticmethod
    def _alone(group: LayerGroup) -> list[LayerGroup]:
        for layer in group.layers:
            layer.group, layer.place = LayerGroup([layer], group.adapter), 0
        return [layer.group for layer in group.layers]


_OF_ADAPTERS = ("adapter_names",)  # arguments of a forward that PEFT does not pass on to the base layer
# The attributes that a layer with branches has in addition to PEFT's
_OWN_ATTRIBUTES = ("competing", "group", "place", "_trained_when_on", "_trained_before_inference", "_merged_when_on")


class BranchRowsError(RuntimeError):
    """Raised if a layer gets a number of rows that can't be divided equally among the branches."""


class SwitchedOffError(RuntimeError):
    """Raised if branches shall run while PEFT's adapters are disabled, or one is merged into the base model."""


class BranchLayer:
    """Mixin for PEFT's LoRA layer classes. In a pass, the rows of each branch go through the adapter of that branch.

    PEFT's switches (`set_adapter`, `enable_adapters`, and methods that use them, such as `disable_adapter()`) let at
    most one adapter train. Here they do not change which parameters of a branch train. While the adapters are switched
    off or in inference mode, nothing trains, as in PEFT.

    Raises:
        BranchRowsError: in a forward, if the rows can't be divided equally among the branches.
        SwitchedOffError: in a forward over branches, if the adapters are disabled or merged.
    """

    competing: CompetingBranches
    group: LayerGroup | None
    # Which parameters trained before the adapters were switched off, and before inference mode was set
    _trained_when_on: dict[str, bool] | None = None
    _trained_before_inference: dict[str, bool] | None = None
    # Which adapters were merged into the base model when the adapters were switched off
    _merged_when_on: tuple[str, ...] = ()
    place: int  # index in the group

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Copies and pickles refer to PEFT's class, because the layer's own class is made at run time."""
        return _new_layer, (plain_class(self),), self.__dict__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.group is not None and self.group.kept is not None:
            return self.group.traced_output(self.place, x)
        names = self.competing.names
        if not names or self.competing.current() is None:
            if self.competing.switched_off:
                return self.base_layer(x, *args, **{k: v for k, v in kwargs.items() if k not in _OF_ADAPTERS})
            return super().forward(x, *args, **kwargs)
        if x.size(0) % len(names):
            raise BranchRowsError(
                f"{type(self).__name__} got {x.size(0)} rows for {len(names)} branches, which can't all have the same "
                "number: run the branches one after the other (comlora_branch_chunk=1)."
            )
        if self.merged_adapters or self.disable_adapters or self.competing.switched_off:
            raise SwitchedOffError(self._why_off())
        if self.group is None or args or kwargs:
            return self.forward_one_by_one(x, names, *args, **kwargs)
        if self.group.weights is None:
            self.competing.stack_weights(self.group)
        if self.group.weights is None:  # the weights are sharded or wrapped (FSDP, ZeRO-3)
            return self.forward_one_by_one(x, names)
        return self.group.output(self, x)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Sets the adapters of ordinary forwards. In inference mode nothing trains until adapters are set again."""
        found = self._trained_before_inference or self._trained()
        super().set_adapter(adapter_names, inference_mode)
        self._trained_before_inference = found if inference_mode else None
        off = inference_mode or self.disable_adapters
        self._let_train(dict.fromkeys(found, False) if off else found)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off. Switching on restores which parameters trained before."""
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
        if merged and not self.merged_adapters:  # PEFT unmerges adapters in a forward without adapters
            self.merge(adapter_names=list(merged))
        if found is not None:
            self._let_train(found)
            self._trained_before_inference = inference

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """PEFT's method. It decides which parameters train from now on, also after inference mode."""
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
        """Runs PEFT's own forward for each branch, with that branch as the active adapter.

        Arguments with as many rows as x, such as a router's choice of experts, are split among the branches like x.
        """
        competing, rows = self.competing, x.size(0) // len(names)
        own, all_names = self._active_adapter, competing.names
        outputs = []
        try:
            for branch, name in enumerate(names):
                part = lambda value, first=branch * rows: _rows_of(value, x.size(0), first, rows)
                # PEFT may nest wrappers of a module's parameters. An inner wrapper gets the rows of this branch only
                self._active_adapter, competing.names = [name], (name,)
                given = {key: part(value) for key, value in kwargs.items()}
                outputs.append(super().forward(part(x), *map(part, args), **given))
        finally:
            self._active_adapter, competing.names = own, all_names
        return _joined(outputs)


def _rows_of(value: Any, size: int, first: int, rows: int) -> Any:
    """The given rows of a tensor with `size` rows; any other value unchanged."""
    if size == rows or not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != size:
        return value
    return value[first : first + rows]


def _joined(outputs: list[Any]) -> Any:
    """Concatenates the outputs of the branches, which are tensors or tuples of tensors."""
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return tuple(map(_joined, map(list, zip(*outputs, strict=True))))
    return torch.cat(outputs)


def make_branch_layers(model: nn.Module, adapter: str) -> tuple[dict[str, LoraLayer], CompetingBranches]:
    """Gives every PEFT LoRA layer of a model the K-branch forward, in place.

    The class of each layer is replaced by a subclass with [`BranchLayer`] before PEFT's class. So this works for every
    class that PEFT chooses (plain, 4-bit, 8-bit, GPTQ, …), without repeating PEFT's choice.

    Args:
        model: the base model with the adapters of all branches.
        adapter: name of one of these adapters. All branches have the same settings as this one.

    Returns:
        the adapted layers by name, and the state that they share.

    Raises:
        ValueError: if the model has no LoRA layer.
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
    """Restores PEFT's classes of the layers."""
    for layer in layers:
        if isinstance(layer, BranchLayer):
            layer.__class__ = plain_class(layer)
            for own in _OWN_ATTRIBUTES:
                layer.__dict__.pop(own, None)


def layer_parameters(layer: LoraLayer, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of an adapter in a layer, with their names in the layer."""
    # A set, because PEFT's DoRA layers list their magnitudes twice
    for kind in sorted({*layer.adapter_layer_names}):
        container = getattr(layer, kind)
        if name in container:
            part, place = container[name], f"{kind}.{name}"
            if isinstance(part, nn.Parameter):
                yield place, part
            else:
                yield from ((f"{place}.{own}", parameter) for own, parameter in part.named_parameters())


def plain_class(layer: BranchLayer) -> type[LoraLayer]:
    """PEFT's original class of a layer."""
    return next(kind for kind, own in _BRANCH_CLASSES.items() if own is type(layer))


def _new_layer(kind: type[LoraLayer]) -> LoraLayer:
    own = _branch_class(kind)
    return own.__new__(own)


def _has_batched_path(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer is a plain linear LoRA layer, which the batched products can compute."""
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
        # PEFT's own name, because PEFT finds the wrapper of a parameter by the name of its class
        _BRANCH_CLASSES[layer_class] = type(layer_class.__name__, (BranchLayer, layer_class), {})
    return _BRANCH_CLASSES[layer_class]


_BRANCH_CLASSES: dict[type[LoraLayer], type[LoraLayer]] = {}

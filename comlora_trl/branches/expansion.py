"""The one place where B rows become K·B: the first decoder layer with an adapter, or else the model's inputs.

At the decoder layers the frozen layers below the first adapter, and the embeddings, run once on B rows and without
gradient. From there on every tensor with a batch dimension is repeated branch-major (all rows of branch 0, then all of
branch 1, …). Which tensors have one is learned from the layers' own arguments, in batches of two sizes
([`comlora_trl.branches.trial`]).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from comlora_trl.branches.layers import CompetingBranches

# Boundaries of a packed line's segments, as transformers names them: shifted from copy to copy, not repeated
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LAYERS, INPUTS, SEPARATELY = "at the first adapted layer", "at the inputs", "branch by branch"
PLACES = (LAYERS, INPUTS, SEPARATELY)

# A tensor's place among a layer's arguments: names and indices, outermost first
Path = tuple[str | int, ...]


def expand(value: Any, copies: int, rows: int, batched: frozenset[Path] | None = None, path: Path = ()) -> Any:
    """Repeats every tensor [rows, ...] of two or more dimensions `copies` times; containers element by element.

    Args:
        value: a tensor, a container of tensors, or anything else, which is returned as it is.
        copies: number of branches.
        rows: size of the batch dimension before the expansion.
        batched: places of the tensors with a batch dimension, None for all whose first dimension is `rows`.
        path: the value's own place.
    """
    if isinstance(value, Tensor):
        if path and path[-1] in _BOUNDARIES:
            starts = torch.arange(copies, device=value.device, dtype=value.dtype)[:, None] * value[-1]
            return torch.cat([value[:1], (value[1:] + starts).flatten()])
        # One dimension is a position or a length, whatever its size; a leading 1 broadcasts over the batch
        known = batched is None or path in batched
        if value.dim() < 2 or value.size(0) != rows or not known:
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))
    if isinstance(value, Mapping):
        return type(value)({key: expand(item, copies, rows, batched, (*path, key)) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(expand(item, copies, rows, batched, (*path, i)) for i, item in enumerate(value))
    return value


def tensors_of_size(value: Any, size: int, path: Path = ()) -> set[Path]:
    """Places of the tensors of two or more dimensions whose first is of a given size."""
    if isinstance(value, Tensor):
        return {path} if value.dim() > 1 and value.size(0) == size else set()
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif type(value) in (tuple, list):
        items = enumerate(value)
    return {place for key, item in items for place in tensors_of_size(item, size, (*path, key))}


class BranchExpansion:
    """Expands the batch where `place` says.

    Args:
        branches: the model's layers, which know the active pass.
        adapted: names of the adapted modules within the model.

    Attributes:
        place: one of `PLACES`.
        start: the first decoder layer with an adapter; None where adapters lie outside one stack of layers.
        layers: the decoder layers from there on.
        batched: places of the batched tensors among a layer's arguments, None before they are known.
        ignores_padding: whether the model computes the same without a mask over padding on the right.
    """

    def __init__(self, branches: CompetingBranches, adapted: list[str]) -> None:
        self.branches = branches
        self.batched: frozenset[Path] | None = None
        self.seen: set[Path] | None = None
        self.ignores_padding = False
        layers, self.start = _stack(branches.model, adapted)
        self.place = INPUTS if self.start is None else LAYERS
        self.layers = list(layers[self.start :])
        self._hooks = [
            layer.register_forward_pre_hook(self._expand_arguments, with_kwargs=True) for layer in layers[self.start :]
        ]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _expand_arguments(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        one = self.branches.current()
        if one is None or self.place != LAYERS:
            return None
        if self.seen is not None:
            self.seen |= tensors_of_size({**dict(enumerate(args)), **kwargs}, one.rows)
        if one.copies == 1:
            return None
        # Layers past the first get hidden states that are expanded already; their masks and positions are not
        positional = tuple(self._expand(value, index) for index, value in enumerate(args))
        return positional, {name: self._expand_once(name, kwargs[name]) for name in kwargs}

    def _expand_once(self, name: str, value: Any) -> Any:
        """Every layer gets the same masks and positions: they are expanded for the first one and kept for the pass."""
        if torch.compiler.is_compiling() or name == "hidden_states":
            return self._expand(value, name)
        known = self.branches.active.expanded
        if id(value) not in known:
            # with the value itself, whose id would otherwise be another's before long
            known[id(value)] = (value, self._expand(value, name))
        return known[id(value)][1]

    def _expand(self, value: Any, name: str | int) -> Any:
        one = self.branches.active
        return expand(value, one.copies, one.rows, self.batched, (name,))


def _stack(model: nn.Module, adapted: list[str]) -> tuple[nn.ModuleList, int | None]:
    """The list of layers that all adapted modules lie in, and the index of the first with one."""
    places = [_first_list(model, name) for name in adapted]
    lists = {id(place[0]) for place in places if place}
    if len(lists) != 1 or not all(places):
        return nn.ModuleList(), None
    return places[0][0], min(index for _, index in places)


def _first_list(model: nn.Module, name: str) -> tuple[nn.ModuleList, int] | None:
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            return module, int(part)
        module = getattr(module, part)
    return None

"""Where B rows become K·B: the batch is expanded at the first decoder layer that has an adapter.

The frozen layers below it, and the embeddings, run once on B rows and without gradient. From there on every tensor
with a batch dimension is repeated branch-major (all rows of branch 0, then all of branch 1, …).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LAYER_NAME = re.compile(r"^(.*?\.layers|.*?\.h|.*?\.blocks|.*?\.block)\.(\d+)\.")
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")


def expand(value: Any, copies: int, rows: int, name: str | None = None) -> Any:
    """Repeats every tensor [rows, ...] of two or more dimensions `copies` times; containers element by element.

    Args:
        value: a tensor, a container of tensors, or anything else, which is returned as it is.
        copies: number of branches.
        rows: size of the batch dimension before the expansion.
        name: the argument's name; packed boundaries (`cu_seq_lens_*`) are shifted from copy to copy, not repeated.
    """
    if isinstance(value, Tensor):
        if name in _BOUNDARIES:
            starts = torch.arange(copies, device=value.device, dtype=value.dtype)[:, None] * value[-1]
            return torch.cat([value[:1], (value[1:] + starts).flatten()])
        # One dimension is a position or a length, whatever its size; a leading 1 broadcasts over the batch
        batched = value.dim() > 1 and value.size(0) == rows
        return value.repeat(copies, *[1] * (value.dim() - 1)) if batched else value
    if isinstance(value, Mapping):
        return type(value)({key: expand(item, copies, rows, key) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(expand(item, copies, rows) for item in value)
    return value


class BranchExpansion:
    """Expands the batch inside the decoder, at the first layer with an adapter.

    Args:
        model: the base model, after PEFT put its adapters in.
        adapted: names of the adapted modules within it.

    With adapters outside a stack of decoder layers (on embeddings, say), or with flex attention, whose block masks
    can't be repeated, there is no such place: `start` is None and the caller expands the model's inputs instead.
    """

    def __init__(self, model: nn.Module, adapted: list[str]) -> None:
        self.copies = 1
        self.rows = 0
        self.start: int | None = None
        self._expanded: dict[int, tuple[Any, Any]] = {}
        matches = [_LAYER_NAME.match(name) for name in adapted]
        stacks = {match.group(1) for match in matches if match}
        flex = getattr(model.config, "_attn_implementation", None) == "flex_attention"
        if len(stacks) != 1 or not all(matches) or flex:
            return
        layers = model.get_submodule(stacks.pop())
        if not isinstance(layers, nn.ModuleList):
            return
        self.start = min(int(match.group(2)) for match in matches if match)
        for layer in layers[self.start :]:
            layer.register_forward_pre_hook(self._expand_arguments, with_kwargs=True)

    def begin(self, copies: int, rows: int) -> None:
        """Begins a pass with `copies` branches over a batch of `rows` lines."""
        self.copies, self.rows = copies, rows
        self._expanded.clear()

    def _expand_arguments(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.copies == 1:
            return None
        # Layers past the first get hidden states that are expanded already; their masks and positions are not
        return expand(args, self.copies, self.rows), {name: self._expand_once(name, kwargs[name]) for name in kwargs}

    def _expand_once(self, name: str, value: Any) -> Any:
        """Every layer gets the same masks and positions: they are expanded for the first one and kept for the pass."""
        if torch.compiler.is_compiling() or name == "hidden_states":
            return expand(value, self.copies, self.rows, name)
        if id(value) not in self._expanded:
            # with the value itself, whose id would otherwise be another's before long
            self._expanded[id(value)] = (value, expand(value, self.copies, self.rows, name))
        return self._expanded[id(value)][1]

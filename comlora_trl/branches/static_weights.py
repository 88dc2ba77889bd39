"""The stacked weights of K branches at fixed memory addresses, for CUDA graphs that read them.

A pass copies PEFT's parameters into this memory, a few layers at a time, with few kernel launches. The graphs write
the gradients into fixed memory too, and the backward pass hands these to the parameters. For autograd the copying is a
differentiable function of the parameters, so DDP, gradient accumulation and `torch.autograd.grad` work as usual.

In shapes, n is the number of layers in a group (layers that read the same input), r the rank, d the input width and
l_i the output width of layer i.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comlora_trl import compat
from comlora_trl.branches.kernels.ops import KeptWeights, keep_weights
from comlora_trl.branches.layers import LayerGroup, compute_dtype

# Number of decoder layers that are filled together. If all were, the GPU would wait long for the first layer's weights
_LAYERS_AT_A_TIME = 6


class StaticWeights:
    """The weights of K branches on all groups of adapted layers.

    Attributes:
        k: number of branches, K.
        groups: for each decoder layer its groups, in the order of its modules.
        sections: the decoder layers in sections that are filled together.
    """

    def __init__(self, k: int, groups: list[list[LayerGroup]], sections: "list[_Section]") -> None:
        self.k, self.groups, self.sections = k, groups, sections
        self._section_of = [section for section in sections for _ in section.layers]
        self._parameters: dict[tuple[str, ...], list[tuple[dict[str, Any], nn.Parameter]]] = {}

    @classmethod
    def of(
        cls, groups: Sequence[LayerGroup], layers: Sequence[nn.Module], names: tuple[str, ...]
    ) -> "StaticWeights | None":
        """Allocates the memory for the weights of the named branches.

        Returns:
            None if an adapted layer is in no group, or if a group lies outside the decoder layers or its weights can't
            be read.
        """
        known = {id(layer): group for group in groups for layer in group.layers}
        by_layer = []
        for layer in layers:
            adapted = [module for module in layer.modules() if hasattr(module, "group") and hasattr(module, "lora_A")]
            if any(id(module) not in known for module in adapted):
                return None
            own = list(dict.fromkeys(known[id(module)] for module in adapted))
            by_layer.append(own)
        if sum(map(len, by_layer)) != len(groups) or any(
            group.masters(name) is None for group in groups for name in names
        ):
            return None
        k = len(names)
        places = range(0, len(layers), _LAYERS_AT_A_TIME)
        cut = [list(range(first, min(first + _LAYERS_AT_A_TIME, len(layers)))) for first in places]
        return cls(k, by_layer, [_Section(k, own, [by_layer[index] for index in own], names) for own in cut])

    def of_layer(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of a decoder layer, and the memory for their gradients.

        Both are lists with A, [K·n·r, d], and then n matrices B, [K·l_i, r], for each group.
        """
        section = self._section_of[index]
        first, last = section.range_of(index)
        return section.weights[first:last], section.grads[first:last]

    def kept(self, index: int) -> list[KeptWeights]:
        """The weights of a decoder layer's groups in the form that the custom operators look up."""
        return self._section_of[index]._kept_of[index]

    def begin(self, names: tuple[str, ...]) -> "LayerWeights | None":
        """The weights for a pass over the named branches. They are filled when layers ask for them.

        Returns:
            None if parameters are wrapped, or have been replaced since the last pass.
        """
        if not self._is_current(names):
            return None
        return LayerWeights(self, names)

    @torch.no_grad()
    def fill(self, names: tuple[str, ...]) -> None:
        """Fills all sections with the weights of the named branches, outside autograd."""
        for section in self.sections:
            section.fill(section.parameters(names))

    def forget(self) -> None:
        """Clears the cached parameters, so that those of dropped branches can be freed."""
        self._parameters = {}
        for section in self.sections:
            section.forget()

    def _is_current(self, names: tuple[str, ...]) -> bool:
        """Whether the parameters are the same objects as before. A wrapper around the model may replace them."""
        known = self._parameters.get(names)
        if known is None:
            known = [pair for section in self.sections for pair in section.containers(names)]
            if any(type(parameter) is not nn.Parameter for _, parameter in known):
                return False
            self._parameters[names] = known
        if all(container["weight"] is parameter for container, parameter in known):
            return True
        self.forget()
        return False


class LayerWeights:
    """The weights of one pass: tensors in the fixed memory that belong to the pass's autograd graph."""

    def __init__(self, weights: StaticWeights, names: tuple[str, ...]) -> None:
        self._weights, self._names = weights, names
        self._filled: dict[int, tuple[Tensor, ...]] = {}

    def of_layer(self, index: int) -> Sequence[Tensor]:
        """The weights of a decoder layer, see [`StaticWeights.of_layer`]."""
        section = self._weights._section_of[index]
        key = section.layers[0]
        if key not in self._filled:
            self._filled[key] = _Fill.apply(section, *section.parameters(self._names)) if section.kinds else ()
        first, last = section.range_of(index)
        return self._filled[key][first:last]


class _Kind:
    """G groups of equal shapes and scaling, whose matrices are stacked in one launch.

    Attributes:
        places: indices of these groups among the section's groups.
        a, b: the stacked weights, [G, K·n·r, d] and n of [G, K·l_i, r].
        grad_a, grad_b: the gradients, of the same shapes.
    """

    def __init__(self, k: int, groups: list[LayerGroup], places: list[int], names: tuple[str, ...]) -> None:
        self.k, self.groups, self.places = k, groups, places
        first = groups[0]
        self.scaling, self.n = first.scaling, len(first.layers)
        master = first.masters(names[0])[0][0]
        dtype = compute_dtype(first, master)
        (self.rank, width), count = first.shapes[0][0], len(groups)
        make = lambda rows, columns, own=dtype: torch.empty(count, rows, columns, dtype=own, device=master.device)
        heights = [shape[0] for _, shape in first.shapes]
        self.a, self.grad_a = (make(k * self.n * self.rank, width) for _ in range(2))
        self.b, self.grad_b = ([make(k * height, self.rank) for height in heights] for _ in range(2))
        self.masters_dtype = master.dtype
        self.staging = []
        if master.dtype != dtype:
            self.staging = [torch.empty_like(one, dtype=master.dtype) for one in (self.a, *self.b)]

    @property
    def stacks(self) -> list[Tensor]:
        """A and the n matrices B."""
        return [self.a, *self.b]

    def fill(self, matrices: Sequence[Sequence[Tensor]]) -> None:
        """Fills A and each B.

        Args:
            matrices: 1 + n lists, of A and of each B: the matrices of the branches, group by group.
        """
        for index, (stack, own) in enumerate(zip(self.stacks, matrices, strict=True)):
            target = self.staging[index] if self.staging else stack
            torch.stack(own, out=target.view(len(own), *own[0].shape))
            scaling = self.scaling if index == 0 else 1
            if self.staging:
                # Scaled in the dtype of the parameters, so that the result is rounded only once
                torch.mul(target, scaling, out=stack) if scaling != 1 else stack.copy_(target)
            elif scaling != 1:
                stack.mul_(scaling)

    def gradients(self) -> list[Sequence[Tensor]]:
        """The gradients of the matrices as copies, in 1 + n lists in the order of [`fill`]."""
        found = []
        for index, grad in enumerate((self.grad_a, *self.grad_b)):
            scaling = self.scaling if index == 0 else 1
            grad = grad.to(self.masters_dtype, copy=True)
            grad = grad if scaling == 1 else grad.mul_(scaling)
            height = self.rank if index == 0 else grad.size(1) // self.k
            found.append(grad.view(-1, height, grad.size(-1)).unbind())
        return found


class _Section:
    """The weights of some consecutive decoder layers.

    Attributes:
        layers: indices of the decoder layers.
        weights, grads: for each group its A and then its matrices B, in the order of the layers.
    """

    def __init__(self, k: int, layers: list[int], groups: list[list[LayerGroup]], names: tuple[str, ...]) -> None:
        self.layers, self.groups = layers, [group for own in groups for group in own]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, group in enumerate(self.groups):
            alike.setdefault((group.shapes, group.scaling), []).append(place)
        self.kinds = [_Kind(k, [self.groups[place] for place in own], own, names) for own in alike.values()]
        weights: list[list[Tensor]] = [[] for _ in self.groups]
        grads: list[list[Tensor]] = [[] for _ in self.groups]
        for kind in self.kinds:
            for row, place in enumerate(kind.places):
                weights[place] = [kind.a[row], *(b[row] for b in kind.b)]
                grads[place] = [kind.grad_a[row], *(b[row] for b in kind.grad_b)]
        self.kept = [keep_weights(_kept(k, *both)) for both in zip(weights, grads, strict=True)]
        self.weights, self.grads = ([one for own in both for one in own] for both in (weights, grads))
        ends, self._ranges, self._kept_of = 0, {}, {}
        for layer, own in zip(layers, groups, strict=True):
            first = sum(map(len, groups[: layers.index(layer)]))
            self._kept_of[layer] = self.kept[first : first + len(own)]
        for layer, own in zip(layers, groups, strict=True):
            size = sum(1 + len(group.layers) for group in own)
            self._ranges[layer] = (ends, ends + size)
            ends += size
        self._known: dict[tuple[str, ...], list[Tensor]] = {}

    def range_of(self, layer: int) -> tuple[int, int]:
        """The first and the last index (exclusive) of a layer's weights in `weights`."""
        return self._ranges[layer]

    def containers(self, names: tuple[str, ...]) -> list[tuple[dict[str, Any], nn.Parameter]]:
        """The parameters of the named branches in the order of [`fill`], each with the dict of its module."""
        found = []
        for kind in self.kinds:
            linears = {
                id(group): [[(layer.lora_A[name], layer.lora_B[name]) for layer in group.layers] for name in names]
                for group in kind.groups
            }
            own = [linears[id(group)] for group in kind.groups]
            modules = [pair[0] for group in own for branch in group for pair in branch]
            for index in range(kind.n):
                modules += [branch[index][1] for group in own for branch in group]
            found += [(compat.parameters_of(module), compat.parameters_of(module)["weight"]) for module in modules]
        return found

    def parameters(self, names: tuple[str, ...]) -> list[Tensor]:
        """The parameters of the named branches, in the order of [`fill`]."""
        if names not in self._known:
            self._known[names] = [parameter for _, parameter in self.containers(names)]
        return self._known[names]

    def forget(self) -> None:
        """Clears the cached parameters."""
        self._known = {}

    def fill(self, parameters: Sequence[Tensor]) -> None:
        """Fills the weights of all groups from the parameters, in the order of [`parameters`]."""
        for kind, matrices in self._by_kind(parameters):
            kind.fill(matrices)

    def gradients(self) -> Iterable[Tensor]:
        """The gradients of the parameters, in the order of [`parameters`]."""
        for kind in self.kinds:
            for own in kind.gradients():
                yield from own

    def _by_kind(self, parameters: Sequence[Tensor]) -> Iterable[tuple[_Kind, list[Sequence[Tensor]]]]:
        first = 0
        for kind in self.kinds:
            matrices = []
            for size in (len(kind.groups) * kind.k * kind.n, *[len(kind.groups) * kind.k] * kind.n):
                matrices.append(parameters[first : first + size])
                first += size
            yield kind, matrices


def _kept(k: int, weights: list[Tensor], grads: list[Tensor]) -> KeptWeights:
    """A group's weights and gradients, viewed by branch."""
    (a, *b), (grad_a, *grad_b) = ([one.view(k, -1, one.size(-1)) for one in own] for own in (weights, grads))
    return KeptWeights(a, b, grad_a, grad_b)


class _Fill(torch.autograd.Function):
    """The autograd function from the parameters to a section's weights."""

    @staticmethod
    def forward(ctx: Any, section: _Section, *parameters: Tensor) -> tuple[Tensor, ...]:
        section.fill(parameters)
        ctx.section = section
        ctx.set_materialize_grads(False)
        return tuple(weight.detach() for weight in section.weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        section = ctx.section
        for grad, own in zip(grads, section.grads, strict=True):
            if grad is None:  # this layer did not run as a graph in the pass
                own.zero_()
            elif grad.data_ptr() != own.data_ptr():
                own.copy_(grad)
        return None, *section.gradients()

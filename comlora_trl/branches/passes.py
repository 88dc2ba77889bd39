"""A pass: one run of the base model over some branches, from its forward's beginning to its backward's end.

Which branches run, how often the batch is repeated, stacked weights, outputs that wait: all of it belongs to a
[`Pass`]. Outside its forward and its backward the layers are PEFT's own, whoever calls them.

- [`BranchExpansion`] is the one place where B rows become K·B: the first decoder layer with an adapter, or else the
  model's inputs.
- [`run_batched`] runs all branches at once, [`run_in_chunks`] each chunk forward and backward before the next,
  [`run_dealt`] each line through one branch. They give the same losses and gradients: the row weights are known before
  the language model runs, so that no graph has to be kept across branches.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from comlora_trl import compat
from comlora_trl.branches.batches import Rows, deal, indices
from comlora_trl.branches.layers import CompetingBranches


class RunsBranches(Protocol):
    """What a pass reads of the model ([`comlora_trl.branches.model.BranchModel`])."""

    branch_names: list[str]
    competing: CompetingBranches
    expansion: "BranchExpansion"

    def get_base_model(self) -> PreTrainedModel: ...

    def branch_parameters(self, branch: int) -> list[nn.Parameter]: ...


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
        branches: CompetingBranches,
        names: tuple[str, ...],
        copies: int,
        rows: int,
        inputs_are_wide: bool = False,
        compiled: bool = False,
    ) -> None:
        self.branches, self.names, self.copies, self.rows = branches, names, copies, rows
        self.inputs_are_wide, self.compiled = inputs_are_wide, compiled
        self.differentiable = torch.is_grad_enabled()
        self.weights: list[tuple[Any, Any]] | None = None
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
        if active is not None and active._backward == compat.running_backward() and self._runs_like(active):
            return  # layers that run again find the same branches, weights and rows
        if active is not None and self.branches.checkpointing:
            raise RuntimeError(
                "one backward pass runs through two passes of other branches or rows, which gradient checkpointing "
                "can't tell apart: call backward() after each forward, or switch gradient checkpointing off."
            )
        self.branches.begin(self)
        self._backward = compat.running_backward()
        compat.at_the_end_of_backward(lambda: self.branches.end(self))

    def _runs_like(self, other: "Pass") -> bool:
        kind = lambda one: (one.names, one.copies, one.rows, one.inputs_are_wide, one.compiled)
        return kind(self) == kind(other)

    @property
    def is_over(self) -> bool:
        """Whether the backward that the pass became active for has failed, so that its end was never announced."""
        return self._backward is not None and self._backward != compat.running_backward()


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


def keep_router_logits(output: Any, one: Pass) -> None:
    """The pass keeps the routers' logits of all branches, from the backbone's output.

    Where the batch widened inside the backbone the first branch's alone go on to the LM head, whose own loss would not
    fit them to the attention mask of one.
    """
    logits = getattr(output, "router_logits", None)
    if not logits:
        return
    one.router_logits = tuple(logits)
    if one.copies > 1 and not one.inputs_are_wide:
        tokens = max(layer.size(0) for layer in logits) // one.copies
        output.router_logits = tuple(layer[:tokens] for layer in logits)


def router_losses(model: PreTrainedModel, one: Pass, inputs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of each of the pass's n branches, [n], or None for a model without routers.

    Args:
        inputs: the batch before it was widened.
    """
    logits, one.router_logits = one.router_logits, None
    if logits is None:
        return None
    config, branches = model.config.get_text_config(), len(one.names)
    masks = [inputs.get("attention_mask")] * branches
    if one.copies < branches and masks[0] is not None:
        masks = masks[0].chunk(branches)  # rows dealt out among the branches
    wide = max(layer.size(0) for layer in logits)
    # Layers below the first adapter run once for all branches
    by_branch = [layer.chunk(branches) if layer.size(0) == wide else [layer] * branches for layer in logits]
    losses = [
        load_balancing_loss_func(tuple(own), config.num_experts, config.num_experts_per_tok, mask)
        for *own, mask in zip(*by_branch, masks, strict=True)
    ]
    return torch.stack(losses)


# Batches are padded to multiples of this length on a GPU, so that lengths, and with them graphs and plans, are few
LENGTHS = 64
# Up to this length another kernel than cuDNN's computes attention: cuDNN builds a plan for each new shape, which takes
# seconds, and attention over short rows is a small part of a step
_LONGEST_WITHOUT_PLANS = 1024


@contextmanager
def without_plans(tokens: Tensor) -> Iterator[None]:
    """Inside, PyTorch's attention leaves cuDNN out where its plans cost more than they gain.

    Args:
        tokens: the batch, [B, T].
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    if not (enabled and tokens.is_cuda and tokens.size(1) <= _LONGEST_WITHOUT_PLANS):
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def is_padded_right(mask: Tensor | None) -> bool:
    """Whether a mask [B, T] has its padding behind each row's tokens, if it has any."""
    if mask is None or mask.dim() != 2:
        return False
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


_PER_TOKEN = ("entropy", "is_top1", "label_mask")


def run_batched(
    model: RunsBranches,
    inputs: dict[str, Any],
    rows: Rows,
    weights: Tensor,
    branches: Sequence[int],
    compiled: bool,
    dealt: bool = False,
) -> dict[str, Tensor]:
    """Runs branches in one forward of the base model.

    Args:
        inputs: the batch, [B, T] tensors and flags for TRL's fused LM head.
        rows: the batch's rows.
        weights: w[k, b], [n, R] for the n branches that run; [1, R] for rows that are dealt out.
        branches: their indices.
        compiled: whether `torch.compile` runs the model.
        dealt: whether the batch's lines are dealt out among the branches, instead of repeated for each.

    Returns:
        fields of [`BranchOutput`], `nll` like the weights and `aux_loss` [n].
    """
    lines = inputs["input_ids"].size(0)
    names = tuple(model.branch_names[branch] for branch in branches)
    copies, base = 1 if dealt else len(branches), model.get_base_model()
    at_inputs = model.expansion.place != LAYERS
    widened = dict(inputs)
    if copies == 1:
        pass
    elif at_inputs:
        widened = {name: expand(value, copies, lines, None, (name,)) for name, value in inputs.items()}
    else:
        # The labels meet the hidden states after the decoder layers, where the batch is expanded already
        widened["labels"] = expand(inputs["labels"], copies, lines)
    if model.expansion.ignores_padding and is_padded_right(inputs.get("attention_mask")):
        widened["attention_mask"] = None  # causal attention by itself keeps padding out of what comes before it
    with without_plans(inputs["input_ids"]), Pass(model.competing, names, copies, lines, at_inputs, compiled) as one:
        output = base(**widened)
        losses = router_losses(base, one, inputs)
    one.resume_in_backward(output.log_probs, losses)
    weighted, nll = _weigh(output.log_probs, rows, weights)
    result = {"log_probs": weighted, "nll": nll, "aux_loss": losses}
    per_token = {name: value for name in _PER_TOKEN if (value := getattr(output, name)) is not None}
    if not torch.is_grad_enabled() and "is_top1" in per_token:  # not every trainer of TRL's asks for it
        by_branch = output.is_top1.view(len(weights), -1, output.is_top1.size(-1))
        result["correct"] = rows.sum(by_branch.to(nll.dtype))
    return result | per_token


def run_in_chunks(
    model: RunsBranches,
    inputs: dict[str, Any],
    rows: Rows,
    weights: Tensor,
    branches: Sequence[int],
    chunk: int,
    compiled: bool,
) -> dict[str, Tensor]:
    """Runs `chunk` branches at a time, each chunk forward and backward before the next; see [`run_batched`].

    The log-probabilities come back as one weighted sum, whose backward hands out the gradients found already.
    """
    chunks = _Chunks(model)
    for first in range(0, len(branches), chunk):
        own = branches[first : first + chunk]
        chunks.add(run_batched(model, inputs, rows, weights[first : first + chunk], own, compiled), own)
    return chunks.result()


def run_dealt(
    model: RunsBranches,
    inputs: dict[str, Any],
    rows: Rows,
    weights: Tensor,
    owners: Sequence[int],
    rows_per_line: Sequence[int] | None,
    router_weights: Tensor | None,
    chunk: int,
    compiled: bool,
) -> dict[str, Tensor]:
    """Runs each line of a batch through one branch; see [`run_batched`].

    Args:
        weights: [K, R], of which a row's weight under its own branch counts.
        owners, rows_per_line: as for [`deal`].
        router_weights: [K], of the branches' load-balancing losses.

    Returns:
        as [`run_batched`]; `nll` [K, R], zero where a row has not run, and `ran`, bool [K, R].
    """
    running = sorted(set(owners))
    chunks, parts = _Chunks(model), [running[first : first + chunk] for first in range(0, len(running), chunk)]
    nll: Tensor | None = None
    ran = torch.zeros_like(weights, dtype=torch.bool)
    for part in parts:
        dealt = deal(inputs, rows, [owner if owner in part else -1 for owner in owners], rows_per_line)
        real = [place for place, row in enumerate(dealt.source) if row >= 0]
        place, owner, row = (
            indices(values, weights.device)
            for values in (real, [dealt.owner[i] for i in real], [dealt.source[i] for i in real])
        )
        weight = weights.new_zeros(1, len(dealt.source))
        weight[0, place] = weights[owner, row]
        piece = run_batched(model, dealt.inputs, Rows.of(dealt.inputs), weight, dealt.branches, compiled, dealt=True)
        if router_weights is not None and piece["aux_loss"] is not None:
            # the caller takes the mean over those that run
            piece["aux_loss"] = piece["aux_loss"] * len(running) * router_weights[list(dealt.branches)].to(weights)
        own = piece.pop("nll")
        nll = own.new_zeros(weights.shape) if nll is None else nll
        nll[owner, row] = own[0, place]
        ran[owner, row] = True
        if len(parts) == 1:
            return {"nll": nll, "ran": ran, **piece}
        # Chunks differ in length: only sums over their tokens are read
        chunks.add({name: value.flatten() if name in _PER_TOKEN else value for name, value in piece.items()}, part)
    return {"nll": nll, "ran": ran, **chunks.result()}


class _Chunks:
    """The outputs of chunks, each one's backward done before the next runs."""

    def __init__(self, model: RunsBranches) -> None:
        self.model = model
        self.pieces: list[dict[str, Tensor]] = []
        self.routers: list[Tensor] = []
        self.log_probs, self.aux_loss = _Found(), _Found()

    def add(self, piece: dict[str, Tensor], branches: Sequence[int]) -> None:
        """Takes the output of [`run_batched`] over some branches, and their gradients out of it."""
        parameters = list(_trainable(self.model, branches)) if torch.is_grad_enabled() else []
        router = piece.pop("aux_loss")
        self.log_probs.add(piece.pop("log_probs").sum(), parameters, again=router is not None)
        if router is not None:
            self.aux_loss.add(router.sum(), parameters)
            self.routers.append(router.detach())
        self.pieces.append({name: value.detach() for name, value in piece.items()})

    def result(self) -> dict[str, Tensor]:
        """All chunks as one output."""
        result = {name: torch.cat([piece[name] for piece in self.pieces]) for name in self.pieces[0]}
        router = None
        if self.routers:
            # each branch's own value, and the gradient of their sum, which the caller takes a mean of
            router, total = torch.cat(self.routers), self.aux_loss.with_gradients()
            router = router + (total - total.detach()) / len(router)
        return {"log_probs": self.log_probs.with_gradients(), "aux_loss": router, **result}


class _Found:
    """A sum, and its gradients as far as they are known."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.parameters: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def add(self, value: Tensor, parameters: list[Tensor], again: bool = False) -> None:
        self.total = self.total + value.detach()
        if parameters:
            found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=again)
            self.parameters += parameters
            self.gradients += [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def with_gradients(self) -> Tensor:
        return known_gradients(self.total, self.parameters, self.gradients)


def known_gradients(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar without a graph that hands out these gradients of these parameters in its backward."""
    return _KnownGradients.apply(value, len(parameters), *parameters, *gradients) if parameters else value


def _weigh(log_probs: Tensor, rows: Rows, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n·B, T−1] times their row's weight [n, R], and the rows' S [n, R] without gradient."""
    branches = weights.size(0)
    by_branch = log_probs.view(branches, -1, log_probs.size(-1))
    nll = -rows.sum(by_branch.detach())
    weight = weights[:, rows.index[:, 1:]].to(log_probs.dtype)
    # Selected, not multiplied: a diverged branch's nan stays out of the sum and of its own gradient
    usable = (weight != 0) & by_branch.detach().isfinite()
    weighted = torch.where(usable, by_branch, torch.zeros_like(by_branch)) * weight
    return weighted.view_as(log_probs), nll


def _trainable(model: RunsBranches, branches: Sequence[int]) -> Iterator[Tensor]:
    for branch in branches:
        yield from (p for p in model.branch_parameters(branch) if p.requires_grad)


def touch(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The value, with parameters that it does not depend on in its graph: DDP waits for every one of them."""
    if not (parameters and value.requires_grad and _is_distributed()):
        return value  # a leaf costs the host 5 µs, and a model has hundreds
    return _Touched.apply(value, *parameters)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_whole(parameter: Tensor) -> bool:
    """Whether a process holds a parameter whole and by itself, as under DDP, and not in shards (FSDP, DeepSpeed).

    Those who shard ask for no gradient of what has not run, and DeepSpeed fails on one that is missing.
    """
    marks = ("ds_id", "_hp_mapping", "_fsdp_flattened")
    return type(parameter) is nn.Parameter and not any(hasattr(parameter, mark) for mark in marks)


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients with respect to some parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients = tensors[count:]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * grad_output.to(gradient.dtype) for gradient in ctx.gradients]
        return (None, None, *gradients, *[None] * len(gradients))


class _Touched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, *[None] * ctx.count

"""A pass: one run of the base model over some branches, from the start of the forward to the end of the backward.

A [`Pass`] holds everything that belongs to one run: the branches that run, the number of copies of the batch, the
stacked weights. Outside the forward and the backward of a pass, the adapted layers run PEFT's own forward.

- [`BranchExpansion`] repeats the batch, so that B rows become K·B rows: before the first decoder layer with an
  adapter, or else at the model's inputs.
- [`run_batched`] runs all branches at once.
- [`run_in_chunks`] runs the branches in chunks, each chunk forward and backward before the next.
- [`run_dealt`] runs each line of the batch through one branch.

Running in chunks gives the same losses and gradients as running all branches at once. This is possible because the
weights of the rows are known before the language model runs.
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
    """The part of the model that a pass uses ([`comlora_trl.branches.model.BranchModel`])."""

    branch_names: list[str]
    competing: CompetingBranches
    expansion: "BranchExpansion"

    def get_base_model(self) -> PreTrainedModel: ...

    def branch_parameters(self, branch: int) -> list[nn.Parameter]: ...


class Pass:
    """One run over the named branches; a context manager around the forward.

    Gradient checkpointing runs layers again during the backward pass, and these layers need the same branches and
    weights as in the forward. After [`resume_in_backward`], the pass is active again during the backward.

    Args:
        branches: the state that the adapted layers share.
        names: the adapters whose rows are in the batch, in order and with equal shares.
        copies: number of copies of the batch; 1 if its lines are distributed among the branches already.
        rows: number of lines in the batch before it is repeated.
        inputs_are_wide: whether the batch is repeated at the model's inputs, and not before the first adapted layer.
        compiled: whether `torch.compile` runs the model.

    Attributes:
        differentiable: whether the pass needs gradients. A model may still run some of its layers without gradients.
        weights: stacked weights of the groups, from the end of the forward on.
        expanded: repeated arguments of the decoder layers, by the id of the original.
        router_logits: router logits of all branches; None for a model without routers.
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
        """Makes the pass active during the backward passes that start from these outputs."""
        for output in outputs:
            if output is not None and output.requires_grad:
                output.register_hook(self._resume)

    def _resume(self, _: Tensor) -> None:
        active = self.branches.current()
        if active is self:
            return  # the gradient of another output came first
        if active is not None and active._backward == compat.running_backward() and self._runs_like(active):
            return  # layers that run again find the same branches, weights and number of rows
        if active is not None and self.branches.checkpointing:
            raise RuntimeError(
                "one backward runs through two passes with different branches or rows, which gradient checkpointing "
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
        """Whether the backward of the pass has failed, so that the pass was not ended at its end."""
        return self._backward is not None and self._backward != compat.running_backward()


# transformers' names for the boundaries of a packed line's segments. They are shifted for each copy and not repeated
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LAYERS, INPUTS, SEPARATELY = "at the first adapted layer", "at the inputs", "branch by branch"
PLACES = (LAYERS, INPUTS, SEPARATELY)

# The position of a tensor among a layer's arguments: names and indices, the outermost first
Path = tuple[str | int, ...]


def expand(value: Any, copies: int, rows: int, batched: frozenset[Path] | None = None, path: Path = ()) -> Any:
    """Repeats tensors along the batch dimension: [rows, ...] becomes [copies·rows, ...].

    Tensors with one dimension, and those with another first dimension, are returned unchanged. The boundaries of
    packed segments (`cu_seq_lens_q`, `cu_seq_lens_k`) are extended for the copies.

    Args:
        value: a tensor, a mapping, tuple or list, whose items are treated one by one, or any other value, which is
            returned unchanged.
        copies: number of branches.
        rows: size of the batch dimension.
        batched: paths of the tensors with a batch dimension; None for all tensors whose first dimension is `rows`.
        path: the path of `value` itself.
    """
    if isinstance(value, Tensor):
        if path and path[-1] in _BOUNDARIES:
            starts = torch.arange(copies, device=value.device, dtype=value.dtype)[:, None] * value[-1]
            return torch.cat([value[:1], (value[1:] + starts).flatten()])
        # A tensor with one dimension holds positions or lengths; a first dimension of 1 broadcasts over the batch
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
    """The paths of the tensors with at least two dimensions whose first dimension has the given size."""
    if isinstance(value, Tensor):
        return {path} if value.dim() > 1 and value.size(0) == size else set()
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif type(value) in (tuple, list):
        items = enumerate(value)
    return {place for key, item in items for place in tensors_of_size(item, size, (*path, key))}


class BranchExpansion:
    """Repeats the batch for the branches of a pass.

    Args:
        branches: the state that the adapted layers share, with the active pass.
        adapted: names of the adapted modules in the model.

    Attributes:
        place: where the batch is repeated, one of `PLACES`. `SEPARATELY` means that each branch needs its own pass.
        start: index of the first decoder layer with an adapter; None if adapters are outside one list of layers.
        layers: the decoder layers from `start` on.
        batched: paths of the tensors with a batch dimension among a layer's arguments; None if not known.
        seen: while a trial runs, the paths of the tensors whose first dimension has the batch's size; else None.
        ignores_padding: whether the model gives the same result without a mask if padding is on the right.
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
        # Layers after the first get repeated hidden states, but masks and positions that are not repeated
        positional = tuple(self._expand(value, index) for index, value in enumerate(args))
        return positional, {name: self._expand_once(name, kwargs[name]) for name in kwargs}

    def _expand_once(self, name: str, value: Any) -> Any:
        """Expands an argument once for each pass, because all layers get the same masks and positions."""
        if torch.compiler.is_compiling() or name == "hidden_states":
            return self._expand(value, name)
        known = self.branches.active.expanded
        if id(value) not in known:
            # The value is kept too: if it were freed, another tensor could get its id
            known[id(value)] = (value, self._expand(value, name))
        return known[id(value)][1]

    def _expand(self, value: Any, name: str | int) -> Any:
        one = self.branches.active
        return expand(value, one.copies, one.rows, self.batched, (name,))


def _stack(model: nn.Module, adapted: list[str]) -> tuple[nn.ModuleList, int | None]:
    """The list of layers that contains all adapted modules, and the index of the first layer with one.

    Returns an empty list and None if there is no such list.
    """
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
    """Stores the router logits of all branches in the pass.

    If the batch was repeated inside the backbone, only the first branch's logits stay in the output. The model's own
    router loss would not fit the others to the attention mask, which has the size of one batch.

    Args:
        output: the output of the backbone.
        one: the pass.
    """
    logits = getattr(output, "router_logits", None)
    if not logits:
        return
    one.router_logits = tuple(logits)
    if one.copies > 1 and not one.inputs_are_wide:
        tokens = max(layer.size(0) for layer in logits) // one.copies
        output.router_logits = tuple(layer[:tokens] for layer in logits)


def router_losses(model: PreTrainedModel, one: Pass, inputs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of each of the n branches of a pass, by transformers' `load_balancing_loss_func`.

    Args:
        model: the base model.
        one: the pass.
        inputs: the batch before it was repeated.

    Returns:
        the losses, [n]; None for a model without routers.
    """
    logits, one.router_logits = one.router_logits, None
    if logits is None:
        return None
    config, branches = model.config.get_text_config(), len(one.names)
    masks = [inputs.get("attention_mask")] * branches
    if one.copies < branches and masks[0] is not None:
        masks = masks[0].chunk(branches)  # the lines are distributed among the branches
    wide = max(layer.size(0) for layer in logits)
    # Layers below the first adapter run once for all branches
    by_branch = [layer.chunk(branches) if layer.size(0) == wide else [layer] * branches for layer in logits]
    losses = [
        load_balancing_loss_func(tuple(own), config.num_experts, config.num_experts_per_tok, mask)
        for *own, mask in zip(*by_branch, masks, strict=True)
    ]
    return torch.stack(losses)


# On a GPU, batches are padded to multiples of this length. So there are few different lengths, and few CUDA graphs
LENGTHS = 64
# Up to this length, cuDNN's attention is not used: it builds a plan for each new shape, which takes seconds, and
# attention over short rows is only a small part of a step
_LONGEST_WITHOUT_PLANS = 1024


@contextmanager
def without_plans(tokens: Tensor) -> Iterator[None]:
    """Within the block, PyTorch's attention does not use cuDNN if the rows are short.

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
    """Whether all padding of a mask [B, T] is on the right; False for None and for masks of other dimensions."""
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
        model: the model with its branches.
        inputs: the batch, with tensors [B, T] and flags for TRL's fused LM head.
        rows: the batch's rows.
        weights: weights of the rows, [n, R] for the n branches that run; [1, R] if `dealt`.
        branches: indices of the n branches.
        compiled: whether `torch.compile` runs the model.
        dealt: whether the lines of the batch are distributed among the branches, so that the batch is not repeated.

    Returns:
        fields of [`BranchOutput`]. `nll` has the shape of the weights, and `aux_loss` is [n].
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
        # The labels are used after the decoder layers, together with hidden states that are repeated already
        widened["labels"] = expand(inputs["labels"], copies, lines)
    if model.expansion.ignores_padding and is_padded_right(inputs.get("attention_mask")):
        widened["attention_mask"] = None  # with causal attention, tokens do not see padding to their right
    with without_plans(inputs["input_ids"]), Pass(model.competing, names, copies, lines, at_inputs, compiled) as one:
        output = base(**widened)
        losses = router_losses(base, one, inputs)
    one.resume_in_backward(output.log_probs, losses)
    weighted, nll = _weigh(output.log_probs, rows, weights)
    result = {"log_probs": weighted, "nll": nll, "aux_loss": losses}
    per_token = {name: value for name in _PER_TOKEN if (value := getattr(output, name)) is not None}
    if not torch.is_grad_enabled() and "is_top1" in per_token:  # not every TRL trainer computes is_top1
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
    """Runs `chunk` branches at a time, each chunk forward and backward before the next.

    Arguments and result are those of [`run_batched`], but the log-probabilities are one weighted sum. Its gradients
    are computed already, and its backward passes them on.
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
    """Runs each line of a batch through one branch.

    Args:
        model, inputs, rows, compiled: as for [`run_batched`].
        weights: weights of the rows, [K, R]. Only a row's weight for its own branch is used.
        owners, rows_per_line: as for [`deal`].
        router_weights: weights of the branches' load-balancing losses, [K]; None for their mean.
        chunk: number of branches that run at a time.

    Returns:
        as for [`run_batched`], but `nll` is [K, R], with zeros for rows that did not run through a branch, and there
        is `ran`, bool [K, R].
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
            # The caller takes the mean over the branches that run, so the factor turns it into a sum
            piece["aux_loss"] = piece["aux_loss"] * len(running) * router_weights[list(dealt.branches)].to(weights)
        own = piece.pop("nll")
        nll = own.new_zeros(weights.shape) if nll is None else nll
        nll[owner, row] = own[0, place]
        ran[owner, row] = True
        if len(parts) == 1:
            return {"nll": nll, "ran": ran, **piece}
        # Chunks differ in length, so the tokens are put into one dimension; only sums over them are used
        chunks.add({name: value.flatten() if name in _PER_TOKEN else value for name, value in piece.items()}, part)
    return {"nll": nll, "ran": ran, **chunks.result()}


class _Chunks:
    """Collects the outputs of chunks and computes the gradients of each chunk before the next one runs."""

    def __init__(self, model: RunsBranches) -> None:
        self.model = model
        self.pieces: list[dict[str, Tensor]] = []
        self.routers: list[Tensor] = []
        self.log_probs, self.aux_loss = _Found(), _Found()

    def add(self, piece: dict[str, Tensor], branches: Sequence[int]) -> None:
        """Adds the output of [`run_batched`] over some branches and computes the gradients of these branches."""
        parameters = list(_trainable(self.model, branches)) if torch.is_grad_enabled() else []
        router = piece.pop("aux_loss")
        self.log_probs.add(piece.pop("log_probs").sum(), parameters, again=router is not None)
        if router is not None:
            self.aux_loss.add(router.sum(), parameters)
            self.routers.append(router.detach())
        self.pieces.append({name: value.detach() for name, value in piece.items()})

    def result(self) -> dict[str, Tensor]:
        """The outputs of all chunks as one."""
        result = {name: torch.cat([piece[name] for piece in self.pieces]) for name in self.pieces[0]}
        router = None
        if self.routers:
            # The value is that of each branch. The caller takes the mean, whose gradient is that of the sum divided
            # by the number of branches
            router, total = torch.cat(self.routers), self.aux_loss.with_gradients()
            router = router + (total - total.detach()) / len(router)
        return {"log_probs": self.log_probs.with_gradients(), "aux_loss": router, **result}


class _Found:
    """A sum of values together with its gradients."""

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
    """A scalar whose backward gives the parameters the given gradients, times the incoming gradient.

    Args:
        value: the scalar, without an autograd graph.
        parameters: the parameters that receive gradients.
        gradients: one gradient for each parameter.
    """
    return _KnownGradients.apply(value, len(parameters), *parameters, *gradients) if parameters else value


def _weigh(log_probs: Tensor, rows: Rows, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplies log-probabilities by the weight of their row.

    Args:
        log_probs: [n·B, T−1].
        rows: the batch's rows.
        weights: [n, R].

    Returns:
        the weighted log-probabilities, [n·B, T−1], and S of each row without gradient, [n, R].
    """
    branches = weights.size(0)
    by_branch = log_probs.view(branches, -1, log_probs.size(-1))
    nll = -rows.sum(by_branch.detach())
    weight = weights[:, rows.index[:, 1:]].to(log_probs.dtype)
    # Selected, not multiplied, because 0 * nan is nan: a diverged branch does not change the sum or the gradients
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
    """Whether a process holds a whole, plain parameter, as under DDP, and not a shard of it (FSDP, DeepSpeed).

    Sharded parameters need no gradient if they did not run, and DeepSpeed fails if a gradient is None.
    """
    marks = ("ds_id", "_hp_mapping", "_fsdp_flattened")
    return type(parameter) is nn.Parameter and not any(hasattr(parameter, mark) for mark in marks)


class _KnownGradients(torch.autograd.Function):
    """The autograd function of [`known_gradients`]."""

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

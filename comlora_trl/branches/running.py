"""Running the base model over branches: all at once, or in chunks with each chunk's backward before the next.

Both give the same losses and gradients. The row weights are known before the language model runs, so no graph has to
be kept across branches.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from comlora_trl.branches.dealing import deal, indices
from comlora_trl.branches.expansion import LAYERS, expand
from comlora_trl.branches.passes import Pass
from comlora_trl.branches.routers import router_losses
from comlora_trl.branches.rows import Rows

if TYPE_CHECKING:
    from comlora_trl.branches.model import BranchModel

_PER_TOKEN = ("entropy", "is_top1", "label_mask")


def run_batched(
    model: "BranchModel",
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
    with Pass(model.competing, names, copies, lines, at_inputs, compiled) as one:
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
    model: "BranchModel",
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
    model: "BranchModel",
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

    def __init__(self, model: "BranchModel") -> None:
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


def _trainable(model: "BranchModel", branches: Sequence[int]) -> Iterator[Tensor]:
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

"""Views: one stand-in for the model for each branch, for losses that are computed from `model(**inputs)`.

The forward of a view returns its branch's slice of one pass over all branches. A function that computes a loss from a
model and a batch, such as `compute_loss` of a TRL trainer or of a user, is called once with each view. Outputs, loss
and gradients are then those of a model with only this branch. [`branch_losses`] does this for all branches.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from comlora_trl import compat
from comlora_trl.branches.batches import Dealt, Rows, deal, indices
from comlora_trl.branches.passes import (
    LAYERS,
    SEPARATELY,
    Pass,
    RunsBranches,
    expand,
    is_whole,
    known_gradients,
    router_losses,
    touch,
)

# Labels are used after the decoder layers, together with hidden states that are repeated already
_LABELS = ("labels", "shift_labels")


class ViewedModel(RunsBranches, Protocol):
    """The part of the model that views use ([`comlora_trl.branches.model.BranchModel`])."""

    k: int
    active_adapter: str
    is_switched_off: bool
    splits_loss: bool

    def set_adapter(self, adapter_name: str) -> None: ...


class ViewPass(NamedTuple):
    """The settings of one forward over views.

    Attributes:
        branches: indices of the branches that run.
        dealt: whether the batch's lines are distributed among the branches in equal shares, so that the batch is not
            repeated.
    """

    branches: tuple[int, ...]
    dealt: bool = False


class BranchView:
    """A stand-in for the model that runs one branch.

    A call runs the branch (see [`BranchViews`]), and `generate` uses it as the active adapter. Everything else is the
    model's: attributes, parameters, training mode. Within `disable_adapter()` a call runs the base model.

    Args:
        views: the views that this one belongs to.
        place: index of this view among them.
    """

    def __init__(self, views: "BranchViews", place: int) -> None:
        object.__setattr__(self, "_views", views)
        object.__setattr__(self, "_place", place)

    @property
    def __class__(self) -> type:
        """The model's class, because TRL and PEFT test the model with `isinstance`."""
        return type(self._views.model)

    @property
    def branch(self) -> int:
        """The branch's index."""
        return self._views.branches[self._place]

    @property
    def place(self) -> int:
        """Index of this view among the views."""
        return self._place

    @property
    def views(self) -> "BranchViews":
        """The views that this one belongs to."""
        return self._views

    @property
    def inputs(self) -> dict[str, Any]:
        """A new dict with this branch's batch: the whole batch or, if lines are distributed, the branch's lines."""
        return dict(self._views.inputs[self._place])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._views.call(self._place, args, kwargs)

    forward = __call__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with this branch."""
        model, own = self._views.model, self._views.model.active_adapter
        model.set_adapter(model.branch_names[self.branch])
        try:
            return model.generate(*args, **kwargs)
        finally:
            model.set_adapter(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._views.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._views.model, name, value)


@dataclass
class _Call:
    """The n-th call of all views, which one forward serves.

    Attributes:
        kwargs: the arguments of the view that called first.
        place: index of that view.
        grad: whether gradients were enabled in that call.
        outputs: the output for each view; None if each view runs by itself.
    """

    kwargs: dict[str, Any]
    place: int
    grad: bool
    outputs: list[Any] | None = None


@dataclass
class BranchViews:
    """The views of some branches on one batch.

    One forward over all branches serves the n-th call of every view. The view that calls first runs it, and the others
    get their slices. A view whose arguments differ from those of the first view, for example by a random mask, runs by
    itself. All views run by themselves if the model can only run branch by branch, or if its loss can't be computed
    for each branch.

    Args:
        model: the model with its branches.
        branches: indices of the branches to view, in order.
        batch: a batch from TRL's collators; needed with `owners`.
        wrapped: the model in its DDP, FSDP or DeepSpeed wrapper, whose forward is called; None for `model`.
        owners: the branch of each line of the batch, and a view sees only its lines. Lines of other branches are left
            out. None if every view sees the whole batch.
        rows_per_line: number of rows of each line of a packed batch; None for one row each.
        stacked: number of rows of each line in a batch that holds the first row of every line, then the second row of
            every line, and so on, as TRL's collators stack chosen and rejected completions.
        made: tensors that the loss derives from the batch and passes to the model, such as labels. They are needed to
            recognise these arguments if lines are distributed. They are not among a view's inputs.

    Attributes:
        inputs: the batch of each view.
        passes: number of passes of one branch over its rows, with gradients, that have run.
    """

    model: ViewedModel
    branches: Sequence[int]
    batch: dict[str, Any] = field(default_factory=dict)
    wrapped: nn.Module | None = None
    owners: Sequence[int] | None = None
    rows_per_line: Sequence[int] | None = None
    passes: int = 0
    stacked: int = 1
    made: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._dealt: Dealt | None = None
        self._widths = [0] * len(self.branches)
        self.inputs = [self.batch] * len(self.branches)
        self._made: list[dict[str, Tensor]] = []
        if self.owners is not None:
            self._deal()
        self._calls: list[_Call] = []
        self._asked = [0] * len(self.branches)
        base = self.model.get_base_model()
        self._names = [*inspect.signature(base.forward).parameters]

    def _deal(self) -> None:
        owners = [owner if owner in self.branches else -1 for owner in self.owners]
        if not set(owners) - {-1}:
            self.branches, self.inputs, self._widths = [], [], []
            return
        rows, batch = Rows.of(self.batch), self.batch | self.made
        dealt = self._dealt = deal(batch, rows, owners * self.stacked, self.rows_per_line)
        self.branches = dealt.branches
        self.inputs = []
        for branch in dealt.branches:
            own = [owner if owner == branch else -1 for owner in owners]
            inputs = deal(batch, rows, own * self.stacked, self.rows_per_line).inputs
            if self.stacked > 1:
                inputs |= self._once_a_line(branch, owners)
            self._made.append({name: inputs.pop(name) for name in self.made})
            self.inputs.append(inputs)
        self._widths = [own["input_ids"].size(1) for own in self.inputs]

    def _once_a_line(self, branch: int, owners: list[int]) -> dict[str, Tensor]:
        """A branch's part of those tensors in a stacked batch that have one entry for each line."""
        own = indices([line for line, owner in enumerate(owners) if owner == branch], self.batch["input_ids"].device)
        return {
            name: value.index_select(0, own)
            for name, value in self.batch.items()
            if isinstance(value, Tensor) and value.shape[:1] == (len(owners),)
        }

    def __len__(self) -> int:
        return len(self.branches)

    def __iter__(self) -> Iterator[BranchView]:
        return (BranchView(self, place) for place in range(len(self)))

    def __getitem__(self, place: int) -> BranchView:
        return BranchView(self, range(len(self))[place])

    def call(self, place: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The forward of a view.

        Args:
            place: index of the view.
            args, kwargs: the arguments of the model's forward.

        Raises:
            RuntimeError: if the view must run by itself and gradient checkpointing is on.
        """
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        turn, self._asked[place] = self._asked[place], self._asked[place] + 1
        if turn == len(self._calls):
            self._calls.append(self._run(place, kwargs))
        call = self._calls[turn]
        if call.outputs is None or not self._same(call, place, kwargs):
            return self._alone(place, kwargs)
        output, call.outputs[place] = call.outputs[place], None
        return output

    def _run(self, place: int, kwargs: dict[str, Any]) -> _Call:
        call = _Call(kwargs, place, torch.is_grad_enabled())
        if not self.branches_answer:
            if self._dealt is None:  # the base model's output is the same for all views
                output = self._forward(**kwargs)
                call.outputs = [_copy(output) for _ in self.branches]
            return call
        wide = self._widened(place, kwargs)
        if wide is None or len(self) > 1 and self.model.expansion.place == SEPARATELY:
            return call
        output = self._view_pass(wide, ViewPass(tuple(self.branches), self._dealt is not None))
        if output is not None:
            call.outputs = self._split(output, kwargs)
        return call

    def _alone(self, place: int, kwargs: dict[str, Any]) -> Any:
        if not self.branches_answer:
            return self._forward(**kwargs)
        if len(self) > 1 and self.model.competing.checkpointing and torch.is_grad_enabled():
            raise RuntimeError(
                "this loss needs a pass for each branch, and gradient checkpointing can't tell them apart: run the "
                "branches one after the other (comlora_branch_chunk=1), or switch gradient checkpointing off."
            )
        output = self._view_pass(kwargs, ViewPass((self.branches[place],)))
        return _as_asked(_sliced(output, 0, 1, _lines(kwargs), None), kwargs)

    def _view_pass(self, kwargs: dict[str, Any], view_pass: ViewPass) -> Any:
        output = self._forward(view_pass=view_pass, **kwargs)
        if output is not None and torch.is_grad_enabled():
            self.passes += len(view_pass.branches)
        return output

    def _forward(self, **kwargs: Any) -> Any:
        return (self.model if self.wrapped is None else self.wrapped)(**kwargs)

    @property
    def branches_answer(self) -> bool:
        """Whether a forward runs the branches, and not the base model or another adapter such as a reference."""
        return not self.model.is_switched_off and self.model.active_adapter in self.model.branch_names

    def _widened(self, place: int, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a pass over all branches, from those of one view; None if they can't be determined."""
        if self._dealt is None:
            return kwargs
        wide, lines = {}, _lines(kwargs)
        for name, value in kwargs.items():
            source = self._source(place, name, value) if isinstance(value, Tensor) else None
            if source is not None:
                wide[name] = self._dealt.inputs[source]
            elif isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == lines:
                return None  # the caller made this tensor from the view's lines
            else:
                wide[name] = self._dealt.inputs.get(name, value)
        return wide

    def _same(self, call: _Call, place: int, kwargs: dict[str, Any]) -> bool:
        if call.outputs[place] is None or call.grad != torch.is_grad_enabled() or call.kwargs.keys() != kwargs.keys():
            return False
        if self._dealt is None:
            return all(_equal(value, kwargs[name]) for name, value in call.kwargs.items())
        pairs = (
            (self._source(call.place, name, value), self._source(place, name, kwargs[name]), name)
            for name, value in call.kwargs.items()
        )
        return all(
            one == other if one is not None else _equal(call.kwargs[name], kwargs[name]) for one, other, name in pairs
        )

    def _source(self, place: int, name: str, value: Any) -> str | None:
        """The name of an argument's value in the view's batch or in `made`; None if it is not there.

        A value is found by identity, or a tensor by equality. Of several equal tensors, the one with the argument's
        own name is taken.
        """
        for known, own in self.inputs[place].items():
            if own is value:
                return known
        if not isinstance(value, Tensor):
            return None
        known = self.inputs[place] | self._made[place]
        names = [name, *known] if name in known else known
        return next((one for one in names if isinstance(known[one], Tensor) and _equal(known[one], value)), None)

    def _split(self, output: Any, kwargs: dict[str, Any]) -> list[Any]:
        lines, shares = _lines(kwargs), [_lines(kwargs)] * len(self)
        widest = None
        if self._dealt is not None:
            lines = self._dealt.inputs["input_ids"].size(0) // len(self)
            shares = [own["input_ids"].size(0) for own in self.inputs]
            widest = self._dealt.inputs["input_ids"].size(1)
        pieces = _Pieces(len(self), lines)
        outputs = []
        for place, (share, width) in enumerate(zip(shares, self._widths, strict=True)):
            cut = None if widest is None or widest == width else widest - width
            outputs.append(_as_asked(_sliced(output, place, len(self), lines, cut, share, pieces), kwargs))
        return outputs


def branch_losses(
    views: Callable[[Sequence[int]], BranchViews],
    branches: Sequence[int],
    loss_of: Callable[[BranchView], Tensor],
    model: ViewedModel,
    chunk: int | None = None,
) -> tuple[dict[int, Tensor], int]:
    """Computes a loss for each branch from one pass over all branches.

    Args:
        views: makes the views of the given branches.
        branches: indices of the branches to run.
        loss_of: computes a branch's loss from its view; called once for each branch, in order.
        model: the model with its branches.
        chunk: number of branches that run at a time; None for all at once. In chunks, the gradients of each chunk are
            computed before the next chunk runs, with respect to the branches' parameters only. The loss passes them on
            in its backward.

    Returns:
        the losses by branch, only of branches that have lines; and the number of passes of one branch over its rows,
        with gradients, that have run.
    """
    chunk = 1 if model.expansion.place == SEPARATELY else min(chunk or len(branches), len(branches))
    losses: dict[int, Tensor] = {}
    passes = 0
    for first in range(0, len(branches), chunk):
        some = views(branches[first : first + chunk])
        own = {view.branch: loss_of(view) for view in some}
        if chunk < len(branches) and torch.is_grad_enabled():
            own = _with_known_gradients(own, model)
        losses |= own
        passes += some.passes
    idle = [branch for branch in range(model.k) if branch not in losses]
    if losses and idle:
        rest = [p for branch in idle for p in model.branch_parameters(branch) if p.requires_grad and is_whole(p)]
        last = max(losses)
        losses[last] = touch(losses[last], rest)
    return losses, passes


def _with_known_gradients(losses: dict[int, Tensor], model: ViewedModel) -> dict[int, Tensor]:
    """The losses of one chunk with their gradients computed and their autograd graph freed."""
    own = {branch: [p for p in model.branch_parameters(branch) if p.requires_grad] for branch in losses}
    parameters = [parameter for some in own.values() for parameter in some]
    differentiable = [loss for loss in losses.values() if loss.requires_grad]
    if not (parameters and differentiable):
        return losses
    # A branch's gradients depend only on its own loss, so the gradients of the sum are those of each loss
    found = torch.autograd.grad(differentiable, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    result, first = {}, 0
    for branch, loss in losses.items():
        last = first + len(own[branch])
        result[branch] = known_gradients(loss.detach(), parameters[first:last], gradients[first:last])
        first = last
    return result


def run_view_pass(model: ViewedModel, view_pass: ViewPass, inputs: dict[str, Any], compiled: bool) -> Any:
    """Runs one forward of the base model over branches.

    There is no key-value cache, because with a cache the segments of a packed line would attend to each other.

    Args:
        model: the model with its branches.
        view_pass: the branches that run.
        inputs: the arguments of the base model, by name.
        compiled: whether `torch.compile` runs the model.

    Returns:
        the base model's output. Its tensors are [n·B, ...] for the n branches, branch-major, or [B, ...] for layers
        below the first adapter; `loss` and `aux_loss` are [n]. None if the model's own loss can't be computed for each
        branch.

    Raises:
        ValueError: if a cache is asked for.
    """
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        raise ValueError("a loss over branches is computed without a cache: leave past_key_values and use_cache out.")
    base, copies = model.get_base_model(), 1 if view_pass.dealt else len(view_pass.branches)
    names = tuple(model.branch_names[branch] for branch in view_pass.branches)
    lines, at_inputs, count = _lines(inputs), model.expansion.place != LAYERS, len(names)
    fused = bool(inputs.get("fused_lm_head"))
    own_loss = count > 1 and not fused and any(inputs.get(name) is not None for name in _LABELS)
    if own_loss and not model.splits_loss:
        return None
    widened = {name: value for name, value in inputs.items() if name != "return_dict"} | {"use_cache": False}
    if copies > 1:
        wide = widened.keys() if at_inputs else _LABELS
        widened |= {name: expand(widened[name], copies, lines, None, (name,)) for name in wide if name in widened}
    with (
        Pass(model.competing, names, copies, lines, at_inputs, compiled) as one,
        _LossPerBranch(base, count) as losses,
    ):
        output = base(**widened)
        logits = one.router_logits
        routers = router_losses(base, one, inputs) if count > 1 else None
    one.resume_in_backward(*tensors_of(output))
    if not isinstance(output, ModelOutput):
        return output if not own_loss else None
    if getattr(output, "past_key_values", None) is not None:
        output["past_key_values"] = None
    if count == 1:
        return output
    coefficient = getattr(base, "router_aux_loss_coef", None)
    if fused:
        given = inputs.get("num_items_in_batch")
        supervised = output.label_mask.view(count, -1).sum(dim=1).clamp(min=1) if given is None else given
        output["loss"] = -output.log_probs.view(count, -1).sum(dim=1) / supervised
        coefficient = getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0)
    elif own_loss:
        model.splits_loss = losses.found is not None and (routers is None or coefficient is not None)
        if not model.splits_loss:
            return None
        output["loss"] = losses.found
    if routers is not None:
        output["aux_loss"] = routers
        if not fused:
            output["router_logits"] = logits
        if getattr(output, "loss", None) is not None:
            output["loss"] = output.loss + coefficient * routers
    return output


class _LossPerBranch:
    """Replaces the loss function of a transformers model during a pass, and computes the loss of each branch.

    The model calls it with the logits and labels of all branches, and with the model's other arguments.

    Attributes:
        found: the loss of each branch, [n]; None if the model did not call the loss function.
    """

    def __init__(self, base: nn.Module, count: int) -> None:
        self.base, self.count = base, count
        self.found: Tensor | None = None

    def __enter__(self) -> "_LossPerBranch":
        self.own = compat.own_loss_function(self.base)
        self.function = getattr(self.base, "loss_function", None)
        if self.count > 1 and self.function is not None:
            self.base.loss_function = self
        return self

    def __exit__(self, *_: object) -> None:
        if self.count > 1 and self.function is not None:
            compat.reset_loss_function(self.base)
            if self.own is not None:
                self.base.loss_function = self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        size = (args[0] if args else kwargs["logits"]).size(0)
        rows = size // self.count
        part = lambda value, k: (
            value[k * rows : (k + 1) * rows]
            if isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == size
            else value
        )
        losses = [
            self.function(*(part(value, k) for value in args), **{n: part(value, k) for n, value in kwargs.items()})
            for k in range(self.count)
        ]
        self.found = torch.stack(losses)
        return self.found.mean()


class _Pieces:
    """Splits each tensor of a pass only once for all views, so that autograd concatenates the gradients only once."""

    def __init__(self, count: int, lines: int) -> None:
        self.count, self.lines = count, lines
        self._known: dict[int, tuple[Tensor, ...]] = {}

    def of(self, value: Tensor, size: int) -> tuple[Tensor, ...]:
        if id(value) not in self._known:
            self._known[id(value)] = value.split(size)
        return self._known[id(value)]


def _sliced(
    output: Any,
    place: int,
    count: int,
    lines: int,
    cut: int | None,
    share: int | None = None,
    pieces: _Pieces | None = None,
) -> Any:
    """One branch's part of the output of a pass.

    Args:
        output: the output of the pass.
        place: index of the branch among the branches of the pass.
        count: number of branches of the pass.
        lines: number of lines of each branch.
        cut: number of tokens at the end of a packed line that only fill it up; None for none.
        share: number of lines that belong to the branch, while the others only fill up; None for all lines.
        pieces: the split tensors, shared by all views.
    """
    if count == 1:
        return output
    own = pieces or _Pieces(count, lines)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 0 or value.size(0) != count * lines:
                return value
            value = own.of(value, lines)[place]
            value = value if share is None or share == lines else value[:share]
            return value if cut is None or value.dim() < 2 else value[:, : value.size(1) - cut]
        if isinstance(value, Mapping):
            return type(value)({name: part(item) for name, item in value.items()})
        return type(value)(map(part, value)) if type(value) in (tuple, list) else value

    if not isinstance(output, ModelOutput):
        return part(output)
    fields = {}
    for name, value in output.items():
        if name in ("loss", "aux_loss"):
            fields[name] = value[place]
        elif name == "router_logits":
            wide = max(layer.size(0) for layer in value)
            fields[name] = tuple(
                own.of(layer, wide // count)[place] if layer.size(0) == wide else layer for layer in value
            )
        else:
            fields[name] = part(value)
    return type(output)(**fields)


def _as_asked(output: Any, kwargs: dict[str, Any]) -> Any:
    return output.to_tuple() if kwargs.get("return_dict") is False and isinstance(output, ModelOutput) else output


def _copy(output: Any) -> Any:
    return type(output)(**output) if isinstance(output, ModelOutput) else output


def _lines(inputs: Mapping[str, Any]) -> int:
    tokens = inputs.get("input_ids")
    return (inputs["inputs_embeds"] if tokens is None else tokens).size(0)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a model's output, also those in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        # cpu and cpu:0 are the same device but do not compare equal
        alike = first.shape == second.shape and first.dtype == second.dtype and first.device.type == second.device.type
        return alike and bool(torch.equal(first, second))
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return False
    return bool(first == second)

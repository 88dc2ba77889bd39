"""A loss that TRL or the user computes from `model(**inputs)`: once for each living branch, on the branch's view.

A `compute_loss` of the user's that only goes on from `super().compute_loss` is called once a micro-batch, as in TRL.
One that calls the model with gradients is called once for each living branch, each time with a view
([`comlora_trl.branches.views`]) in the model's place. So are TRL's own losses that are no sum over rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comlora_trl import compat
from comlora_trl.branches.views import BranchView, BranchViews, branch_losses, tensors_of
from comlora_trl.training.competition import Competition


class _CallsTheModel(BaseException):
    """A loss is about to be computed from the model's outputs; no Exception, which a user's code may catch."""


class UndecidedView(BranchView):
    """Stands in for the model until a loss calls it with gradients; without them it is the model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.views.branches_answer:
            raise _CallsTheModel
        return self.views.wrapped(*args, **kwargs)

    forward = __call__


class OwnLosses:
    """The losses of one trainer that are computed branch by branch.

    Args:
        trainer: its metrics are put back where a loss is computed again.
        competition: takes the losses.
    """

    def __init__(self, trainer: Any, competition: Competition) -> None:
        self.trainer, self.competition = trainer, competition
        self._calls_the_model = False

    @property
    def possible(self) -> bool:
        """Whether branches can train by a loss of their own: eq. 5-9 of several need the loss of each row instead."""
        model = self.competition.model
        return model.selector is None or model.k == 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the trainer's `compute_loss`, which is the user's, is called as [`step_loss`] does."""
        trainer = self.trainer
        users, given = trainer.compute_loss, "compute_loss" in trainer.__dict__
        if not self.possible:
            yield
            return
        trainer.compute_loss = partial(self.step_loss, users)
        try:
            yield
        finally:
            del trainer.compute_loss
            if given:
                trainer.compute_loss = users

    def step_loss(self, compute_loss: Callable, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch's loss by a `compute_loss` of the user's, in the place of it.

        Args:
            compute_loss: the user's.
            model, inputs, args, kwargs: what the Trainer calls it with.
        """
        if not self._calls_the_model:
            views = BranchViews(self.competition.model, [0], wrapped=model)
            restore = self._kept()
            try:
                return compute_loss(UndecidedView(views, 0), dict(inputs), *args, **kwargs)
            except _CallsTheModel:
                self._calls_the_model = True
                restore()
        return self.per_view(compute_loss, model, inputs, *args, **kwargs)

    def _kept(self) -> Callable[[], None]:
        """Puts back what `super().compute_loss` has counted of a micro-batch, when called."""
        restore_step, restore_logs = self.competition.savepoint(), self.kept_logs()

        def restore() -> None:
            restore_step()
            restore_logs()

        return restore

    def kept_logs(self) -> Callable[[], None]:
        """Puts back TRL's metrics and its count of tokens as they are now, when called."""
        trainer, tokens = self.trainer, compat.train_tokens(self.trainer)
        metrics = {name: list(values) for name, values in compat.train_metrics(trainer).items()}

        def restore() -> None:
            compat.set_train_tokens(trainer, tokens)
            compat.train_metrics(trainer).clear()
            compat.train_metrics(trainer).update(metrics)

        return restore

    def per_view(
        self,
        compute_loss: Callable,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The living branches' losses, each computed on its view, as one: their mean (eq. 4) or, of independent
        branches, their sum. With `return_outputs` beside the outputs of the first branch."""
        trainer, competition = self.trainer, self.competition
        plan, inputs = competition.plan, dict(inputs)
        owners, rows_per_line = competition.deal_of(inputs)
        seen, outputs = compat.train_tokens(trainer), []

        def loss_of(view: BranchView) -> Tensor:
            items = num_items_in_batch
            if owners is None:
                compat.set_train_tokens(trainer, seen)  # TRL counts the batch for each branch
            elif items is not None:
                items = plan.branch_tokens[view.branch].clamp(min=1)
            given = {"return_outputs": True} if return_outputs and not outputs else {}
            loss = compute_loss(view, view.inputs, **given, num_items_in_batch=items)
            if given:
                loss, output = loss
                outputs.append(output)
            return loss

        views = partial(
            BranchViews, competition.model, batch=inputs, wrapped=model, owners=owners, rows_per_line=rows_per_line
        )
        losses, passes = branch_losses(views, competition.state.living, loss_of, competition.model, competition.chunk)
        scale = 1.0
        if trainer.loss_is_scaled_for_ga is False:
            scale /= trainer.current_gradient_accumulation_steps
        loss = competition.combine_branches(losses, inputs, owners, rows_per_line, passes, scale)
        return (loss, outputs[0]) if return_outputs else loss


def refuse_lone_gradients(competition: Competition, output: Any) -> None:
    """Ends a backward pass from these outputs of an ordinary forward, if it would train the active branch alone.

    Such a loss was computed from `trainer.model(...)`, past the model that `compute_loss` is given.
    """
    model, active = competition.model, competition.model.active_adapter
    if active not in model.branch_names or model.is_switched_off:
        return

    def refuse(_: Tensor) -> None:
        own = [p for p in model.branch_parameters(model.branch_names.index(active)) if p.requires_grad]
        if not any(compat.accumulates(parameter) for parameter in own if parameter.is_leaf):
            return
        line = f"a loss computed from model(...) would train {active} alone of K={model.k} branches"
        if model.selector is None:
            raise RuntimeError(
                f"{line}: compute it in compute_loss, from the model that compute_loss is given, which stands for "
                "each branch in turn."
            )
        raise RuntimeError(
            f"{line}: the selector's losses (eq. 5-9) need TRL's loss of each row; in an overridden compute_loss go "
            "on from super().compute_loss(...), or set comlora_selector=False and each branch trains by yours."
        )

    for tensor in tensors_of(output):
        if tensor.requires_grad:
            tensor.register_hook(refuse)

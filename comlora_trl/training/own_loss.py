"""Losses that TRL or the user computes from `model(**inputs)`. They are computed for each living branch, on its view.

A user's `compute_loss` that only calls `super().compute_loss` and changes the result is called once for each
micro-batch, as in TRL. If it calls the model with gradients, it is called once for each living branch, with a view
([`comlora_trl.branches.views`]) instead of the model. The same is done with those of TRL's losses that are not a sum
over rows.
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
    """Raised when a loss calls the model. It is not an `Exception`, because user code may catch those."""


class UndecidedView(BranchView):
    """A stand-in for the model that finds out whether a loss calls the model with gradients.

    A call with gradients raises `_CallsTheModel`. A call without gradients runs the model.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self.views.branches_answer:
            raise _CallsTheModel
        return self.views.wrapped(*args, **kwargs)

    forward = __call__


class OwnLosses:
    """Computes a loss for each branch.

    Args:
        trainer: the trainer. Its metrics are restored if a loss is computed a second time.
        competition: the competition, which combines the losses.
    """

    def __init__(self, trainer: Any, competition: Competition) -> None:
        self.trainer, self.competition = trainer, competition
        self._calls_the_model = False

    @property
    def possible(self) -> bool:
        """Whether losses can be computed for each branch. With a selector, eq. 5-9 need the loss of each row."""
        model = self.competition.model
        return model.selector is None or model.k == 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the trainer's `compute_loss`, which is a user's, is called through [`step_loss`]."""
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
        """The loss of a micro-batch by a user's `compute_loss`.

        Args:
            compute_loss: the user's method.
            model, inputs, args, kwargs: the Trainer's arguments for the method.

        Returns:
            the result of the method, or of [`per_view`] if the method calls the model with gradients.
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
        """Returns a function that restores the present figures of the step and TRL's metrics."""
        restore_step, restore_logs = self.competition.savepoint(), self.kept_logs()

        def restore() -> None:
            restore_step()
            restore_logs()

        return restore

    def kept_logs(self) -> Callable[[], None]:
        """Returns a function that restores TRL's present metrics and count of tokens."""
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
        """Computes the loss of each living branch on its view and combines them.

        Args:
            compute_loss: computes a loss; called with a view, the view's batch, and TRL's other arguments.
            model: the model in its wrapper.
            inputs: the micro-batch.
            return_outputs: whether to return the outputs of the first branch too.
            num_items_in_batch: as for TRL's `compute_loss`.

        Returns:
            the mean of the losses (eq. 4), or their sum for independent branches; with `return_outputs`, a pair of the
            loss and the outputs.
        """
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
    """Makes the backward from an ordinary forward's outputs raise an error if it would train the active branch only.

    This happens if a user computes a loss from `trainer.model(...)` and not from the model that `compute_loss` gets.

    Args:
        competition: the competition.
        output: the output of the ordinary forward.
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

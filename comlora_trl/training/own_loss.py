"""A loss that TRL or the user computes from `model(**inputs)`: once for each living branch, on the branch's view.

A `compute_loss` of the user's that only goes on from `super().compute_loss` is called once a micro-batch, as in TRL.
One that calls the model with gradients is called once for each living branch, each time with a view
([`comlora_trl.branches.views`]) in the model's place; so are TRL's own losses of the full logits
(`compute_loss_func`, label smoothing) and `loss_type="dft"`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from comlora_trl.branches.dealing import indices
from comlora_trl.branches.rows import Rows
from comlora_trl.branches.views import BranchView, BranchViews, branch_losses
from comlora_trl.training.step_plan import ROWS_PER_LINE

if TYPE_CHECKING:
    from comlora_trl.training.trainer import ComLoRASFTTrainer


class _CallsTheModel(BaseException):
    """A loss is about to be computed from the model's outputs; no Exception, which a user's code may catch."""


class UndecidedView(BranchView):
    """Stands in for the model until a loss calls it with gradients; without them it is the model."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and self._views.branches_answer:
            raise _CallsTheModel
        return self._views.wrapped(*args, **kwargs)

    forward = __call__


class OwnLosses:
    """The losses of one trainer that are not the competition's own.

    Attributes:
        passes: passes of one branch over its rows for each pass that the competition would make, summed over the
            step's micro-batches; None where no loss of the step was computed here.
    """

    def __init__(self, trainer: "ComLoRASFTTrainer") -> None:
        self.trainer = trainer
        self.passes: float | None = None
        self._calls_the_model = False

    @property
    def possible(self) -> bool:
        """Whether branches can train by a loss of their own: eq. 5–9 of several need the loss of each row instead."""
        model = self.trainer.comlora_model
        return model.selector is None or model.settings.k == 1

    def step_loss(self, compute_loss: Callable, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """A micro-batch's loss by a `compute_loss` of the user's, in the place of it.

        Args:
            compute_loss: the user's.
            model, inputs, args, kwargs: what the Trainer calls it with.
        """
        if not self._calls_the_model:
            views = BranchViews(self.trainer.comlora_model, [0], wrapped=model)
            restore = self._kept()
            try:
                return compute_loss(UndecidedView(views, 0), dict(inputs), *args, **kwargs)
            except _CallsTheModel:
                self._calls_the_model = True
                restore()
        return self.per_view(compute_loss, model, inputs, *args, **kwargs)

    def _kept(self) -> Callable[[], None]:
        """Puts back what `super().compute_loss` has counted of a micro-batch, when called."""
        trainer, plan, passes = self.trainer, self.trainer._plan, self.passes
        used, sums, tokens = plan.used, trainer._sums.vector.clone(), trainer._total_train_tokens
        metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}

        def restore() -> None:
            plan.used, trainer._sums.vector, trainer._total_train_tokens = used, sums, tokens
            self.passes = passes
            trainer._metrics["train"].clear()
            trainer._metrics["train"].update(metrics)

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
        trainer, branches, plan = self.trainer, self.trainer.comlora_model, self.trainer._plan
        state, settings = branches.competition_state, branches.settings
        inputs = dict(inputs)
        per_line = inputs.pop(ROWS_PER_LINE, None)
        owners = None if plan.owners is None else plan.owners[plan.used]
        dealt = {"owners": owners, "rows_per_line": None if per_line is None else per_line.tolist()}
        seen, outputs = trainer._total_train_tokens, []

        def loss_of(view: BranchView) -> Tensor:
            items = num_items_in_batch
            if owners is None:
                trainer._total_train_tokens = seen  # TRL counts the batch for each branch
            elif items is not None:
                items = plan.branch_tokens[view.branch].clamp(min=1)
            given = {"return_outputs": True} if return_outputs and not outputs else {}
            loss = compute_loss(view, view.inputs, **given, num_items_in_batch=items)
            if given:
                loss, output = loss
                outputs.append(output)
            return loss

        views = partial(BranchViews, branches, batch=inputs, wrapped=model, **dealt)
        losses, passes = branch_losses(views, state.living, loss_of, branches, trainer.args.comlora_branch_chunk)
        self._record(losses, inputs, owners, per_line)
        self.passes = (self.passes or 0.0) + passes / len(losses)
        share = settings.lm_weight / (1 if settings.independent else state.field)
        # Selected, not multiplied: a diverged branch's nan stays out of the sum
        total = sum(torch.where(loss.detach().isfinite(), loss, torch.zeros_like(loss)) for loss in losses.values())
        return (share * total, outputs[0]) if return_outputs else share * total

    def _record(self, losses: dict[int, Tensor], inputs: dict, owners: Any, per_line: Tensor | None) -> None:
        """Adds the losses to the step's figures, times the tokens that these divide by."""
        trainer, plan, k = self.trainer, self.trainer._plan, self.trainer.comlora_model.settings.k
        rows = Rows.of(inputs)
        tokens = rows.supervised_tokens(inputs["labels"])
        plan.next(trainer.args.seed, trainer.state.global_step, k, tokens.device)
        items = plan.tokens.expand(k) if owners is None else plan.branch_tokens
        scale = 1 / trainer.accelerator.num_processes  # DDP takes the mean
        if trainer.loss_is_scaled_for_ga is False:
            scale /= trainer.current_gradient_accumulation_steps
        nll = torch.zeros(k, rows.count, dtype=trainer._sums.vector.dtype, device=tokens.device)
        ran = torch.zeros(k, rows.count, dtype=torch.bool, device=tokens.device)
        if owners is not None:
            by_row = indices(owners, tokens.device)
            if per_line is not None:
                by_row = by_row.repeat_interleave(per_line.to(tokens.device))
            ran[by_row, torch.arange(len(by_row), device=tokens.device)] = True
        for branch, loss in losses.items():
            nll[branch, 0] = loss.detach().to(nll) * items[branch].to(nll) * scale
            if owners is None:
                ran[branch] = True
        trainer._sums.add(nll, ran, tokens, None, None)

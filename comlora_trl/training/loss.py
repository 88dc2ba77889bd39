"""The loss of an optimizer step, and what a step leaves behind: the competition's half of TRL's training step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.views import BranchView
from comlora_trl.competition import annealing, mean_nll, pairwise_loss
from comlora_trl.competition.rungs import cost
from comlora_trl.training import sharding
from comlora_trl.training.gradients import clip_gradients, disqualify, drop_selector_gradient, gradient_norms
from comlora_trl.training.model import BranchPass, CompetitionOutput
from comlora_trl.training.own_loss import OwnLosses, UndecidedView
from comlora_trl.training.statistics import StepFigures, StepSums, step_winner
from comlora_trl.training.step_plan import ROWS_PER_LINE, StepPlan


class CompetitionLoss:
    """Mixin before TRL's trainer: the loss over all living branches, normalised over the whole step."""

    _in_step = False
    _own_losses: OwnLosses
    current_gradient_accumulation_steps = 1  # the Trainer's own, which it has in its loop alone

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetches an optimizer step's micro-batches, counts M and plans their rows' places in the step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._plan = self._plan_of(batches)
        return batches, self._normaliser(self._plan)

    def _plan_of(self, batches: list[dict[str, Any]]) -> StepPlan | None:
        plan, state = StepPlan.of(batches, self.accelerator), self.comlora_model.competition_state
        if plan is not None and self._shares_rows and len(state.living) > 1:
            plan.deal(batches, self.state.global_step, state.living, state.k, self.accelerator)
        return plan

    def _normaliser(self, plan: StepPlan | None) -> Tensor | None:
        if plan is None:
            return None
        return plan.tokens if self.args.average_tokens_across_devices else plan.own_tokens

    @property
    def _shares_rows(self) -> bool:
        return self.args.comlora_rows == "shared"

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch's forward and backward; the last one of a step also ends the step for the competition.

        Returns:
            the loss for the Trainer's log; of independent branches the mean, while each trains by its own.
        """
        if self.is_deepspeed_enabled:
            sharding.around_step(self.deepspeed, self._finish_step, self._keep_disqualified)
        self._in_step = True
        try:
            with self._users_loss_per_branch():
                loss = super().training_step(*args, **kwargs)
        finally:
            self._in_step = False
            self.comlora_model.competing.abandon()  # a backward that ran out of memory leaves its pass open
        if self._settings.independent:
            loss = loss / len(self.comlora_model.competition_state.living)
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self._finish_step()
        return loss

    @contextmanager
    def _users_loss_per_branch(self) -> Iterator[None]:
        """Puts [`OwnLosses`] in the place of a `compute_loss` that is not ours, which may call the model itself."""
        users, given = self.compute_loss, "compute_loss" in self.__dict__
        if getattr(users, "__func__", None) is CompetitionLoss.compute_loss or not self._own_losses.possible:
            yield
            return
        self.compute_loss = partial(self._own_losses.step_loss, users)
        try:
            yield
        finally:
            del self.compute_loss
            if given:
                self.compute_loss = users

    @property
    def _loss_is_per_branch(self) -> bool:
        """Whether TRL's loss is no sum over rows and branches, but one of each branch's own outputs."""
        smoothed = self.args.loss_type == "nll" and self.label_smoother is not None
        return self.compute_loss_func is not None or self.args.loss_type == "dft" or smoothed

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        """TRL's loss over the weighted rows of all branches, L_LM + L_align, plus the pairwise loss.

        In evaluation mode it is TRL's own, of the leader. Called outside a training step it takes the batch for a
        whole optimizer step, and no figure of the run changes. Called with a branch's view it is TRL's, of the branch.
        """
        if type(model) is UndecidedView:
            model = model.views.wrapped
        if not self.model.training or isinstance(model, BranchView):
            inputs.pop(ROWS_PER_LINE, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._in_step:
            return self._step_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._step_of_its_own(inputs):
            return self._step_loss(model, inputs, return_outputs, self._normaliser(self._plan))

    @contextmanager
    def _step_of_its_own(self, inputs: dict) -> Iterator[None]:
        """A step for a loss that is asked for outside the training loop, or by a callback in it; nothing is left."""
        kept = self._plan, self._sums, self.current_gradient_accumulation_steps
        passes = self._own_losses.passes
        self._plan, self._sums = self._plan_of([inputs]), StepSums(self._settings.k, self.args.device)
        self.current_gradient_accumulation_steps = 1  # TRL divides the routers' loss by them
        try:
            yield
        finally:
            self._plan, self._sums, self.current_gradient_accumulation_steps = kept
            self._own_losses.passes = passes

    def _step_loss(self, model: Any, inputs: dict, return_outputs: bool, num_items_in_batch: Any) -> Any:
        if self._loss_is_per_branch:
            trls = super().compute_loss
            return self._own_losses.per_view(trls, model, inputs, return_outputs, num_items_in_batch)
        per_line = inputs.pop(ROWS_PER_LINE, None)
        branch_pass = self._branch_pass(None if per_line is None else tuple(per_line.tolist()), num_items_in_batch)
        competed: list[CompetitionOutput] = []

        def run(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)  # TRL's extra forward for `return_outputs`, by the active branch
            competed.append(model(branch_pass=branch_pass, **kwargs))
            return competed[0]

        result = super().compute_loss(run, inputs, return_outputs, num_items_in_batch)
        further = (self._pairwise_loss(competed[0]), self._rest_of_router_losses(competed[0]))
        further = [loss for loss in further if loss is not None]
        return (sum(further, start=result[0]), result[1]) if return_outputs else sum(further, start=result)

    def _rest_of_router_losses(self, output: CompetitionOutput) -> Tensor | None:
        """What TRL's term, a mean over branches, lacks for independent ones to have their routers' loss whole."""
        if not (self._settings.independent and self.aux_loss_enabled):
            return None
        others = len(self.comlora_model.competition_state.living) - 1
        return others * self.router_aux_loss_coef * output.aux_loss / self.current_gradient_accumulation_steps

    def _branch_pass(self, rows_per_line: tuple[int, ...] | None, normaliser: Tensor) -> BranchPass:
        plan, chunk = self._plan, self.args.comlora_branch_chunk
        if plan.owners is None:
            return BranchPass(eta=self._eta(), chunk=chunk)
        # TRL divides by M: a branch's own mean is over its own tokens
        weights = normaliser.to(self._sums.vector.dtype) / plan.branch_tokens.clamp(min=1)
        routers, state = None, self.comlora_model.competition_state
        if self.aux_loss_enabled:
            routers = plan.router_weights(self.state.global_step, state.living, state.k)
        return BranchPass(self._eta(), chunk, plan.owners[plan.used], rows_per_line, weights, routers)

    def _eta(self) -> float:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return annealing(progress, self._settings.annealing, self._settings.annealing_rate)

    def _pairwise_loss(self, output: CompetitionOutput) -> Tensor | None:
        """This micro-batch's pairwise loss, scaled for DDP's mean over processes; adds its figures to the step's."""
        scores, tokens, settings = output.scores, output.tokens, self._settings
        noise, num_rows = self._plan.next(self.args.seed, self.state.global_step, settings.k, tokens.device)
        if scores is None:
            self._sums.add(output.nll, output.ran, tokens, None, None)
            return None
        in_race = self.comlora_model.alive(tokens.device) & output.nll.isfinite().all(dim=1)
        loss = pairwise_loss(scores, mean_nll(output.nll, tokens), noise, tokens > 0, num_rows, settings, in_race)
        loss = loss * settings.pairwise_weight
        self._sums.add(output.nll, output.ran, tokens, output.probabilities, loss)
        return loss * self.accelerator.num_processes

    def _finish_step(self) -> None:
        """Ends an optimizer step: disqualifies diverged branches, counts the win and the cost, keeps the figures."""
        k, model, step = self._settings.k, self.comlora_model, self.state.global_step + 1
        state = model.competition_state
        self._norms = gradient_norms(model, self.accelerator)
        finite = self._norms.isfinite()
        self._norms = self._norms.where(finite, torch.zeros_like(self._norms))  # those gradients are dropped below
        if not self._has_loss_scaler:  # with one an overflow is no divergence
            self._sums.add_gradients(finite)
        figures = StepFigures(k, self.accelerator.reduce(self._sums.vector, reduction="sum").tolist())
        self._sums = StepSums(k, self.args.device)
        planned = cost(sum(self._plan.lines), len(state.living), self._plan.owners is not None)
        passes, self._own_losses.passes = self._own_losses.passes, None
        # A loss of the user's may run the model twice, or not at all
        state.row_passes += planned if passes is None else round(planned * passes / len(self._plan.places))
        for branch in [branch for branch in state.living if figures.diverged[branch]]:
            disqualify(model, branch, step)
        for branch in (*state.disqualified, *state.retired):
            sharding.drop_gradients(model.branch_parameters(branch))
        if figures.selector_diverged:
            drop_selector_gradient(model, step)
        if not state.living:
            raise RuntimeError(
                f"all {k} branches have diverged by step {step}: lower learning_rate={self.args.learning_rate}, or "
                "set max_grad_norm, and train again."
            )
        self._window.add_step(figures, self._eta(), state, self._settings)
        best = step_winner(figures, state.living)
        if best is not None:
            state.wins[best] += 1
        if self.is_deepspeed_enabled and not self._has_loss_scaler:
            # DeepSpeed's step follows at once; its own clipping would take all branches for one
            max_norm = sharding.take_over_clipping(self.deepspeed)
            if max_norm:
                clip_gradients(model, self._norms, max_norm)

    @property
    def _has_loss_scaler(self) -> bool:
        if self.is_deepspeed_enabled:
            return self.deepspeed.fp16_enabled()
        return self.accelerator.scaler is not None

    def _keep_disqualified(self) -> None:
        """DeepSpeed's optimizers move what has no gradient too, by their momentum."""
        model = self.comlora_model
        for branch in model.competition_state.disqualified:
            sharding.zero_weights(model.branch_parameters(branch))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips each branch and the selector by itself. A private seam of transformers: without it they are clipped
        together, by a norm that one of them can dominate."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model) if self._has_loss_scaler else self._norms[:-1].norm()
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
            self._norms = gradient_norms(self.comlora_model, self.accelerator)
        return clip_gradients(self.comlora_model, self._norms, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate for the rows of all branches; it counts the parameters once, not at every step."""
        tokens = inputs["input_ids"].numel()
        if self._flos_per_token is None:
            self._flos_per_token = super().floating_point_ops(inputs) / max(tokens, 1)
        shared = self._plan is not None and self._plan.owners is not None
        return int(self._flos_per_token * cost(tokens, len(self.comlora_model.competition_state.living), shared))

"""One competition among K branches, from its first step to its winner.

[`Competition`] owns everything that a competition knows: which branches are living, the plan and the figures of the
current optimizer step, the newest validation, the rungs behind it. It knows the branches, and no Trainer: a plain
PyTorch loop drives it as TRL's trainers do.

    competition.begin(total_steps)
    for batches in steps:                             # the micro-batches of one optimizer step
        competition.plan_step(batches)
        for batch in batches:
            rows = competition.rows_of(batch)         # which branch sees which row
            output = model(branch_pass=rows, fused_lm_head=True, use_cache=False, **batch)
            loss = -output.log_probs.sum() / competition.plan.tokens
            competition.combine(loss, output).backward()
        competition.end_step(max_norm=1.0)            # divergence, wins, cost, clipping of each branch
        optimizer.step()
        optimizer.zero_grad()
        competition.reach_rung(measure)               # measure() validates the living branches
    competition.select(measure)                       # the winner, eq. 11-12
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from comlora_trl import compat
from comlora_trl.branches.dealing import indices
from comlora_trl.branches.model import branch_name
from comlora_trl.competition import (
    CompetitionSettings,
    CompetitionState,
    ValidationTally,
    annealing,
    mean_nll,
    pairwise_loss,
)
from comlora_trl.competition.rungs import Rung, cost, retired_at, rung_record, rung_steps
from comlora_trl.training import sharding
from comlora_trl.training.model import BranchPass, ComLoRAModel, CompetitionOutput
from comlora_trl.training.step import (
    ROWS_PER_LINE,
    Counted,
    LogWindow,
    StepFigures,
    StepPlan,
    StepSums,
    step_winner,
    supervised_tokens,
)

logger = get_logger(__name__)

# The figure of a selection that each criterion reads, and whether its highest value is the best
CRITERIA = {
    "selector": ("scores", True),
    "validation_loss": ("validation_nll", False),
    "validation_accuracy": ("validation_accuracy", True),
}


class Competition:
    """The competition of a model's branches.

    Args:
        model: the branches and the selector, out of any wrapper.
        settings: what stays the same for a whole run.
        accelerator: for several processes and sharded weights; None for a single process.
        chunk: branches that run at a time, None for all at once.
        average_tokens: whether a loss is divided by the supervised tokens of all processes, as TRL's default is.
        router_loss: whether the loss has the load-balancing term of a mixture of experts.
        count: counts what a batch's loss is a mean over: its supervised tokens, or its pairs.

    Attributes:
        state: what a checkpoint stores: living, retired and disqualified branches, rates, wins, cost, the newest
            selection.
        step: optimizer steps done.
        total_steps: of the whole run; known once it has begun.
        plan: the rows, tokens and owners of the current optimizer step.
        rungs: the rungs of this run, by optimizer step.
        resumed: the checkpoint's state that this competition goes on from, None for a new one.
        grad_norm: norm of the branches' gradients together in the last step, before clipping.
    """

    def __init__(
        self,
        model: ComLoRAModel,
        settings: CompetitionSettings,
        accelerator: Accelerator | None = None,
        *,
        chunk: int | None = None,
        average_tokens: bool = True,
        router_loss: bool = False,
        count: Callable[[dict[str, Any]], Counted] = supervised_tokens,
    ) -> None:
        self.model, self.settings, self.accelerator, self.count = model, settings, accelerator, count
        self.chunk, self.average_tokens, self.router_loss = chunk, average_tokens, router_loss
        self.state = CompetitionState.new(settings.k)
        self.step, self.total_steps = 0, 0
        self.rungs: dict[int, Rung] = {}
        self.plan: StepPlan | None = None
        self.grad_norm: Tensor | None = None
        self.resumed: CompetitionState | None = None
        self._alive: dict[tuple[object, ...], Tensor] = {}
        self._begin_figures()

    # ---- Beginning ----

    def resume(self, state: CompetitionState) -> None:
        """Makes the next [`begin`] go on with a checkpoint's competition."""
        self.resumed, self.state = state, deepcopy(state)

    def reset(self) -> None:
        """Forgets the competition so far; branches that were out are redrawn, and take part again."""
        self.resumed = None
        for branch in self.state.retired:
            if branch_name(branch) not in self.model.peft_config:
                self.model.restore_branch(branch)
        self.model.redraw_branches([*self.state.disqualified, *self.state.retired])
        self.state = CompetitionState.new(self.settings.k)

    def begin(self, total_steps: int, step: int = 0) -> None:
        """Begins a competition, or goes on with the one of [`resume`]; again when a smaller batch is tried.

        Args:
            total_steps: optimizer steps of the whole run.
            step: optimizer steps done, of a run that goes on.

        Raises:
            ValueError: if two rungs, or one and the end of training, fall on one step.
        """
        if self.resumed is not None:
            self.state = deepcopy(self.resumed)
        else:
            self.model.redraw_branches(self.state.disqualified)
            self.state = CompetitionState.new(self.settings.k)
        self.state.rates = None if self.settings.rates is None else list(self.settings.rates)
        self.state.betas = None if self.settings.betas is None else list(self.settings.betas)
        self.state.measured = list(self.settings.measured)
        self.step, self.total_steps = step, total_steps
        self.rungs = rung_steps(self.settings.rungs, total_steps)
        self.plan = self.grad_norm = None
        self._begin_figures()
        self.follow_leader()

    def _begin_figures(self) -> None:
        self._sums = StepSums(self.settings.k, self.device)
        self._window = LogWindow(self.settings.k)
        self._passes: float | None = None  # of losses of the user's own, summed over the step's micro-batches

    @property
    def device(self) -> torch.device:
        """Where the figures of a step are summed."""
        return self.model.device if self.accelerator is None else self.accelerator.device

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    # ---- One optimizer step: plan, run, combine, end ----

    def plan_step(self, batches: Sequence[dict[str, Any]]) -> StepPlan | None:
        """Plans an optimizer step: counts its rows and tokens, and deals shared rows out among the living branches.

        Every process has to call it, with its own micro-batches.
        """
        self.plan = self._plan_of(batches)
        return self.plan

    def _plan_of(self, batches: Sequence[dict[str, Any]]) -> StepPlan | None:
        plan, state = StepPlan.of(list(batches), self.device, self.accelerator, self.count), self.state
        if plan is not None and self.settings.rows == "shared" and len(state.living) > 1:
            plan.deal(list(batches), self.step, state.living, state.k, self.accelerator, self.count)
        return plan

    def normaliser(self, plan: StepPlan | None) -> Tensor | None:
        """The supervised tokens that TRL divides a step's loss by (`num_items_in_batch`)."""
        if plan is None:
            return None
        return plan.tokens if self.average_tokens else plan.own_tokens

    @contextmanager
    def own_step(self, batch: dict[str, Any]) -> Iterator[Tensor]:
        """Takes a batch for a whole optimizer step, and leaves no trace: for a loss outside the loop.

        Yields:
            the step's supervised tokens.
        """
        kept = self.plan, self._sums, self._passes
        self.plan, self._sums = self._plan_of([batch]), StepSums(self.settings.k, self.device)
        try:
            yield self.normaliser(self.plan)
        finally:
            self.plan, self._sums, self._passes = kept

    def rows_of(self, inputs: dict[str, Any]) -> BranchPass:
        """Which branch sees which row of the next micro-batch, and with which weights.

        Args:
            inputs: the batch; its entry `rows_per_line`, which no model takes, is removed.
        """
        plan, state = self.plan, self.state
        owners, rows_per_line = self.deal_of(inputs)
        if owners is None:
            return self.branch_pass(eta=self.eta)
        # TRL divides by the step's tokens: a branch's own mean is over its own tokens
        tokens = self.normaliser(plan).to(self._sums.vector.dtype)
        return self.branch_pass(
            eta=self.eta,
            owners=owners,
            rows_per_line=None if rows_per_line is None else tuple(rows_per_line),
            branch_weights=tokens / plan.branch_tokens.clamp(min=1),
            router_weights=plan.router_weights(self.step, state.living, state.k) if self.router_loss else None,
        )

    def branch_pass(self, **how: Any) -> BranchPass:
        """A pass over all living branches, every one on every row unless said otherwise; see [`BranchPass`]."""
        state = self.state
        return BranchPass(
            settings=self.settings,
            living=tuple(state.living),
            remaining=state.remaining,
            alive=self.alive(self.model.device),
            chunk=self.chunk,
            **how,
        )

    @property
    def eta(self) -> float:
        """η(t), the weight of the alignment loss at this step (eq. 13-14)."""
        progress = self.step / max(self.total_steps, 1)
        return annealing(progress, self.settings.annealing, self.settings.annealing_rate)

    def alive(self, device: torch.device) -> Tensor:
        """bool [K], False for a branch that is out."""
        key = (device, *self.state.alive)
        if key not in self._alive:  # kept: a copy to the GPU waits for all that was launched before it
            self._alive = {key: torch.tensor(self.state.alive, device=device)}
        return self._alive[key]

    def combine(self, loss: Tensor, output: CompetitionOutput) -> Tensor:
        """L_total (eq. 10) of a micro-batch, whose figures are added to the step's.

        Args:
            loss: L_LM + L_align: the weighted rows of all branches over the step's tokens (eq. 4-5); for independent
                branches the sum of their own losses.
            output: of the pass that the loss was computed from.

        Returns:
            the loss, with the pairwise loss of eq. 6-9 where there is a selector.
        """
        scores, tokens, settings = output.scores, output.tokens, self.settings
        noise, num_rows = self.plan.next(settings.seed, self.step, settings.k, tokens.device)
        if scores is None:
            self._sums.add(output.nll, output.ran, tokens, None, None)
            return loss
        in_race = self.alive(tokens.device) & output.nll.isfinite().all(dim=1)
        pairs = pairwise_loss(scores, mean_nll(output.nll, tokens), noise, tokens > 0, num_rows, settings, in_race)
        pairs = pairs * settings.pairwise_weight
        self._sums.add(output.nll, output.ran, tokens, output.probabilities, pairs)
        return loss + pairs * self.processes  # DDP takes the mean over the processes

    def deal_of(self, inputs: dict[str, Any]) -> tuple[tuple[int, ...] | None, list[int] | None]:
        """The owner of each line of the next micro-batch, None where every branch sees all; rows of each packed line.

        Args:
            inputs: the batch; its entry `rows_per_line`, which no model takes, is removed.
        """
        per_line = inputs.pop(ROWS_PER_LINE, None)
        owners = None if self.plan.owners is None else self.plan.owners[self.plan.used]
        return owners, None if per_line is None else per_line.tolist()

    def combine_branches(
        self,
        losses: dict[int, Tensor],
        batch: dict[str, Any],
        owners: Sequence[int] | None = None,
        rows_per_line: Sequence[int] | None = None,
        passes: int | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """One loss of a micro-batch from a loss of each branch, whose figures are added to the step's.

        Args:
            losses: of each branch that has rows, divided by the step's tokens that the branch sees.
            batch: the micro-batch.
            owners, rows_per_line: of [`deal_of`].
            passes: passes of one branch over its rows that have run, None for one each.
            scale: what the Trainer multiplies the loss by before its backward.

        Returns:
            eq. 4, their mean; of independent branches their sum, so that each trains as it would alone.
        """
        plan, k = self.plan, self.settings.k
        tokens = self.count(batch).weights
        plan.next(self.settings.seed, self.step, k, tokens.device)
        items = plan.tokens.expand(k) if owners is None else plan.branch_tokens
        nll = torch.zeros(k, tokens.numel(), dtype=self._sums.vector.dtype, device=tokens.device)
        ran = torch.zeros(k, tokens.numel(), dtype=torch.bool, device=tokens.device)
        if owners is not None:
            by_row = indices(owners, tokens.device)
            if rows_per_line is not None:
                by_row = by_row.repeat_interleave(indices(rows_per_line, tokens.device))
            ran[by_row, torch.arange(len(by_row), device=tokens.device)] = True
        for branch, loss in losses.items():
            nll[branch, 0] = loss.detach().to(nll) * items[branch].to(nll) * scale / self.processes
            if owners is None:
                ran[branch] = True
        self._sums.add(nll, ran, tokens, None, None)
        self._passes = (self._passes or 0.0) + (len(losses) if passes is None else passes) / max(len(losses), 1)
        share = self.settings.lm_weight / (1 if self.settings.independent else self.state.remaining)
        # Selected, not multiplied: a diverged branch's nan stays out of the sum
        return share * sum(
            torch.where(loss.detach().isfinite(), loss, torch.zeros_like(loss)) for loss in losses.values()
        )

    def savepoint(self) -> Callable[[], None]:
        """What puts the step's figures back, when called, to what they are now: for a loss that is computed again."""
        plan, used, vector, passes = self.plan, self.plan.used, self._sums.vector.clone(), self._passes

        def restore() -> None:
            plan.used, self._sums.vector, self._passes = used, vector, passes

        return restore

    def end_step(self, max_norm: float = 0.0, loss_scaled: bool = False) -> Tensor:
        """Ends an optimizer step before the optimizer's own: divergence, wins, cost, and each branch's clipping.

        A branch whose loss or gradient is not finite is disqualified. Each branch is clipped by its own norm, and the
        selector by its own, so that a branch trains as it would alone. Every process has to call it.

        Args:
            max_norm: the norm to clip to, 0 for none.
            loss_scaled: whether a gradient scaler is in use, with which an overflow is no divergence.

        Returns:
            the norm of the branches' gradients together, before clipping.

        Raises:
            RuntimeError: if every branch has diverged.
        """
        k, state, step = self.settings.k, self.state, self.step + 1
        groups = [*map(self.model.branch_parameters, range(k)), self.model.selector_parameters()]
        norms = gradient_norms(groups, self.device, self.accelerator)
        finite = norms.isfinite()
        norms = norms.where(finite, torch.zeros_like(norms))  # those gradients are dropped below
        if not loss_scaled:
            self._sums.add_gradients(finite)
        vector, self._sums = self._sums.vector, StepSums(k, self.device)
        figures = StepFigures(k, (vector if self.processes == 1 else self._reduced(vector)).tolist())
        planned = cost(self.plan.row_count, len(state.living), self.plan.owners is not None)
        passes, self._passes = self._passes, None
        # A loss of the user's may run the model twice, or not at all
        state.row_passes += planned if passes is None else round(planned * passes / len(self.plan.places))
        for branch in [branch for branch in state.living if figures.diverged[branch]]:
            self._disqualify(branch, step)
        for branch in (*state.disqualified, *state.retired):
            sharding.drop_gradients(groups[branch])
        if figures.selector_diverged:
            logger.warning(f"the selector's gradient is not finite at step {step}: it is left out of this step.")
            sharding.drop_gradients(groups[k])
        if not state.living:
            raise RuntimeError(
                f"all {k} branches have diverged by step {step}: lower learning_rate"
                f"{'' if self.settings.learning_rate is None else f'={self.settings.learning_rate}'}, or set "
                "max_grad_norm, and train again."
            )
        self._window.add_step(figures, self.eta, state, self.settings)
        best = step_winner(figures, state.living) if self.settings.comparable else None
        if best is not None:
            state.wins[best] += 1
        if max_norm > 0:
            clip_gradients(groups, norms, max_norm)
        self.grad_norm = norms[:-1].norm()
        self.step = step
        return self.grad_norm

    def _reduced(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _disqualify(self, branch: int, step: int) -> None:
        """Takes a branch out for good: from here on it does not run, and its adapter is the base model."""
        self.state.disqualified[branch] = step
        logger.warning(
            f"branch_{branch} has diverged at step {step} and is disqualified: the others go on without it."
        )
        self.model.zero_branch(branch)

    def keep_disqualified(self) -> None:
        """Zeroes the disqualified branches again, after an optimizer that moves what has no gradient (DeepSpeed)."""
        for branch in self.state.disqualified:
            sharding.zero_weights(self.model.branch_parameters(branch))

    def window_figures(self) -> dict[str, float]:
        """The figures since the last call, as log entries `comlora/...`: means over steps, wins as counts."""
        return self._window.flush()

    # ---- Rungs and the winner ----

    @property
    def rung(self) -> Rung | None:
        """The rung that is due after the step that has just ended, None for none."""
        rung = self.rungs.get(self.step)
        return None if any(past["step"] == self.step for past in self.state.rungs) else rung

    def reach_rung(self, measure: Callable[[], ValidationTally]) -> dict[str, Any] | None:
        """Retires the worse branches if a rung is due.

        Args:
            measure: validates the living branches, see [`select`].

        Returns:
            the rung's record, with the branches that it retires; None where no rung is due. Their adapters are still
            in the model: [`drop_retired`] frees them.
        """
        rung, state = self.rung, self.state
        if rung is None:
            return None
        selection = self.select(measure)
        column, highest = CRITERIA[self.settings.winner_by]
        ties = selection["validation_nll"] if self.settings.comparable and column == "validation_accuracy" else None
        losers = retired_at(rung, selection[column], highest, ties)
        state.rungs.append(rung_record(rung, self.step, selection, losers))
        state.retired |= dict.fromkeys(losers, self.step)
        return state.rungs[-1]

    def drop_retired(self) -> None:
        """Frees the adapters of retired branches."""
        for branch in self.state.retired:
            if branch_name(branch) in self.model.peft_config:
                self.model.drop_branch(branch)

    @property
    def selected(self) -> bool:
        """Whether the branches have been validated at the present step."""
        return self.state.selection is not None and self.state.selection["step"] == self.step

    def select(self, measure: Callable[[], ValidationTally]) -> dict[str, Any]:
        """Makes the branch that is best on the validation set the leader (eq. 11-12).

        Args:
            measure: sums each living branch's figures over the validation set; not called again at the same step.

        Returns:
            the result, see [`ValidationTally.result`].

        Raises:
            RuntimeError: if there is no validation example, or every branch is disqualified.
        """
        if not self.selected:
            settings = self.settings
            tally = measure()
            self.state.selection = tally.result(self.state.alive, settings.winner_by, self.step, settings.comparable)
        self.follow_leader()
        return self.state.selection

    def follow_leader(self) -> None:
        """Makes the leader the adapter that the model's ordinary forward uses."""
        name = branch_name(self.state.leader)
        if self.model.active_adapter != name:
            self.model.set_adapter(name)


def gradient_norms(
    groups: Sequence[Sequence[nn.Parameter]], device: torch.device, accelerator: Accelerator | None = None
) -> Tensor:
    """Norms of the gradients of groups of parameters, [n], float32 or wider; 0 for a group without a gradient.

    Every process has to call it. The norms of all gradients are one launch, however many parameters there are.
    """
    if accelerator is not None and sharding.has_sharded_gradients(groups, accelerator):
        return sharding.norms(groups, device, accelerator)
    gradients = [_gradients(group) for group in groups]
    flat = [gradient for own in gradients for gradient in own]
    if not flat:
        return torch.zeros(len(groups), device=device)
    norms = torch.stack([norm.to(device) for norm in compat.foreach_norm(flat)])
    norms = norms if norms.dtype == torch.float64 else norms.float()
    return torch.stack([own.norm() for own in norms.split([len(own) for own in gradients])])


def clip_gradients(groups: Sequence[Sequence[nn.Parameter]], norms: Tensor, max_norm: float) -> None:
    """Scales each group's gradients to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        norms: of [`gradient_norms`].
    """
    # A factor of 1 changes nothing and needs no answer from the device
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for group, factor in zip(groups, factors, strict=True):
        if sharding.is_sharded(group[:1]):
            sharding.scale_gradients(group, factor)
        elif gradients := _gradients(group):
            compat.foreach_mul_(gradients, factor.to(gradients[0].device))


def _gradients(group: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in group if parameter.grad is not None]

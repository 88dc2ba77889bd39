"""One competition among K branches, from the first step to the winner.

[`Competition`] holds the state of a competition: which branches are living, the plan and the figures of the current
optimizer step, the newest validation, and the rungs so far. It does not depend on a Trainer. A plain PyTorch loop can
use it in the same way as TRL's trainers do:

    competition.begin(total_steps)
    for batches in steps:                             # the micro-batches of one optimizer step
        competition.plan_step(batches)
        for batch in batches:
            rows = competition.rows_of(batch)         # which branch sees which row
            output = model(branch_pass=rows, fused_lm_head=True, use_cache=False, **batch)
            loss = -output.log_probs.sum() / competition.plan.tokens
            competition.combine(loss, output).backward()
        competition.end_step(max_norm=1.0)            # disqualification, wins, cost, gradient clipping
        optimizer.step()
        optimizer.zero_grad()
        competition.reach_rung(measure)               # measure() validates the living branches
    competition.select(measure)                       # the winner, eq. 11-12
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from torch import Tensor, nn

from comlora_trl import compat
from comlora_trl.branches.batches import Rows, indices
from comlora_trl.branches.model import branch_name
from comlora_trl.competition import (
    CompetitionSettings,
    CompetitionState,
    ValidationTally,
    annealing,
    mean_nll,
    pairwise_loss,
    step_noise,
)
from comlora_trl.competition.rungs import Rung, dealt_to, retired_at, rung_record, rung_steps
from comlora_trl.training import sharding
from comlora_trl.training.model import BranchPass, ComLoRAModel, CompetitionOutput

logger = get_logger(__name__)

# For each criterion, the entry of a selection that it compares, and whether the highest value is the best
CRITERIA = {
    "selector": ("scores", True),
    "validation_loss": ("validation_nll", False),
    "validation_accuracy": ("validation_accuracy", True),
}
ROWS_PER_LINE = "rows_per_line"


class Competition:
    """The competition of a model's branches.

    Args:
        model: the branches and the selector, without any wrapper (DDP, FSDP, DeepSpeed).
        settings: the settings of the competition.
        accelerator: the accelerator, for several processes and sharded weights; None for a single process.
        chunk: number of branches that run at a time; None for all at once.
        average_tokens: whether a loss is divided by the supervised tokens of all processes, which is TRL's default.
        router_loss: whether the loss includes the load-balancing loss of a mixture of experts.
        count: counts the items of a batch that its loss is a mean over, such as supervised tokens or pairs; None for
            supervised tokens.

    Attributes:
        state: the state that a checkpoint stores: living, retired and disqualified branches, rates, wins, cost, and
            the newest selection.
        step: number of finished optimizer steps.
        total_steps: number of optimizer steps of the whole run; 0 before [`begin`].
        plan: the rows, tokens and owners of the current optimizer step.
        rungs: the rungs of this run, by optimizer step.
        resumed: the state of the checkpoint that this competition continues; None for a new competition.
        grad_norm: norm of the gradients of all branches together in the last step, before clipping.
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
        count: Callable[[dict[str, Any]], "Counted"] | None = None,
    ) -> None:
        self.model, self.settings, self.accelerator = model, settings, accelerator
        self.count = count or supervised_tokens
        self.chunk, self.average_tokens, self.router_loss = chunk, average_tokens, router_loss
        self.state = CompetitionState.new(settings.k)
        self.step, self.total_steps = 0, 0
        self.rungs: dict[int, Rung] = {}
        self.plan: StepPlan | None = None
        self.grad_norm: Tensor | None = None
        self.resumed: CompetitionState | None = None
        self._alive: dict[tuple[object, ...], Tensor] = {}
        self._begin_figures()

    # ---- The start ----

    def resume(self, state: CompetitionState) -> None:
        """Makes the next [`begin`] continue the competition of a checkpoint."""
        self.resumed, self.state = state, deepcopy(state)

    def reset(self) -> None:
        """Starts a new competition. Branches that were retired or disqualified get new weights and take part again."""
        self.resumed = None
        for branch in self.state.retired:
            if branch_name(branch) not in self.model.peft_config:
                self.model.restore_branch(branch)
        self.model.redraw_branches([*self.state.disqualified, *self.state.retired])
        self.state = CompetitionState.new(self.settings.k)

    def begin(self, total_steps: int, step: int = 0) -> None:
        """Begins a competition, or continues that of [`resume`].

        It may be called again, as when the Trainer tries a smaller batch size (`auto_find_batch_size`).

        Args:
            total_steps: number of optimizer steps of the whole run.
            step: number of optimizer steps that are done, in a run that continues.

        Raises:
            ValueError: if two rungs fall on the same step, or a rung falls on the last step.
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
        # Passes per branch that have run for losses of single branches, summed over the step's micro-batches
        self._passes: float | None = None

    @property
    def device(self) -> torch.device:
        """The device on which the figures of a step are summed."""
        return self.model.device if self.accelerator is None else self.accelerator.device

    @property
    def processes(self) -> int:
        """Number of processes that train together."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    # ---- One optimizer step: plan, run, combine, end ----

    def plan_step(self, batches: Sequence[dict[str, Any]]) -> "StepPlan | None":
        """Plans an optimizer step: counts its rows and tokens, and distributes shared rows among the living branches.

        All processes must call this.

        Args:
            batches: this process's micro-batches of the step.

        Returns:
            the plan; None if there are no micro-batches.
        """
        self.plan = self._plan_of(batches)
        return self.plan

    def _plan_of(self, batches: Sequence[dict[str, Any]]) -> "StepPlan | None":
        plan, state = StepPlan.of(list(batches), self.device, self.accelerator, self.count), self.state
        if plan is not None and self.settings.rows == "shared" and len(state.living) > 1:
            plan.deal(list(batches), self.step, state.living, state.k, self.accelerator, self.count)
        return plan

    def normaliser(self, plan: "StepPlan | None") -> Tensor | None:
        """The number of supervised tokens that TRL divides a step's loss by (`num_items_in_batch`)."""
        if plan is None:
            return None
        return plan.tokens if self.average_tokens else plan.own_tokens

    @contextmanager
    def own_step(self, batch: dict[str, Any]) -> Iterator[Tensor]:
        """Within the block, a batch counts as a whole optimizer step. Afterwards, plan and figures are restored.

        It is used for a loss that is computed outside the training loop.

        Yields:
            the number of supervised tokens of the batch.
        """
        kept = self.plan, self._sums, self._passes
        self.plan, self._sums = self._plan_of([batch]), StepSums(self.settings.k, self.device)
        try:
            yield self.normaliser(self.plan)
        finally:
            self.plan, self._sums, self._passes = kept

    def rows_of(self, inputs: dict[str, Any]) -> BranchPass:
        """The pass for the next micro-batch: which branch sees which row, and with which weights.

        Args:
            inputs: the batch. The entry `rows_per_line` is removed, because models do not accept it.
        """
        plan, state = self.plan, self.state
        owners, rows_per_line = self.deal_of(inputs)
        if owners is None:
            return self.branch_pass(eta=self.eta)
        # TRL divides by all tokens of the step, but the mean of a branch is over the tokens of its own rows
        tokens = self.normaliser(plan).to(self._sums.vector.dtype)
        return self.branch_pass(
            eta=self.eta,
            owners=owners,
            rows_per_line=None if rows_per_line is None else tuple(rows_per_line),
            branch_weights=tokens / plan.branch_tokens.clamp(min=1),
            router_weights=plan.router_weights(self.step, state.living, state.k) if self.router_loss else None,
        )

    def branch_pass(self, **how: Any) -> BranchPass:
        """A pass over all living branches. Without other arguments, each branch sees every row; see [`BranchPass`]."""
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
        """bool [K], False for a branch that is retired or disqualified."""
        key = (device, *self.state.alive)
        if key not in self._alive:  # cached, because a copy to the GPU waits for all earlier work there
            self._alive = {key: torch.tensor(self.state.alive, device=device)}
        return self._alive[key]

    def combine(self, loss: Tensor, output: CompetitionOutput) -> Tensor:
        """Computes L_total (eq. 10) of a micro-batch and adds the micro-batch's figures to those of the step.

        Args:
            loss: L_LM + L_align, the weighted rows of all branches divided by the step's tokens (eq. 4-5). For
                independent branches, the sum of their losses.
            output: the output of the pass that the loss was computed from.

        Returns:
            the loss, plus the pairwise loss of eq. 6-9 if there is a selector.
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
        return loss + pairs * self.processes  # DDP averages the gradients over the processes

    def deal_of(self, inputs: dict[str, Any]) -> tuple[tuple[int, ...] | None, list[int] | None]:
        """The distribution of the next micro-batch among the branches.

        Args:
            inputs: the batch. The entry `rows_per_line` is removed, because models do not accept it.

        Returns:
            the owner of each line, or None if every branch sees all lines; and the number of rows of each packed line,
            or None if the batch has no such entry.
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
        """Combines the losses of the branches on a micro-batch, and adds their figures to those of the step.

        Args:
            losses: the loss of each branch that has rows, divided by the step's tokens that the branch sees.
            batch: the micro-batch.
            owners, rows_per_line: the result of [`deal_of`].
            passes: number of passes of one branch over its rows that have run; None for one for each branch.
            scale: the factor by which the Trainer multiplies the loss before its backward.

        Returns:
            the mean of the losses (eq. 4); for independent branches their sum, so that each branch trains as it would
            in a run with one branch.
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
        # Selected, not multiplied, because 0 * nan is nan: the loss of a diverged branch must not reach the sum
        return share * sum(
            torch.where(loss.detach().isfinite(), loss, torch.zeros_like(loss)) for loss in losses.values()
        )

    def savepoint(self) -> Callable[[], None]:
        """Returns a function that restores the step's present figures, for a loss that is computed again."""
        plan, used, vector, passes = self.plan, self.plan.used, self._sums.vector.clone(), self._passes

        def restore() -> None:
            plan.used, self._sums.vector, self._passes = used, vector, passes

        return restore

    def end_step(self, max_norm: float = 0.0, loss_scaled: bool = False) -> Tensor:
        """Ends an optimizer step. Call it after the backward passes and before `optimizer.step()`.

        A branch whose loss or gradient is not finite is disqualified. The gradients of each branch, and of the
        selector, are clipped by their own norm, so that a branch trains as it would in a run with one branch. Wins and
        cost are counted. All processes must call this.

        Args:
            max_norm: the norm to clip to; 0 for no clipping.
            loss_scaled: whether a gradient scaler is in use. An overflow of gradients then does not disqualify a
                branch.

        Returns:
            the norm of the gradients of all branches together, before clipping.

        Raises:
            RuntimeError: if every branch has diverged.
        """
        k, state, step = self.settings.k, self.state, self.step + 1
        groups = [*map(self.model.branch_parameters, range(k)), self.model.selector_parameters()]
        norms = gradient_norms(groups, self.device, self.accelerator)
        finite = norms.isfinite()
        norms = norms.where(finite, torch.zeros_like(norms))  # non-finite gradients are dropped below
        if not loss_scaled:
            self._sums.add_gradients(finite)
        vector, self._sums = self._sums.vector, StepSums(k, self.device)
        figures = StepFigures(k, (vector if self.processes == 1 else self._reduced(vector)).tolist())
        planned = self.plan.row_passes(len(state.living))
        passes, self._passes = self._passes, None
        # A user's loss may run the model several times or not at all
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
            clip_gradients(groups, norms, max_norm, self.accelerator)
        self.grad_norm = norms[:-1].norm()
        self.step = step
        return self.grad_norm

    def _reduced(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _disqualify(self, branch: int, step: int) -> None:
        """Disqualifies a branch: it does not run any more, and its adapter is set to zero."""
        self.state.disqualified[branch] = step
        logger.warning(
            f"branch_{branch} has diverged at step {step} and is disqualified: the others go on without it."
        )
        self.model.zero_branch(branch)

    def keep_disqualified(self) -> None:
        """Sets the disqualified branches to zero again. DeepSpeed's optimizer changes parameters without gradients."""
        for branch in self.state.disqualified:
            sharding.zero_weights(self.model.branch_parameters(branch))

    def window_figures(self) -> dict[str, float]:
        """The figures since the last call, as log entries `comlora/...`: means over the steps, and counts of wins."""
        return self._window.flush()

    # ---- Rungs and the winner ----

    @property
    def rung(self) -> Rung | None:
        """The rung that is due after the last step; None if none is due."""
        rung = self.rungs.get(self.step)
        return None if any(past["step"] == self.step for past in self.state.rungs) else rung

    @property
    def rungs_left(self) -> bool:
        """Whether a rung is due at this step or later."""
        return any(step > self.step or (step == self.step and self.rung is not None) for step in self.rungs)

    def reach_rung(
        self, measure: Callable[[], ValidationTally], average: float | None = None
    ) -> dict[str, Any] | None:
        """Retires the worse branches if a rung is due.

        The adapters of retired branches stay in the model until [`drop_retired`] is called.

        Args:
            measure: validates the living branches, see [`select`].
            average: the horizon, if averages of the weights are validated.

        Returns:
            the rung's record, see [`rung_record`]; None if no rung is due.
        """
        rung, state = self.rung, self.state
        if rung is None:
            return None
        selection = self.select(measure, average)
        column, highest = CRITERIA[self.settings.winner_by]
        ties = selection["validation_nll"] if self.settings.comparable and column == "validation_accuracy" else None
        losers = retired_at(rung, selection[column], highest, ties)
        state.rungs.append(rung_record(rung, self.step, selection, losers))
        state.retired |= dict.fromkeys(losers, self.step)
        return state.rungs[-1]

    def drop_retired(self) -> None:
        """Deletes the adapters of retired branches."""
        for branch in self.state.retired:
            if branch_name(branch) in self.model.peft_config:
                self.model.drop_branch(branch)

    @property
    def selected(self) -> bool:
        """Whether there has been a selection by the trained weights at the present step."""
        selection = self.state.selection
        return selection is not None and selection["step"] == self.step and selection.get("average") is None

    def select(self, measure: Callable[[], ValidationTally], average: float | None = None) -> dict[str, Any]:
        """Selects the branch that is best on the validation set as the leader (eq. 11-12).

        Args:
            measure: sums the figures of each living branch over the validation set. It is not called if there has been
                a selection by the trained weights at this step.
            average: the horizon, if averages of the weights are validated.

        Returns:
            the selection, see [`ValidationTally.result`].

        Raises:
            RuntimeError: if there is no validation example, or every branch is disqualified.
        """
        if not self.selected:
            settings = self.settings
            tally = measure()
            result = tally.result(self.state.alive, settings.winner_by, self.step, settings.comparable)
            self.state.selection = result | {"average": average}
        self.follow_leader()
        return self.state.selection

    def follow_leader(self) -> None:
        """Makes the leader the active adapter, which an ordinary forward of the model uses."""
        name = branch_name(self.state.leader)
        if self.model.active_adapter != name:
            self.model.set_adapter(name)


# ---- One optimizer step: the plan of its rows before it runs, and its figures afterwards ----


class Counted(NamedTuple):
    """The counts of a batch.

    Attributes:
        lines: number of lines. If rows are shared, each line goes to one branch as a whole.
        weights: the weight of each row in a loss that is a mean over the step, int64 [R]: its number of supervised
            tokens, or 1.
    """

    lines: int
    weights: Tensor


def supervised_tokens(batch: dict[str, Any]) -> Counted:
    """Counts a batch with `labels`, whose loss is a mean over supervised tokens."""
    rows = Rows.of(batch)
    return Counted(_lines(rows, batch), rows.supervised_tokens(batch["labels"]))


@dataclass
class StepPlan:
    """The plan of an optimizer step: the positions of this process's micro-batches in it, and its counts.

    The rows of a step are numbered micro-batch by micro-batch, and process by process within a micro-batch. This is
    the order in which accelerate distributes a data set. So a row has the same number, and therefore the same noise
    and the same branch, for every division of the step into micro-batches and processes. A line is a row, or an
    example of a packed batch with all its rows.

    Attributes:
        places: (first row, number of rows) of each of this process's micro-batches.
        rows: number of rows of the whole step.
        supervised_rows: number of rows with a supervised token in the whole step, an int64 tensor [].
        tokens: M, the number of supervised tokens of the whole step, an int64 tensor [].
        own_tokens: number of supervised tokens of this process, an int64 tensor [].
        line_places: (first line, number of lines) of each of this process's micro-batches.
        lines: number of lines of each micro-batch of the whole step, process by process.
        owners: for each of this process's micro-batches, the branch of each line; None if rows are not shared.
        branch_tokens: number of supervised tokens of each branch in the whole step, [K]; None if rows are not shared.
        used: number of this process's micro-batches that have run.
        noise: ε of the whole step; None before the first micro-batch.
    """

    places: list[tuple[int, int]]
    rows: int
    supervised_rows: Tensor
    tokens: Tensor
    own_tokens: Tensor
    line_places: list[tuple[int, int]]
    lines: list[int]
    owners: list[tuple[int, ...]] | None = None
    branch_tokens: Tensor | None = None
    used: int = 0
    noise: Tensor | None = None

    @classmethod
    def of(
        cls,
        batches: list[dict[str, Any]],
        device: torch.device,
        accelerator: Accelerator | None = None,
        count: Callable[[dict[str, Any]], Counted] = supervised_tokens,
    ) -> "StepPlan | None":
        """Counts the micro-batches of a step over all processes.

        Args:
            batches: this process's micro-batches.
            device: the device of the counts.
            accelerator: the accelerator; None for a single process.
            count: counts a batch.

        Returns:
            the plan; None if there are no batches.
        """
        if not batches:
            return None
        counted = [count(batch) for batch in batches]
        own_sizes = [(weights.numel(), lines) for lines, weights in counted]
        counts = torch.stack([torch.stack([(own.weights > 0).sum(), own.weights.sum()]) for own in counted])
        counts = counts.to(device)
        own = counts[:, 1].sum()
        if accelerator is None or accelerator.num_processes == 1:
            # The numbers of rows and lines are known on the host, so the device is not read
            sizes, rank = [[size] for size in own_sizes], 0
            supervised, tokens = counts[:, 0].sum(), own
        else:
            gathered = accelerator.gather(torch.cat([counts, torch.tensor(own_sizes).to(counts)], dim=1)[None])
            sizes, rank = gathered[..., 2:].transpose(0, 1).tolist(), accelerator.process_index
            supervised, tokens = gathered[..., 0].sum(), gathered[..., 1].sum()
        row_places, row_count = _places([[size[0] for size in micro_batch] for micro_batch in sizes], rank)
        line_counts = [[size[1] for size in micro_batch] for micro_batch in sizes]
        line_places, _ = _places(line_counts, rank)
        return cls(row_places, row_count, supervised, tokens, own, line_places, [*chain(*line_counts)])

    def deal(
        self,
        batches: list[dict[str, Any]],
        step: int,
        living: list[int],
        k: int,
        accelerator: Accelerator | None = None,
        count: Callable[[dict[str, Any]], Counted] = supervised_tokens,
    ) -> "StepPlan":
        """Distributes the step's lines among the living branches, and counts the tokens of each branch in all
        processes.

        Args:
            batches: this process's micro-batches.
            step: the optimizer step.
            living: the living branches.
            k: number of branches.
            accelerator: the accelerator; None for a single process.
            count: counts a batch.

        Returns:
            the plan itself.
        """
        self.owners = [
            tuple(dealt_to(first + line, step, living) for line in range(lines)) for first, lines in self.line_places
        ]
        own = torch.zeros(k, dtype=torch.long, device=self.tokens.device)
        for batch, owners in zip(batches, self.owners, strict=True):
            tokens = count(batch).weights
            per_line = batch.get(ROWS_PER_LINE)
            by_row = indices(owners, tokens.device)
            if per_line is not None:
                by_row = by_row.repeat_interleave(per_line.to(tokens.device))
            own += torch.zeros_like(own, device=tokens.device).index_add(0, by_row, tokens[: by_row.numel()]).to(own)
        several = accelerator is not None and accelerator.num_processes > 1
        self.branch_tokens = accelerator.reduce(own, reduction="sum") if several else own
        return self

    def router_weights(self, step: int, living: list[int], k: int) -> Tensor:
        """The weights of the branches' load-balancing losses if rows are shared, [K], on the CPU.

        The weighted losses are summed over the branches and averaged over all micro-batches. With these weights, the
        result is the mean over the living branches of each branch's mean over the micro-batches in which it has lines.
        """
        having_lines, first = torch.zeros(k), 0
        for count in self.lines:
            having_lines[[*{dealt_to(first + line, step, living) for line in range(count)}]] += 1
            first += count
        return len(self.lines) / (len(living) * having_lines.clamp(min=1))

    def row_passes(self, living: int) -> int:
        """The cost of the step in row passes, see [`CompetitionState`]. Each row of a packed line counts.

        Args:
            living: number of living branches.
        """
        return self.rows * (1 if self.owners is not None else living)

    def next(self, seed: int, step: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Moves on to the next micro-batch.

        Returns:
            the noise ε of its rows, [R, K], and the number of rows with supervised tokens in the whole step.
        """
        if self.noise is None:
            self.noise = step_noise(seed, step, self.rows, k)
        first, count = self.places[self.used]
        self.used += 1
        return self.noise[first : first + count].to(device, non_blocking=True), self.supervised_rows


class LineCollator:
    """A collator that adds the number of rows of each example to a packed batch, as the entry `rows_per_line`.

    A packed example holds several sequences. If rows are shared, it goes to one branch as a whole.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.collator(examples, *args, **kwargs)
        rows = [len(example["seq_lengths"]) if "seq_lengths" in example else 1 for example in examples]
        return {**batch, ROWS_PER_LINE: torch.tensor(rows)}


def _places(sizes: list[list[int]], rank: int) -> tuple[list[tuple[int, int]], int]:
    """The (first, count) of one process's part of each micro-batch, and the total count.

    Args:
        sizes: for each micro-batch, the count of each process.
        rank: the process.
    """
    places, first = [], 0
    for micro_batch in sizes:
        places.append((first + sum(micro_batch[:rank]), micro_batch[rank]))
        first += sum(micro_batch)
    return places, first


def _lines(rows: Rows, batch: dict[str, Any]) -> int:
    per_line = batch.get(ROWS_PER_LINE)
    return rows.count if per_line is None else per_line.numel()


class StepSums:
    """Sums over the micro-batches of one optimizer step, in one vector, so that a single reduction is enough.

    Attributes:
        vector: [4·K + 4], float64 where the device has it. For each branch: S, m, p, and the number of non-finite
            losses and gradients. Then: the number of non-finite gradients of the selector, Σ p·S, L_pair, and the
            number of rows with a supervised token.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.k = k
        # MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.vector = torch.zeros(4 * k + 4, dtype=dtype, device=device)

    def add(
        self, nll: Tensor, ran: Tensor, tokens: Tensor, probabilities: Tensor | None, pairwise: Tensor | None
    ) -> None:
        """Adds a micro-batch.

        Args:
            nll: S, the summed negative log-likelihood of each row under each branch, [K, R].
            ran: whether a row has run through a branch, bool [K, R].
            tokens: m, the supervised tokens of each row, [R].
            probabilities: p, [R, K]; None without a selector.
            pairwise: the micro-batch's part of L_pair; None without a selector.
        """
        k, supervised = self.k, tokens > 0
        finite = nll.isfinite()
        nll = torch.where(finite, nll, torch.zeros_like(nll))
        self.vector[:k] += nll.sum(dim=1)
        self.vector[k : 2 * k] += (ran * tokens).sum(dim=1)
        self.vector[3 * k : 4 * k] += (~finite.all(dim=1)).to(self.vector.dtype)
        self.vector[-1] += supervised.sum()
        if probabilities is not None:
            probabilities = probabilities * supervised[:, None]
            self.vector[2 * k : 3 * k] += probabilities.sum(dim=0)
            self.vector[-3] += (probabilities.T * nll).sum()
        if pairwise is not None:
            self.vector[-2] += pairwise.detach()

    def add_gradients(self, finite: Tensor) -> None:
        """Adds whether the gradients of the K branches and the selector are finite, bool [K + 1]."""
        self.vector[3 * self.k : -3] += (~finite).to(self.vector)


@dataclass(frozen=True)
class StepFigures:
    """The sums of [`StepSums`] over all processes, on the host."""

    k: int
    values: list[float]

    def __post_init__(self) -> None:
        assert len(self.values) == 4 * self.k + 4

    @property
    def nll(self) -> list[float]:
        """Mean NLL of each branch on the rows that it saw, in nats per token."""
        k = self.k
        return [s / max(m, 1.0) for s, m in zip(self.values[:k], self.values[k : 2 * k], strict=True)]

    @property
    def tokens(self) -> list[float]:
        """Number of supervised tokens that each branch saw."""
        return self.values[self.k : 2 * self.k]

    @property
    def probabilities(self) -> list[float]:
        """p of each branch, summed over the rows."""
        return self.values[2 * self.k : 3 * self.k]

    @property
    def diverged(self) -> list[bool]:
        """Whether each branch had a loss or a gradient that is not finite."""
        return [value > 0 for value in self.values[3 * self.k : 4 * self.k]]

    @property
    def selector_diverged(self) -> bool:
        """Whether the selector had a gradient that is not finite."""
        return self.values[-4] > 0

    @property
    def weighted_nll(self) -> float:
        """Σ p·S."""
        return self.values[-3]

    @property
    def pairwise(self) -> float:
        """L_pair (eq. 9)."""
        return self.values[-2]

    @property
    def rows(self) -> float:
        """Number of rows with a supervised token."""
        return self.values[-1]


@dataclass
class LogWindow:
    """The figures between two logs of the Trainer, as entries `comlora/...`."""

    k: int
    steps: list[dict[str, float]] = field(default_factory=list)

    def add_step(
        self, figures: StepFigures, eta: float, state: CompetitionState, settings: CompetitionSettings
    ) -> None:
        """Adds a finished step. Retired and disqualified branches have no entries."""
        rows, losses = max(figures.rows, 1.0), figures.nll
        entry = {f"comlora/loss_{branch}": losses[branch] for branch in state.living}
        if settings.independent:
            entry["comlora/lm_loss"] = settings.lm_weight * sum(losses[k] for k in state.living) / len(state.living)
        else:
            if figures.rows:
                entry |= {
                    f"comlora/probability_{branch}": figures.probabilities[branch] / rows for branch in state.living
                }
            tokens = max(max(figures.tokens), 1.0)
            entry["comlora/eta"] = eta
            entry["comlora/lm_loss"] = settings.lm_weight * sum(losses[k] for k in state.living) / state.remaining
            weight = settings.sign * settings.alignment_weight * eta
            entry["comlora/alignment_loss"] = weight * figures.weighted_nll / tokens
            entry["comlora/pairwise_loss"] = figures.pairwise
        if len(state.living) > 1 and settings.comparable:
            best = step_winner(figures, state.living)
            entry |= {f"comlora/wins_{branch}": float(branch == best) for branch in state.living}
        self.steps.append(entry)

    def flush(self) -> dict[str, float]:
        """Returns the entries as means over the steps that have them (wins as sums), and starts a new window."""
        steps, self.steps = self.steps, []
        logs = {}
        for name in dict.fromkeys(name for step in steps for name in step):
            values = [step[name] for step in steps if name in step]
            counted = name.startswith("comlora/wins_")
            logs[name] = sum(values) if counted else sum(values) / len(values)
        return logs


def step_winner(figures: StepFigures, living: list[int]) -> int | None:
    """The branch with the lowest NLL in a step; None if fewer than two living branches saw a supervised token."""
    racing = [branch for branch in living if figures.tokens[branch]]
    return min(racing, key=lambda branch: figures.nll[branch]) if len(racing) > 1 else None


# ---- Gradients ----


def gradient_norms(
    groups: Sequence[Sequence[nn.Parameter]], device: torch.device, accelerator: Accelerator | None = None
) -> Tensor:
    """The norm of the gradients of each of n groups of parameters.

    All processes must call this. The norms of all gradients are computed in one launch.

    Returns:
        [n], float32 or float64; 0 for a group without gradients.
    """
    if _may_be_sharded(accelerator) and sharding.has_sharded_gradients(groups, accelerator):
        return sharding.norms(groups, device, accelerator)
    gradients = [_gradients(group) for group in groups]
    flat = [gradient for own in gradients for gradient in own]
    if not flat:
        return torch.zeros(len(groups), device=device)
    found = compat.foreach_norm(flat)
    if len({norm.device for norm in found}) > 1:  # the model is split over several devices
        found = [norm.to(device) for norm in found]
    norms = torch.stack(found).to(device)
    norms = norms if norms.dtype == torch.float64 else norms.float()
    return torch.stack([own.norm() for own in norms.split([len(own) for own in gradients])])


def clip_gradients(
    groups: Sequence[Sequence[nn.Parameter]], norms: Tensor, max_norm: float, accelerator: Accelerator | None = None
) -> None:
    """Scales the gradients of each group to a norm of at most `max_norm`, like `torch.nn.utils.clip_grad_norm_`.

    Args:
        groups: groups of parameters.
        norms: the result of [`gradient_norms`], [n].
        max_norm: the largest norm.
        accelerator: the accelerator; None for a single process.
    """
    # Small gradients are multiplied by 1, so that the host need not read the norms from the device
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for group, factor in zip(groups, factors, strict=True):
        if _may_be_sharded(accelerator) and sharding.is_sharded(group[:1]):
            sharding.scale_gradients(group, factor)
        elif gradients := _gradients(group):
            compat.foreach_mul_(gradients, factor.to(gradients[0].device))


def _may_be_sharded(accelerator: Accelerator | None) -> bool:
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return accelerator is not None and accelerator.distributed_type in kinds


def _gradients(group: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in group if parameter.grad is not None]

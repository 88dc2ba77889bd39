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

# The figure of a selection that each criterion reads, and whether its highest value is the best
CRITERIA = {
    "selector": ("scores", True),
    "validation_loss": ("validation_nll", False),
    "validation_accuracy": ("validation_accuracy", True),
}
ROWS_PER_LINE = "rows_per_line"


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

    def plan_step(self, batches: Sequence[dict[str, Any]]) -> "StepPlan | None":
        """Plans an optimizer step: counts its rows and tokens, and deals shared rows out among the living branches.

        Every process has to call it, with its own micro-batches.
        """
        self.plan = self._plan_of(batches)
        return self.plan

    def _plan_of(self, batches: Sequence[dict[str, Any]]) -> "StepPlan | None":
        plan, state = StepPlan.of(list(batches), self.device, self.accelerator, self.count), self.state
        if plan is not None and self.settings.rows == "shared" and len(state.living) > 1:
            plan.deal(list(batches), self.step, state.living, state.k, self.accelerator, self.count)
        return plan

    def normaliser(self, plan: "StepPlan | None") -> Tensor | None:
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
        planned = self.plan.row_passes(len(state.living))
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
            clip_gradients(groups, norms, max_norm, self.accelerator)
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


# ---- One optimizer step: the plan of its rows before it runs, and its figures afterwards ----


class Counted(NamedTuple):
    """What a batch is counted by.

    Attributes:
        lines: lines of the batch, each of which goes to one branch whole where rows are shared.
        weights: what each row weighs in a loss that is a mean over the step, int64 [R]: its supervised tokens, or 1.
    """

    lines: int
    weights: Tensor


def supervised_tokens(batch: dict[str, Any]) -> Counted:
    """Counts a batch with `labels`: the mean is over its supervised tokens."""
    rows = Rows.of(batch)
    return Counted(_lines(rows, batch), rows.supervised_tokens(batch["labels"]))


@dataclass
class StepPlan:
    """Where this process's micro-batches lie within the optimizer step.

    Rows and lines are counted micro-batch by micro-batch, and process by process within one, which is the order in
    which accelerate deals out a data set: the same row has the same place, and so the same noise and the same branch,
    however the step is cut. A line is a row, or an example of a packed batch with all its rows.

    Attributes:
        places: (first row, rows) of each of this process's micro-batches.
        rows: rows of the whole step.
        supervised_rows: those with a supervised token, an int64 tensor.
        tokens: M, supervised tokens of the whole step, an int64 tensor.
        own_tokens: those of this process.
        line_places: (first line, lines) of each micro-batch.
        lines: lines of each micro-batch of the whole step, process by process.
        owners: the branch of each line of each micro-batch, where rows are shared.
        branch_tokens: M of each branch, [K], where rows are shared.
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
        """Counts a step's micro-batches, over all processes; None when there is no batch.

        Args:
            device: where the counts are kept.
            accelerator: None for a single process.
            count: counts a batch.
        """
        if not batches:
            return None
        counted = [count(batch) for batch in batches]
        hosts = [(weights.numel(), lines) for lines, weights in counted]
        counts = torch.stack([torch.stack([(own.weights > 0).sum(), own.weights.sum()]) for own in counted])
        counts = counts.to(device)
        own = counts[:, 1].sum()
        if accelerator is None or accelerator.num_processes == 1:
            # rows and lines are known on the host, no transfer needed
            sizes, rank = [[size] for size in hosts], 0
            supervised, tokens = counts[:, 0].sum(), own
        else:
            gathered = accelerator.gather(torch.cat([counts, torch.tensor(hosts).to(counts)], dim=1)[None])
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
        """Deals the step's lines out among the living branches, and counts each branch's tokens over all processes."""
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
        """Weights of the branches' load-balancing losses where rows are shared, [K], on the CPU.

        They make the mean over the living branches of each one's mean over the micro-batches that it has lines of, out
        of sums over branches and means over all micro-batches.
        """
        having_lines, first = torch.zeros(k), 0
        for count in self.lines:
            having_lines[[*{dealt_to(first + line, step, living) for line in range(count)}]] += 1
            first += count
        return len(self.lines) / (len(living) * having_lines.clamp(min=1))

    def row_passes(self, living: int) -> int:
        """The step's cost: rows through one branch, forward and backward; a packed line of shared rows counts once."""
        return sum(self.lines) * (1 if self.owners is not None else living)

    def next(self, seed: int, step: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The noise ε [R, K] of the next micro-batch's rows, and the step's number of rows with supervised tokens."""
        if self.noise is None:
            self.noise = step_noise(seed, step, self.rows, k)
        first, count = self.places[self.used]
        self.used += 1
        return self.noise[first : first + count].to(device, non_blocking=True), self.supervised_rows


class LineCollator:
    """A collator that also says how many rows each example of a packed batch brings.

    A packed example holds several sequences, and goes to one branch whole.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.collator(examples, *args, **kwargs)
        rows = [len(example["seq_lengths"]) if "seq_lengths" in example else 1 for example in examples]
        return {**batch, ROWS_PER_LINE: torch.tensor(rows)}


def _places(sizes: list[list[int]], rank: int) -> tuple[list[tuple[int, int]], int]:
    """(first, count) of one process's part of each micro-batch, and the number in all."""
    places, first = [], 0
    for micro_batch in sizes:
        places.append((first + sum(micro_batch[:rank]), micro_batch[rank]))
        first += sum(micro_batch)
    return places, first


def _lines(rows: Rows, batch: dict[str, Any]) -> int:
    per_line = batch.get(ROWS_PER_LINE)
    return rows.count if per_line is None else per_line.numel()


class StepSums:
    """Sums over the micro-batches of one optimizer step, in one float64 vector so that one reduction suffices.

    Attributes:
        vector: S [K], m [K], p [K], micro-batches with a non-finite loss or gradients that are not finite [K], of the
            branches; then non-finite gradients of the selector, Σ p·S, L_pair, rows with a supervised token.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.k = k
        # float64 is not known to every accelerator (MPS)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.vector = torch.zeros(4 * k + 4, dtype=dtype, device=device)

    def add(
        self, nll: Tensor, ran: Tensor, tokens: Tensor, probabilities: Tensor | None, pairwise: Tensor | None
    ) -> None:
        """Adds a micro-batch: S [K, R], which rows ran [K, R], m [R], p [R, K] or None, L_pair's share or None."""
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
    """[`StepSums`] of all processes, on the host."""

    k: int
    values: list[float]

    def __post_init__(self) -> None:
        assert len(self.values) == 4 * self.k + 4

    @property
    def nll(self) -> list[float]:
        """Mean NLL of each branch on the rows it saw."""
        k = self.k
        return [s / max(m, 1.0) for s, m in zip(self.values[:k], self.values[k : 2 * k], strict=True)]

    @property
    def tokens(self) -> list[float]:
        """Supervised tokens that each branch saw."""
        return self.values[self.k : 2 * self.k]

    @property
    def probabilities(self) -> list[float]:
        """p summed over the rows, of each branch."""
        return self.values[2 * self.k : 3 * self.k]

    @property
    def diverged(self) -> list[bool]:
        """Whether each branch had a loss or a gradient that is not finite."""
        return [value > 0 for value in self.values[3 * self.k : 4 * self.k]]

    @property
    def selector_diverged(self) -> bool:
        return self.values[-4] > 0

    @property
    def weighted_nll(self) -> float:
        """Σ p·S."""
        return self.values[-3]

    @property
    def pairwise(self) -> float:
        return self.values[-2]

    @property
    def rows(self) -> float:
        """Rows with a supervised token."""
        return self.values[-1]


@dataclass
class LogWindow:
    """Averages between two logs of the Trainer, as the entries `comlora/...`."""

    k: int
    steps: list[dict[str, float]] = field(default_factory=list)

    def add_step(
        self, figures: StepFigures, eta: float, state: CompetitionState, settings: CompetitionSettings
    ) -> None:
        """Adds a finished step; branches that are out have no entries."""
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
        """The window's entries, means over the steps that have them (wins are counts), and begins the next window."""
        steps, self.steps = self.steps, []
        logs = {}
        for name in dict.fromkeys(name for step in steps for name in step):
            values = [step[name] for step in steps if name in step]
            counted = name.startswith("comlora/wins_")
            logs[name] = sum(values) if counted else sum(values) / len(values)
        return logs


def step_winner(figures: StepFigures, living: list[int]) -> int | None:
    """The branch that won a step (lowest NLL), or None when fewer than two in the race had a token."""
    racing = [branch for branch in living if figures.tokens[branch]]
    return min(racing, key=lambda branch: figures.nll[branch]) if len(racing) > 1 else None


# ---- Gradients ----


def gradient_norms(
    groups: Sequence[Sequence[nn.Parameter]], device: torch.device, accelerator: Accelerator | None = None
) -> Tensor:
    """Norms of the gradients of groups of parameters, [n], float32 or wider; 0 for a group without a gradient.

    Every process has to call it. The norms of all gradients are one launch, however many parameters there are.
    """
    if _may_be_sharded(accelerator) and sharding.has_sharded_gradients(groups, accelerator):
        return sharding.norms(groups, device, accelerator)
    gradients = [_gradients(group) for group in groups]
    flat = [gradient for own in gradients for gradient in own]
    if not flat:
        return torch.zeros(len(groups), device=device)
    found = compat.foreach_norm(flat)
    if len({norm.device for norm in found}) > 1:  # a model that is split over devices
        found = [norm.to(device) for norm in found]
    norms = torch.stack(found).to(device)
    norms = norms if norms.dtype == torch.float64 else norms.float()
    return torch.stack([own.norm() for own in norms.split([len(own) for own in gradients])])


def clip_gradients(
    groups: Sequence[Sequence[nn.Parameter]], norms: Tensor, max_norm: float, accelerator: Accelerator | None = None
) -> None:
    """Scales each group's gradients to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        norms: of [`gradient_norms`].
    """
    # A factor of 1 changes nothing and needs no answer from the device
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

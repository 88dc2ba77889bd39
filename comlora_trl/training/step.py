"""One optimizer step: the plan of its rows before it runs, and its figures afterwards.

The plan says where this process's rows, lines and supervised tokens lie within the step, over all micro-batches and
processes. The figures are sums that stay on the device during the step; one transfer at its end brings them to the
host.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from comlora_trl.branches.dealing import indices
from comlora_trl.branches.rows import Rows
from comlora_trl.competition import CompetitionSettings, CompetitionState, step_noise
from comlora_trl.competition.rungs import dealt_to

ROWS_PER_LINE = "rows_per_line"


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

    @property
    def row_count(self) -> int:
        """Rows of the step as the cost counts them: a packed line of shared rows counts once."""
        return sum(self.lines)

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

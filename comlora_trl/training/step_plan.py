"""The rows, lines and supervised tokens of one optimizer step, across its micro-batches and processes."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.dealing import indices
from comlora_trl.branches.rows import Rows
from comlora_trl.competition import step_noise
from comlora_trl.competition.rungs import dealt_to

ROWS_PER_LINE = "rows_per_line"


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
    def of(cls, batches: list[dict[str, Any]], accelerator: Any) -> "StepPlan | None":
        """Counts a step's micro-batches, over all processes; None when there is no batch."""
        if not batches:
            return None
        rows = [Rows.of(batch) for batch in batches]
        lines = [_lines(own, batch) for own, batch in zip(rows, batches, strict=True)]
        counts = torch.stack([_counts(own, batch["labels"]) for own, batch in zip(rows, batches, strict=True)])
        counts = counts.to(accelerator.device)
        own = counts[:, 1].sum()
        if accelerator.num_processes == 1:
            # rows and lines are known on the host, no transfer needed
            sizes, rank = [[(one.count, count)] for one, count in zip(rows, lines, strict=True)], 0
            supervised, tokens = counts[:, 0].sum(), own
        else:
            hosts = torch.tensor([(one.count, count) for one, count in zip(rows, lines, strict=True)])
            gathered = accelerator.gather(torch.cat([counts, hosts.to(counts)], dim=1)[None])
            sizes, rank = gathered[..., 2:].transpose(0, 1).tolist(), accelerator.process_index
            supervised, tokens = gathered[..., 0].sum(), gathered[..., 1].sum()
        row_places, row_count = _places([[size[0] for size in micro_batch] for micro_batch in sizes], rank)
        line_counts = [[size[1] for size in micro_batch] for micro_batch in sizes]
        line_places, _ = _places(line_counts, rank)
        return cls(row_places, row_count, supervised, tokens, own, line_places, [*chain(*line_counts)])

    def deal(
        self, batches: list[dict[str, Any]], step: int, living: list[int], k: int, accelerator: Any
    ) -> "StepPlan":
        """Deals the step's lines out among the living branches, and counts each branch's tokens over all processes."""
        self.owners = [
            tuple(dealt_to(first + line, step, living) for line in range(count)) for first, count in self.line_places
        ]
        own = torch.zeros(k, dtype=torch.long, device=accelerator.device)
        for batch, owners in zip(batches, self.owners, strict=True):
            rows = Rows.of(batch)
            tokens = rows.supervised_tokens(batch["labels"])
            per_line = batch.get(ROWS_PER_LINE)
            by_row = indices(owners, tokens.device)
            if per_line is not None:
                by_row = by_row.repeat_interleave(per_line.to(tokens.device))
            own += torch.zeros_like(own, device=tokens.device).index_add(0, by_row, tokens[: by_row.numel()]).to(own)
        self.branch_tokens = accelerator.reduce(own, reduction="sum") if accelerator.num_processes > 1 else own
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
    def exhausted(self) -> bool:
        """Whether every micro-batch has had its turn."""
        return self.used >= len(self.places)

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


def _counts(rows: Rows, labels: Tensor) -> Tensor:
    """Rows with a supervised token, supervised tokens: int64 [2]."""
    tokens = rows.supervised_tokens(labels)
    return torch.stack([(tokens > 0).sum(), tokens.sum()])

"""The rows and supervised tokens of one optimizer step, across its micro-batches and processes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.rows import Rows
from comlora_trl.competition import step_noise


@dataclass
class StepPlan:
    """Where the rows of this process's micro-batches lie among all rows of the optimizer step.

    Rows are counted micro-batch by micro-batch, and process by process within one, which is the order in which
    accelerate deals out a data set: the same row has the same place, and so the same noise, however the step is cut.

    Attributes:
        places: (first row, rows) of each of this process's micro-batches.
        rows: rows of the whole step.
        supervised_rows: those with a supervised token, an int64 tensor.
        tokens: M, supervised tokens of the whole step, an int64 tensor.
        own_tokens: those of this process.
    """

    places: list[tuple[int, int]]
    rows: int
    supervised_rows: Tensor
    tokens: Tensor
    own_tokens: Tensor
    used: int = 0
    noise: Tensor | None = None

    @classmethod
    def of(cls, batches: list[dict[str, Any]], accelerator: Any) -> "StepPlan | None":
        """Counts the rows and tokens of a step's micro-batches, over all processes; None when there is no batch."""
        if not batches:
            return None
        rows = [Rows.of(batch) for batch in batches]
        counts = torch.stack([_counts(own, batch["labels"]) for own, batch in zip(rows, batches, strict=True)])
        counts = counts.to(accelerator.device)
        own = counts[:, 2].sum()
        if accelerator.num_processes == 1:
            every, rank = [[one.count] for one in rows], 0  # known on the host, no transfer needed
            supervised, tokens = counts[:, 1].sum(), own
        else:
            gathered = accelerator.gather(counts[None])  # [processes, micro-batches, 3]
            every, rank = gathered[..., 0].T.tolist(), accelerator.process_index
            supervised, tokens = gathered[..., 1].sum(), gathered[..., 2].sum()
        places, first = [], 0
        for micro_batch in every:
            places.append((first + sum(micro_batch[:rank]), micro_batch[rank]))
            first += sum(micro_batch)
        return cls(places, first, supervised, tokens, own)

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


def _counts(rows: Rows, labels: Tensor) -> Tensor:
    """Rows, rows with a supervised token, supervised tokens: int64 [3]."""
    tokens = rows.supervised_tokens(labels)
    return torch.stack([torch.full_like(tokens[0], rows.count), (tokens > 0).sum(), tokens.sum()])

"""The rows of one optimizer step across its micro-batches and processes, and those of a packed batch's examples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.rows import supervised_rows
from comlora_trl.competition import step_noise


@dataclass
class MicroBatches:
    """Where the rows of this process's micro-batches lie among all rows of the optimizer step.

    Rows are counted micro-batch by micro-batch, and process by process within one, which is the order in which
    accelerate deals out a data set: the same row has the same place, and so the same noise, however the step is cut.

    Attributes:
        places: (first row, rows) of each of this process's micro-batches.
        rows: rows of the whole step.
        num_supervised: those with a supervised token, an int64 tensor.
    """

    places: list[tuple[int, int]]
    rows: int
    num_supervised: Tensor
    used: int = 0
    noise: Tensor | None = None

    @classmethod
    def plan(cls, batches: list[dict[str, Any]], accelerator: Any) -> "MicroBatches | None":
        """Counts the rows of a step's micro-batches, over all processes; None when there is no batch."""
        if not batches:
            return None
        counts = torch.stack([supervised_rows(batch) for batch in batches]).to(accelerator.device)
        if accelerator.num_processes == 1:
            rows = [_row_count(batch) for batch in batches]  # known on the host, no transfer needed
            every, rank, supervised = [[count] for count in rows], 0, counts[:, 1].sum()
        else:
            gathered = accelerator.gather(counts[None])  # [processes, micro-batches, 2]
            every, rank = gathered[..., 0].T.tolist(), accelerator.process_index
            supervised = gathered[..., 1].sum()
        places, first = [], 0
        for micro_batch in every:
            places.append((first + sum(micro_batch[:rank]), micro_batch[rank]))
            first += sum(micro_batch)
        return cls(places, first, supervised)

    def next(self, seed: int, step: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The noise ε [R, K] of the next micro-batch's rows, and the step's number of rows with supervised tokens."""
        if self.noise is None:
            self.noise = step_noise(seed, step, self.rows, k)
        first, count = self.places[self.used]
        self.used += 1
        return self.noise[first : first + count].to(device, non_blocking=True), self.num_supervised


def _row_count(batch: dict[str, Any]) -> int:
    boundaries = batch.get("cu_seq_lens_q")
    return batch["input_ids"].size(0) if boundaries is None else boundaries.numel() - 1


class PackedRowsCollator:
    """TRL's padding-free collator, which also says how many rows each example brought (`rows_per_example`).

    A packed example holds several sequences; validation counts examples, which processes may hold twice to even out
    their last batch, so each row has to be traced to its example.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.collator(examples, *args, **kwargs)
        rows = [len(example["seq_lengths"]) if "seq_lengths" in example else 1 for example in examples]
        return batch | {"rows_per_example": torch.tensor(rows)}

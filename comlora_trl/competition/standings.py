"""Where the branches stand: wins, disqualifications, sums over a validation set, and who wins (eq. 11–12)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class CompetitionState:
    """What the competition has come to; saved with every checkpoint.

    Attributes:
        k: number of branches.
        disqualified: optimizer step at which a branch was disqualified, by branch.
        wins: optimizer steps won so far, by branch.
        last_evaluation: the newest selection's result (see [`ValidationTally.result`]), or None before the first.
    """

    k: int
    disqualified: dict[int, int] = field(default_factory=dict)
    wins: list[float] = field(default_factory=list)
    last_evaluation: dict[str, Any] | None = None

    @classmethod
    def new(cls, k: int) -> "CompetitionState":
        """The state before the first step."""
        return cls(k=k, wins=[0.0] * k)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompetitionState":
        """From what `vars(state)` became in JSON, where keys are text."""
        return cls(
            **{**values, "disqualified": {int(branch): step for branch, step in values["disqualified"].items()}}
        )

    @property
    def alive(self) -> list[bool]:
        """Whether each branch is still in the competition."""
        return [branch not in self.disqualified for branch in range(self.k)]


@dataclass
class ValidationTally:
    """Sums over a validation set, each example once.

    Columns of the gathered rows: scores [K], S [K], the batch's mean loss [K], m [1].
    """

    k: int
    sums: Tensor | None = None
    examples: int = 0

    def columns(
        self, nll: Tensor, tokens: Tensor, scores: Tensor | None, example: Tensor | None, count: int
    ) -> Tensor:
        """One line per example, [count, 3·K + 1].

        Args:
            example: the example each row belongs to, [R], or None when rows are examples; rows past `count` are
                padding of a packed batch.
        """
        batch = nll.sum(dim=1) / tokens.sum().clamp(min=1)
        scores = torch.zeros_like(nll.T) if scores is None else scores
        rows = torch.cat([scores.to(nll.dtype), nll.T, tokens[:, None].to(nll.dtype)], dim=1)
        if example is not None:
            rows = rows.new_zeros(count + 1, rows.size(1)).index_add(0, example.clamp(max=count), rows)[:count]
        return torch.cat([rows[:, :-1], batch.expand(rows.size(0), -1), rows[:, -1:]], dim=1)

    def add(self, gathered: Tensor) -> None:
        """Adds gathered lines of [`columns`]."""
        total = gathered.double().sum(dim=0).cpu()
        self.sums = total if self.sums is None else self.sums + total
        self.examples += gathered.size(0)

    def result(self, alive: Tensor, by_selector: bool, step: int) -> dict[str, Any]:
        """Each branch's validation NLL and score, and the winner (eq. 11–12), ready for JSON.

        Raises:
            RuntimeError: if no example was seen or every branch is disqualified.
        """
        if self.sums is None:
            raise RuntimeError("the validation set gave no example, so there is no winner: check the eval_dataset.")
        k = self.k
        scores, nll, batch_loss = self.sums[:k], self.sums[k : 2 * k] / self.sums[-1], self.sums[2 * k : 3 * k]
        by_loss = winner(nll, alive, highest=False)
        chosen = winner(scores, alive) if by_selector else by_loss
        return {
            "step": step,
            "examples": self.examples,
            "validation_nll": nll.tolist(),
            "scores": scores.tolist() if by_selector or bool(scores.any()) else None,
            "winner": chosen,
            "winner_by_validation_loss": by_loss,
            "eval_loss": (batch_loss / self.examples)[chosen].item(),
        }

    def __add__(self, other: "ValidationTally") -> "ValidationTally":
        sums = [tally.sums for tally in (self, other) if tally.sums is not None]
        return ValidationTally(self.k, sum(sums) if sums else None, self.examples + other.examples)


def winner(values: Tensor, alive: Tensor, highest: bool = True) -> int:
    """The winning branch: argmax of the accumulated scores (eq. 11–12), or argmin of the validation losses.

    Args:
        values: [K], accumulated scores or losses.
        alive: bool [K]; a disqualified branch cannot win.
        highest: whether the highest value wins (scores) or the lowest (losses).

    Returns:
        the branch's index; ties go to the lowest index.

    Raises:
        RuntimeError: if every branch is disqualified.
    """
    if not bool(alive.any()):
        raise RuntimeError("every branch is disqualified, so none can win: lower the learning rate and train again.")
    values = values.double() if highest else -values.double()
    values = values.masked_fill(~alive | ~values.isfinite(), float("-inf"))
    best = values.max()
    # `argmax` leaves open which of several maxima it returns
    return int(((values == best) & alive).nonzero()[0])

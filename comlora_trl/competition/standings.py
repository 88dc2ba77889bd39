"""The standings of a competition: its state, the sums over a validation set, and the winner (eq. 11–12)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from comlora_trl.competition.rungs import ranking

_BY_BRANCH = ("disqualified", "retired")


@dataclass
class CompetitionState:
    """The state of the competition, saved with every checkpoint.

    Attributes:
        k: number of branches.
        disqualified: for each disqualified branch, the optimizer step at which it was disqualified.
        wins: number of optimizer steps that each branch has won so far.
        selection: result of the newest selection (see [`ValidationTally.result`]); None before the first.
        retired: for each retired branch, the optimizer step of the rung that retired it.
        rungs: records of the rungs so far, see [`rung_record`].
        rates: peak learning rate of each branch; None if all branches have the same rate.
        betas: β of each branch's loss; None if all branches have the same β.
        measured: the names of the loss and of the accuracy in a selection.
        row_passes: the cost so far; one row pass is one row through one branch, forward and backward.
    """

    k: int
    disqualified: dict[int, int] = dataclasses.field(default_factory=dict)
    wins: list[float] = dataclasses.field(default_factory=list)
    selection: dict[str, Any] | None = None
    retired: dict[int, int] = dataclasses.field(default_factory=dict)
    rungs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rates: list[float] | None = None
    betas: list[float] | None = None
    measured: list[str] = dataclasses.field(default_factory=lambda: ["NLL", "token accuracy"])
    row_passes: int = 0

    @classmethod
    def new(cls, k: int) -> "CompetitionState":
        """The state before the first step."""
        return cls(k=k, wins=[0.0] * k)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompetitionState":
        """Builds a state from `vars(state)` after JSON, which turns the branch numbers in keys into text."""
        by_branch = {name: {int(branch): step for branch, step in values[name].items()} for name in _BY_BRANCH}
        return cls(**values | by_branch)

    @property
    def alive(self) -> list[bool]:
        """Whether each branch is still in the competition."""
        return [branch not in self.disqualified and branch not in self.retired for branch in range(self.k)]

    @property
    def living(self) -> list[int]:
        """The branches that are still in the competition."""
        return [branch for branch, lives in enumerate(self.alive) if lives]

    @property
    def remaining(self) -> int:
        """Number of branches that no rung has retired, including branches that diverged."""
        return self.k - len(self.retired)

    @property
    def leader(self) -> int:
        """The branch that would win if training ended now.

        This is the winner of the newest selection. Before the first selection, or if that branch has been disqualified
        since, it is the first living branch.
        """
        if self.selection is not None and self.selection["winner"] not in self.disqualified:
            return self.selection["winner"]
        return next((branch for branch, lives in enumerate(self.alive) if lives), 0)


@dataclass
class ValidationTally:
    """Sums over a validation set in which each example counts once.

    Attributes:
        k: number of branches.
        sums: [3·K + 2], float64 where the device has it: the scores [K], S [K] and the correct tokens [K] of each
            branch, then the supervised tokens [1] and the examples [1].
    """

    k: int
    sums: Tensor

    @classmethod
    def empty(cls, k: int, device: torch.device | str = "cpu") -> "ValidationTally":
        """A tally of K branches before the first example."""
        # MPS has no float64
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return cls(k, torch.zeros(3 * k + 2, dtype=dtype, device=device))

    def add(self, nll: Tensor, correct: Tensor, tokens: Tensor, scores: Tensor | None, examples: int) -> None:
        """Adds a batch.

        Args:
            nll: S, the summed negative log-likelihood of each row under each branch, [K, R].
            correct: correctly predicted tokens of each row under each branch, [K, R].
            tokens: m, the supervised tokens of each row, [R].
            scores: sim, [R, K]; None without a selector.
            examples: number of examples in the batch.
        """
        score = torch.zeros_like(nll.T) if scores is None else scores
        parts = [score.sum(dim=0), nll.sum(dim=1), correct.sum(dim=1), tokens.sum()[None]]
        batch = torch.cat([part.to(self.sums) for part in parts])
        self.sums[:-1] += batch
        self.sums[-1] += examples

    def result(self, alive: list[bool], by: str, step: int, comparable: bool = True) -> dict[str, Any]:
        """The validation figures of each branch and the winner (eq. 11–12).

        Args:
            alive: whether each branch is still in the competition; the others have None as their figures.
            by: the criterion: "selector", "validation_loss" or "validation_accuracy". Ties in accuracy go to the
                branch with the lower loss.
            step: the optimizer step of the selection.
            comparable: whether the branches' losses can be compared; if not, losses do not decide.

        Returns:
            a dict of plain Python values for JSON.

        Raises:
            RuntimeError: if no example was added, or no branch is still in the competition.
        """
        k, sums = self.k, self.sums.cpu().double()
        examples = int(sums[-1])
        if not examples:
            raise RuntimeError("the validation set has no examples, so there is no winner: check the eval_dataset.")
        living = torch.tensor(alive)
        scores, nll, accuracy = sums[:k], sums[k : 2 * k] / sums[-2], sums[2 * k : 3 * k] / sums[-2]
        by_loss = winner(nll, living, highest=False) if comparable else None
        chosen = {
            "selector": lambda: winner(scores, living),
            "validation_loss": lambda: by_loss,
            "validation_accuracy": lambda: winner(accuracy, living, ties=nll if comparable else None),
        }[by]()
        return {
            "step": step,
            "examples": examples,
            "validation_nll": _listed(nll, alive),
            "validation_accuracy": _listed(accuracy, alive),
            "scores": _listed(scores, alive) if bool(scores.nan_to_num().any()) else None,
            "winner": chosen,
            "winner_by_validation_loss": by_loss,
        }


def _listed(values: Tensor, alive: list[bool]) -> list[float | None]:
    return [value if lives else None for value, lives in zip(values.tolist(), alive, strict=True)]


def winner(values: Tensor, alive: Tensor, highest: bool = True, ties: Tensor | None = None) -> int:
    """The winning branch: argmax of the accumulated scores (eq. 11–12), or argmin of the validation losses.

    Args:
        values: accumulated scores or losses, [K].
        alive: bool [K]; a retired or disqualified branch cannot win.
        highest: whether the highest value wins (scores, accuracy) or the lowest (losses).
        ties: losses, [K]. Of several branches with the best value, the one with the lowest loss wins.

    Returns:
        the branch's index; the lowest index if there is still a tie.

    Raises:
        RuntimeError: if no branch is alive.
    """
    if not bool(alive.any()):
        raise RuntimeError("every branch is disqualified, so none can win: lower the learning rate and train again.")
    figures = _listed(values.double(), alive.tolist())
    return ranking(figures, highest, None if ties is None else ties.double().tolist())[0]

"""What a training step leaves behind: per branch losses, probabilities and wins.

Sums stay on the device during a step; one transfer at its end brings them to the host.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from comlora_trl.competition import CompetitionSettings, CompetitionState


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
            entry["comlora/lm_loss"] = settings.lm_weight * sum(losses[k] for k in state.living) / state.field
            weight = settings.sign * settings.alignment_weight * eta
            entry["comlora/alignment_loss"] = weight * figures.weighted_nll / tokens
            entry["comlora/pairwise_loss"] = figures.pairwise
        if len(state.living) > 1:
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

"""What a training step leaves behind: per branch losses, probabilities and wins.

Sums stay on the device during a step; one transfer at its end brings them to the host.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from comlora_trl.competition import CompetitionSettings


class StepSums:
    """Sums over the micro-batches of one optimizer step, in one float64 vector so that one reduction suffices.

    Layout: S summed per branch [K], p summed per branch [K], micro-batches with a non-finite loss per branch [K],
    then non-finite gradients of the selector, Σ p·S, L_pair, supervised tokens and rows.
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.k = k
        # float64 is not known to every accelerator (MPS)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.vector = torch.zeros(3 * k + 5, dtype=dtype, device=device)

    def add(
        self, nll: Tensor, tokens: Tensor, alive: Tensor, probabilities: Tensor | None, pairwise: Tensor | None
    ) -> None:
        """Adds a micro-batch: S [K, R], m [R], p [R, K] or None, and its share of the pairwise loss or None.

        Args:
            alive: bool [K]; branches that are out have run nothing, and their S is not read.
        """
        k, supervised = self.k, tokens > 0
        nll = torch.where(alive[:, None], nll, torch.zeros_like(nll))
        finite = nll.isfinite()
        nll = torch.where(finite, nll, torch.zeros_like(nll))
        self.vector[:k] += nll.sum(dim=1)
        self.vector[2 * k : 3 * k] += (~finite.all(dim=1)).to(self.vector.dtype)
        self.vector[-2] += tokens.sum()
        self.vector[-1] += supervised.sum()
        if probabilities is not None:
            probabilities = probabilities * supervised[:, None]
            self.vector[k : 2 * k] += probabilities.sum(dim=0)
            self.vector[-4] += (probabilities.T * nll).sum()
        if pairwise is not None:
            self.vector[-3] += pairwise.detach()


@dataclass
class LogWindow:
    """Averages between two logs of the Trainer, as the entries `comlora/...`."""

    k: int
    steps: list[dict[str, float]] = field(default_factory=list)

    def add_step(self, sums: list[float], eta: float, alive: list[bool], settings: CompetitionSettings) -> int | None:
        """Adds a finished step from [`StepSums`]' vector, reduced over processes.

        Returns:
            the branch that won the step (lowest NLL), or None when no branch that is in the race had a token.
        """
        k = self.k
        pair, tokens, rows = sums[-3], max(sums[-2], 1.0), max(sums[-1], 1.0)
        losses = [value / tokens for value in sums[:k]]
        entry = {f"comlora/loss_{branch}": losses[branch] for branch in range(k)}
        if sums[-1]:
            entry |= {f"comlora/probability_{branch}": sums[k + branch] / rows for branch in range(k)}
        entry["comlora/eta"] = eta
        entry["comlora/lm_loss"] = settings.lm_weight * sum(losses) / k
        entry["comlora/alignment_loss"] = settings.sign * settings.alignment_weight * eta * sums[-4] / tokens
        entry["comlora/pairwise_loss"] = pair
        racing = [branch for branch in range(k) if alive[branch]] if sums[-2] else []
        best = min(racing, key=lambda branch: losses[branch], default=None)
        entry |= {f"comlora/wins_{branch}": float(branch == best) for branch in range(k)}
        self.steps.append(entry)
        return best

    def flush(self) -> dict[str, float]:
        """The window's entries, means over its steps (wins are counts), and begins the next window."""
        steps, self.steps = self.steps, []
        logs = {}
        for name in steps[-1] if steps else ():
            values = [step[name] for step in steps if name in step]
            counted = name.startswith("comlora/wins_")
            logs[name] = sum(values) if counted else sum(values) / len(values)
        return logs

"""The losses of ComLoRA as pure functions: annealing, selection probabilities, row weights, pairwise loss.

Eq. 4-9 and 13-14.

Nothing here knows a model, a Trainer or PEFT. Shapes use K (branches) and R (rows: sequences, or the segments of a
packed sequence). Equation numbers are those of *ComLoRA: A Competitive Learning Approach for Enhancing LoRA*
(ICLR 2025).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from comlora_trl.competition.rungs import Rung

ANNEALING_SCHEDULES = ("constant", "cosine", "exponential", "linear")


def annealing(progress: float, schedule: str = "exponential", rate: float = 5.0) -> float:
    """η(t), the weight of the alignment loss (eq. 13–14).

    Args:
        progress: t/T, optimizer steps done over all optimizer steps, in [0, 1].
        schedule: one of `ANNEALING_SCHEDULES`.
        rate: γ of the exponential schedule.

    Raises:
        ValueError: if `schedule` is unknown.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    if schedule == "exponential":
        return 1.0 - math.exp(-rate * progress)
    if schedule == "linear":
        return progress
    raise ValueError(f"unknown annealing schedule {schedule!r}: choose one of {', '.join(ANNEALING_SCHEDULES)}.")


EQUATION_SIGNS = ("as_described", "as_printed")


@dataclass(frozen=True)
class CompetitionSettings:
    """Settings of the competition that are constant during a run; see [`ComLoRAConfig`] for their meaning.

    `ComLoRAConfig.__post_init__` checks the ranges.

    Attributes:
        independent: whether each branch trains as it would alone, by a loss of its own.
        winner_by: the criterion of rungs and winner: "selector", "validation_loss" or "validation_accuracy".
        rates: peak learning rate of each branch; None if all have the same.
        betas: β of each branch's loss; None if all have the same or the loss has none.
        measured: the names of the loss and of the accuracy that validation measures.
        learning_rate: that one, for messages; None if it is not known.
        seed: of the noise of eq. 6.
    """

    k: int = 2
    top_n: int | None = None
    annealing: str = "exponential"
    annealing_rate: float = 5.0
    noise: float = 0.1
    lm_weight: float = 1.0
    alignment_weight: float = 1.0
    pairwise_weight: float = 1.0
    equation_signs: str = "as_described"
    independent: bool = False
    rows: str = "all"
    rungs: tuple[Rung, ...] = ()
    winner_by: str = "selector"
    rates: tuple[float, ...] | None = None
    betas: tuple[float, ...] | None = None
    measured: tuple[str, str] = ("NLL", "token accuracy")
    learning_rate: float | None = None
    seed: int = 0

    @property
    def comparable(self) -> bool:
        """Whether the branches' losses can be compared: those of different β can't."""
        return self.betas is None or len(set(self.betas)) == 1

    @property
    def sign(self) -> float:
        """+1 when L in eq. 5–9 is read as a log-likelihood (as the text describes), -1 for the printed equations."""
        return 1.0 if self.equation_signs == "as_described" else -1.0


def selection_probabilities(scores: Tensor, top_n: int | None = None, alive: Tensor | None = None) -> Tensor:
    """p of eq. 5: softmax over each row's `top_n` highest scores, zero elsewhere, without gradient.

    Args:
        scores: sim, [R, K].
        top_n: N; None means all branches.
        alive: bool [K], False for a disqualified branch, which takes no part; None means all take part.

    Returns:
        [R, K], each row sums to 1.
    """
    scores = scores.detach()
    if alive is not None:
        scores = scores.masked_fill(~alive, float("-inf"))
    k = scores.size(-1)
    if top_n is not None and top_n < k:
        # `topk` breaks ties by position, so exactly N branches remain even when scores are equal
        chosen = scores.topk(top_n, dim=-1).indices
        outside = torch.ones_like(scores, dtype=torch.bool).scatter(-1, chosen, False)
        scores = scores.masked_fill(outside, float("-inf"))
    return scores.softmax(dim=-1)


def row_weights(
    probabilities: Tensor | None,
    rows: int,
    eta: float,
    settings: CompetitionSettings,
    alive: Tensor,
    dtype: torch.dtype = torch.float32,
    remaining: int | None = None,
) -> Tensor:
    """w[k, b] = 1/K + η(t)·p[b, k]: eq. 4 and eq. 5 as one weight on every row of every branch.

    The weights are known before the language model runs, because p comes from embeddings alone.

    Args:
        probabilities: p, [R, K], or None without a selector (then eq. 4 alone is left).
        rows: R.
        eta: η(t).
        alive: bool [K]; a branch that is out gets weight 0.
        dtype: of the result, the log-probabilities' own.
        remaining: the branches that eq. 4 takes the mean over, None for all K. Independent branches have no such
            mean: each trains as it would alone.

    Returns:
        [K, R]
    """
    share = settings.lm_weight / (1 if settings.independent else remaining or settings.k)
    weights = torch.full((settings.k, rows), share, device=alive.device, dtype=dtype)
    if probabilities is not None:
        weights = weights + settings.sign * settings.alignment_weight * eta * probabilities.T.to(dtype)
    return weights * alive[:, None]


def pairwise_losses(
    scores: Tensor, mean_nll: Tensor, noise: Tensor, settings: CompetitionSettings, alive: Tensor
) -> Tensor:
    """‖log_softmax(Δsim) − log_softmax(Δperf)‖₁ of every row (eq. 6–9), over the ordered pairs of living branches.

    One softmax runs over all K(K−1) ordered pairs of a row: row by row, softmax_j(sim_i − sim_j) would lose i.

    Args:
        scores: sim, [R, K]; the only input that receives a gradient.
        mean_nll: L, the rows' mean negative log-likelihood in nats per token, [K, R].
        noise: ε, standard normal draws, [R, K].
        alive: bool [K]; pairs with a disqualified branch are left out.

    Returns:
        [R], zero when no pair is left.
    """
    noisy = mean_nll.detach().T.to(scores.dtype) + settings.noise * noise.to(scores.dtype)  # eq. 6
    # A non-finite loss belongs to a disqualified branch. It must be removed first, because 0 * nan is nan
    noisy = torch.where(alive, noisy, torch.zeros_like(noisy))
    difference = _pairs(scores)
    performance = -settings.sign * _pairs(noisy)  # eq. 7
    living = alive[:, None] & alive & ~torch.eye(scores.size(-1), dtype=torch.bool, device=scores.device)
    living = living.flatten().expand_as(difference)
    gap = _masked_log_softmax(difference, living) - _masked_log_softmax(performance, living).detach()  # eq. 8
    return torch.where(living, gap, torch.zeros_like(gap)).abs().sum(dim=-1)  # eq. 9


def pairwise_loss(
    scores: Tensor,
    mean_nll: Tensor,
    noise: Tensor,
    supervised: Tensor,
    num_rows: int | Tensor,
    settings: CompetitionSettings,
    alive: Tensor,
) -> Tensor:
    """L_pair (eq. 9): the mean of [`pairwise_losses`] over the rows with supervised tokens.

    Args:
        supervised: bool [R], whether the row has a supervised token; others add nothing.
        num_rows: such rows in the whole optimizer step (all micro-batches and processes), so that gradient
            accumulation and data parallelism leave the mean unchanged.

    Returns:
        this micro-batch's share of the mean, a scalar.
    """
    losses = pairwise_losses(scores, mean_nll, noise, settings, alive)
    total = torch.where(supervised, losses, torch.zeros_like(losses)).sum()
    return total / torch.as_tensor(num_rows, device=total.device).clamp(min=1)


def mean_nll(nll: Tensor, tokens: Tensor) -> Tensor:
    """L[k, b] = S[k, b] / m_b in nats per token, 0 for a row without supervised tokens.

    Args:
        nll: S, summed negative log-likelihood of every row under every branch, [K, R].
        tokens: m, supervised tokens of every row, [R].
    """
    return nll / tokens.clamp(min=1)


def step_noise(seed: int, step: int, rows: int, k: int) -> Tensor:
    """ε for all rows of one optimizer step, [rows, K], a function of `seed` and `step` alone (eq. 6).

    Drawn on the CPU from a generator of its own: the same row gets the same noise whatever the micro-batch size,
    the number of processes or the device, a resumed run repeats it, and no other random stream moves.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))
    return torch.randn(rows, k, generator=generator)


def _pairs(values: Tensor) -> Tensor:
    """values_i − values_j, [R, K] to [R, K·K]; a branch with itself among them."""
    return (values[:, :, None] - values[:, None, :]).flatten(1)


def _masked_log_softmax(values: Tensor, mask: Tensor) -> Tensor:
    # A finite stand-in for -inf: with no pair left, log_softmax of -inf alone would be nan
    return values.masked_fill(~mask, torch.finfo(values.dtype).min / 4).log_softmax(dim=-1)

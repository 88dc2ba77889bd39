"""The losses of ComLoRA as pure functions (eq. 4–9 and 13–14): annealing, probabilities, row weights, pairwise loss.

The functions take tensors and need no model, Trainer or PEFT. In shapes, K is the number of branches and R the number
of rows. A row is a sequence, or one segment of a packed sequence. Equation numbers are those of *ComLoRA: A
Competitive Learning Approach for Enhancing LoRA* (ICLR 2025).
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
        progress: t/T, the finished optimizer steps divided by all optimizer steps, in [0, 1].
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
    """Settings of the competition that are constant during a run.

    [`ComLoRAConfig`] documents the settings that are not listed here, and checks all ranges.

    Attributes:
        independent: whether each branch trains by its own loss, as it would in a run with one branch.
        rungs: the points of training at which branches are retired.
        winner_by: the criterion of rungs and winner: "selector", "validation_loss" or "validation_accuracy".
        rates: peak learning rate of each branch; None if all branches have the same rate.
        betas: β of each branch's loss; None if all branches have the same β or the loss has no β.
        measured: the names of the loss and of the accuracy that validation measures.
        learning_rate: the run's `learning_rate`, which only error messages use; None if it is not known.
        seed: seed of the noise in eq. 6.
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
        """Whether the branches' losses can be compared with each other; losses of different β can't."""
        return self.betas is None or len(set(self.betas)) == 1

    @property
    def sign(self) -> float:
        """The sign of L in eq. 5–9: +1 for L as a log-likelihood, as the paper's text says, -1 for L as printed."""
        return 1.0 if self.equation_signs == "as_described" else -1.0


def selection_probabilities(scores: Tensor, top_n: int | None = None, alive: Tensor | None = None) -> Tensor:
    """p of eq. 5: softmax over each row's `top_n` highest scores, zero elsewhere, without gradient.

    Args:
        scores: sim, [R, K].
        top_n: N; None means all branches.
        alive: bool [K], False for a branch that is retired or disqualified, which gets probability 0; None means that
            all branches take part.

    Returns:
        p, [R, K]; each row sums to 1.
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
    """The weight of each row in each branch's loss, w[k, b] = 1/K + η(t)·p[b, k] (eq. 4 and eq. 5).

    The weights are known before the language model runs, because p depends only on the token embeddings.

    Args:
        probabilities: p, [R, K]; None without a selector, which leaves eq. 4 only.
        rows: R.
        eta: η(t).
        settings: the loss weights of the competition.
        alive: bool [K]; a branch that is retired or disqualified gets weight 0.
        dtype: dtype of the weights, the same as that of the log-probabilities.
        remaining: number of branches that eq. 4 takes the mean over; None means K. Independent branches are summed,
            so this number is not used for them.

    Returns:
        w, [K, R].
    """
    share = settings.lm_weight / (1 if settings.independent else remaining or settings.k)
    weights = torch.full((settings.k, rows), share, device=alive.device, dtype=dtype)
    if probabilities is not None:
        weights = weights + settings.sign * settings.alignment_weight * eta * probabilities.T.to(dtype)
    return weights * alive[:, None]


def pairwise_losses(
    scores: Tensor, mean_nll: Tensor, noise: Tensor, settings: CompetitionSettings, alive: Tensor
) -> Tensor:
    """‖log_softmax(Δsim) − log_softmax(Δperf)‖₁ of each row (eq. 6–9).

    One softmax runs over all K(K−1) ordered pairs of a row. A softmax over j alone would cancel sim_i, because
    softmax_j(sim_i − sim_j) does not depend on i.

    Args:
        scores: sim, [R, K]; only this input receives a gradient.
        mean_nll: L, the mean negative log-likelihood of each row in nats per token, [K, R].
        noise: ε, standard normal draws, [R, K].
        settings: the noise intensity and the sign of the equations.
        alive: bool [K]; pairs with a retired or disqualified branch are left out.

    Returns:
        the loss of each row, [R]; zero if no pair is left.
    """
    noisy = mean_nll.detach().T.to(scores.dtype) + settings.noise * noise.to(scores.dtype)  # eq. 6
    # A branch with a non-finite loss is not alive. Its loss must be removed first, because 0 * nan is nan
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
        scores, mean_nll, noise, settings, alive: as for [`pairwise_losses`].
        supervised: bool [R], whether the row has a supervised token. Rows without one add nothing.
        num_rows: number of rows with a supervised token in the whole optimizer step (all micro-batches and processes).
            With it, gradient accumulation and data parallelism do not change the mean.

    Returns:
        the sum over this micro-batch's rows divided by `num_rows`, a scalar.
    """
    losses = pairwise_losses(scores, mean_nll, noise, settings, alive)
    total = torch.where(supervised, losses, torch.zeros_like(losses)).sum()
    return total / torch.as_tensor(num_rows, device=total.device).clamp(min=1)


def mean_nll(nll: Tensor, tokens: Tensor) -> Tensor:
    """The mean negative log-likelihood of each row, L[k, b] = S[k, b] / m_b, in nats per token.

    Args:
        nll: S, the summed negative log-likelihood of each row under each branch, [K, R].
        tokens: m, the number of supervised tokens of each row, [R].

    Returns:
        L, [K, R]; 0 for a row without supervised tokens.
    """
    return nll / tokens.clamp(min=1)


def step_noise(seed: int, step: int, rows: int, k: int) -> Tensor:
    """The noise ε of eq. 6 for all rows of one optimizer step, [rows, k].

    The noise depends on `seed` and `step` only, and is drawn on the CPU from a separate generator. So a row gets the
    same noise for every micro-batch size, number of processes and device, and also in a resumed run. PyTorch's default
    generator does not advance.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))
    return torch.randn(rows, k, generator=generator)


def _pairs(values: Tensor) -> Tensor:
    """values_i − values_j for all ordered pairs including i = j, from [R, K] to [R, K·K]."""
    return (values[:, :, None] - values[:, None, :]).flatten(1)


def _masked_log_softmax(values: Tensor, mask: Tensor) -> Tensor:
    # A large negative number instead of -inf: log_softmax gives nan if every entry is -inf, as when no pair is left
    return values.masked_fill(~mask, torch.finfo(values.dtype).min / 4).log_softmax(dim=-1)

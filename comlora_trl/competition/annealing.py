"""Annealing schedules η(t) of the alignment loss (eq. 13–14)."""

import math

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

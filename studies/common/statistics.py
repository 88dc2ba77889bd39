"""Means with 95% intervals, and differences that are paired by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 97.5% quantiles of Student's t for 1, 2, … degrees of freedom; beyond, the normal one
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


class Interval(NamedTuple):
    """A mean, half of its 95% interval (nan for a single value), and of how many values."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return abs(self.mean) > self.half  # nan: False

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec or '.3f'}} ± {self.half:{(spec or '.3f').lstrip('+')}}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and half of the 95% interval, by Student's t."""
    mean, degrees = statistics.fmean(values), len(values) - 1
    if degrees < 1:
        return Interval(mean, math.nan, len(values))
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(degrees + 1), len(values))


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The mean of `arm - baseline` over the seeds that both have; None if there is none."""
    seeds = sorted(set(arm) & set(baseline))
    return interval([arm[seed] - baseline[seed] for seed in seeds]) if seeds else None

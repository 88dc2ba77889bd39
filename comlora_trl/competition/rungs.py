"""The tournament: branches train at different learning rates, and rungs retire the worse branches.

    rate_k(t) = rate_k · schedule(t)             one schedule over the whole run, K peak rates
    rungs     = (f_1, n_1), (f_2, n_2), …        at step ⌈f_i·T⌉ the best n_i branches go on, the others are retired
    rows      = "all": every living branch sees every row; "shared": each row of a step goes to one living branch

This is successive halving (Jamieson & Talwalkar, 2016) over learning rates within one run. A branch is living until it
is retired or disqualified.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

ROWS = ("all", "shared")
# If each branch has seen fewer rows than this, chance decides the ranking of the rates. The embedded example's
# tournament chose the wrong rates after 24 and 96 rows (docs/tournament.md); another one chose right after 150 rows
FEW_ROWS = 100


class Rung(NamedTuple):
    """A point of training at which branches are retired.

    Attributes:
        fraction: the fraction of the optimizer steps after which the rung comes, in (0, 1).
        survivors: number of branches that go on.
    """

    fraction: float
    survivors: int

    def step(self, total: int) -> int:
        """The optimizer step after which the rung comes, ⌈f·T⌉.

        Args:
            total: T, the optimizer steps of the run.
        """
        # Rounded first, because 0.1 * 30 is slightly more than 3 in floating point
        return math.ceil(round(self.fraction * total, 9))


def parse_rungs(text: str | None, k: int) -> tuple[Rung, ...]:
    """Reads rungs from text such as "0.1:2,0.25:1", written FRACTION:BRANCHES.

    Args:
        text: the text; None or empty for no rungs.
        k: number of branches at the start.

    Raises:
        ValueError: if the text does not have this form, if the fractions do not rise within (0, 1), or if the numbers
            of branches do not fall, starting below `k` and ending at 1 or more.
    """
    rungs = []
    for part in (text or "").replace(" ", "").split(","):
        if not part:
            continue
        fraction, _, survivors = part.partition(":")
        try:
            rungs.append(Rung(float(fraction), int(survivors)))
        except ValueError:
            raise ValueError(
                f"comlora_rungs={text!r} is not possible: {part!r} is not FRACTION:BRANCHES; write e.g. 0.1:2,0.25:1."
            ) from None
    fractions, counts = [rung.fraction for rung in rungs], [rung.survivors for rung in rungs]
    if any(not a < b for a, b in zip([0.0, *fractions], [*fractions, 1.0], strict=True)):
        raise ValueError(
            f"comlora_rungs={text!r} is not possible: the fractions of training must rise, above 0 and below 1."
        )
    if any(not a > b for a, b in zip([k, *counts], [*counts, 0], strict=True)):
        raise ValueError(
            f"comlora_rungs={text!r} is not possible: the branches that go on must fall from below comlora_k={k} to 1 "
            "or more."
        )
    return tuple(rungs)


def rungs_text(rungs: Sequence[Rung]) -> str:
    """Writes rungs as the text that [`parse_rungs`] reads."""
    return ",".join(f"{rung.fraction:g}:{rung.survivors}" for rung in rungs)


def rung_steps(rungs: Sequence[Rung], total: int) -> dict[int, Rung]:
    """The rungs by optimizer step, in a run of `total` optimizer steps.

    Raises:
        ValueError: if two rungs fall on the same step, or a rung falls on the last step.
    """
    steps = [rung.step(total) for rung in rungs]
    if len({*steps, total}) <= len(steps):
        raise ValueError(
            f"comlora_rungs={rungs_text(rungs)!r} is not possible with {total} optimizer steps: they fall on steps "
            f"{', '.join(map(str, steps))} of {total}; train longer, or give fewer rungs, further apart."
        )
    return dict(zip(steps, rungs, strict=True))


def average_share(horizon: float, step: int) -> float:
    """a_t, the share of the newest weights in an average over the last steps: w̄_t = (1 − a_t)·w̄_(t−1) + a_t·w_t.

    a_t = min(1, 1/(h·t)) is a form of polynomial-decay averaging (Shamir & Zhang, 2013). It needs no earlier weights,
    and covers the same share of the steps so far at any step. With h = 0.25, the newest quarter of the steps has about
    70% of the weight. In the first 1/h steps the average is the newest weights.

    Args:
        horizon: h, in (0, 1].
        step: t, the optimizer steps so far, 1 or more.
    """
    return min(1.0, 1.0 / (horizon * step))


def early_remark(rungs: dict[int, Rung], rows: int, k: int, shared: bool, warmup: int) -> str | None:
    """A remark if the first rung comes too early to compare the branches; None otherwise.

    Args:
        rungs: the rungs by optimizer step.
        rows: rows of one optimizer step, over all processes.
        k: number of branches at the start.
        shared: whether each row goes to one branch only.
        warmup: number of steps in which the learning rate rises.
    """
    if not rungs:
        return None
    first, share = min(rungs), k if shared else 1
    seen = first * rows // share
    if first > warmup and seen >= FEW_ROWS:
        return None
    why = f"each branch has seen {seen} rows by then"
    why += f", all in the warm-up of {warmup} steps" if first <= warmup else ""
    later = max(math.ceil(FEW_ROWS * share / rows), warmup + 1)
    tries = [f"a first rung after step {later} or later (--comlora_rungs)"]
    tries += ["all rows for every branch (--comlora_rows all)"] if shared else []
    return f"the rung at step {first} may decide by chance, because {why}: try {', or '.join(tries)}"


def default_rungs(k: int) -> str:
    """The default rungs: half of K branches go on after a tenth of training, and one branch after a quarter."""
    half = math.ceil(k / 2)
    return "0.1:1" if half == 1 else f"0.1:{half},0.25:1"


def default_rates(rate: float, k: int) -> list[float]:
    """K learning rates around `rate`, each twice the one before: ½, 1, 2 and 4 times `rate` for K = 4."""
    return [rate * 2.0 ** (branch - (k - 1) // 2) for branch in range(k)]


def ranking(values: Sequence[float | None], highest: bool, ties: Sequence[float | None] | None = None) -> list[int]:
    """The branches that take part, the best first.

    Args:
        values: the figure of each branch that decides; None for a branch that is already retired or disqualified,
            which is left out. A figure that is not finite ranks last.
        highest: whether high values are good (scores, accuracy) or low values (NLL).
        ties: the loss of each branch. Of branches with the same value, the lower loss ranks first, then the lower
            index. A loss that is not finite ranks last.
    """
    sign = -1.0 if highest else 1.0

    def rank(branch: int) -> tuple[float, float, int]:
        figures = (sign * values[branch], ties[branch] if ties else 0.0)
        value, loss = (figure if math.isfinite(figure) else math.inf for figure in figures)
        return value, loss, branch

    return sorted((branch for branch, value in enumerate(values) if value is not None), key=rank)


def retired_at(
    rung: Rung, values: Sequence[float | None], highest: bool, ties: Sequence[float | None] | None = None
) -> list[int]:
    """The branches that a rung retires, by index: those behind its survivors in the [`ranking`]."""
    return sorted(ranking(values, highest, ties)[rung.survivors :])


def dealt_to(place: int, step: int, living: Sequence[int]) -> int:
    """The branch that a line goes to when rows are shared: the living branches in turn, rotated by one each step.

    The shares of the living branches in a step differ by at most one line.

    Args:
        place: the line's index in the optimizer step, over all micro-batches and processes.
        step: the optimizer step.
        living: the living branches.
    """
    return living[(place + step) % len(living)]


def edge_remark(values: Sequence[float], winner: int, name: str = "rate") -> str | None:
    """A remark if the winner has the lowest or highest value of a setting, so that better values may lie outside.

    Args:
        values: the setting of each branch.
        winner: the winning branch.
        name: the setting's name in the remark.

    Returns:
        the remark; None if the winner's value is neither the lowest nor the highest.
    """
    if len(set(values)) < 2 or values[winner] not in (min(values), max(values)):
        return None
    best, up = values[winner], values[winner] == max(values)
    further = best * 2 if up else best / 2
    tries = ", ".join(f"{one:g}" for one in ([best, further, further * 2] if up else [further / 2, further, best]))
    return f"the best {name} may lie {'above' if up else 'below'} {best:g}: try {name}s around it, {tries}"


def rung_record(rung: Rung, step: int, selection: dict[str, Any], retired: Sequence[int]) -> dict[str, Any]:
    """The record of a rung, ready for JSON."""
    figures = {key: selection[key] for key in ("validation_nll", "validation_accuracy", "scores", "average")}
    return {"step": step, "survivors": rung.survivors, "retired": list(retired), **figures}

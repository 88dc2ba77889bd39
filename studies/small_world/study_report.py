"""What the study's results say, as Markdown tables: means with 95% intervals, differences paired by seed, cost."""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study_arms import RATES, UNIT, all_arms
from study_derived import derived_arms

Row = dict[str, Any]
BASELINE = "grid of 4 by accuracy"
# 97.5% quantiles of Student's t for 1, 2, … degrees of freedom; beyond, the normal one
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def read_results(path: Path) -> list[Row]:
    """The result lines; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (Student's t); nan with fewer than two values."""
    mean, degrees = statistics.fmean(values), len(values) - 1
    if degrees < 1:
        return mean, math.nan
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.96
    return mean, quantile * statistics.stdev(values) / math.sqrt(degrees + 1)


def arms_by_seed(results: Iterable[Row], size: str) -> dict[str, dict[int, Row]]:
    """arm -> seed -> {test, rate, row_passes, seconds} of one data size: the derived arms, then the trained ones.

    A joint run is shown by the arms that are read off it; a later line wins.
    """
    runs: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in results:
        if row["size"] == size and "alone" not in row:
            runs[row["arm"]][row["seed"]] = row
    arms: dict[str, dict[int, Row]] = {}
    for derived in derived_arms():
        arms[derived.name] = {seed: derived.result(row) for seed, row in sorted(runs[derived.joint.name].items())}
    joint = {derived.joint.name for derived in derived_arms()}
    rates = {arm.name: arm.fields.get("comlora_branch_learning_rates") for arm in all_arms()}
    for name, rows in runs.items():
        if name not in joint:
            arms[name] = {
                seed: {**row, "test": row["branches"][str(row["winner"])]["test"], "rate": _rate(row, rates.get(name))}
                for seed, row in sorted(rows.items())
            }
    return {name: rows for name, rows in arms.items() if rows}


def _rate(row: Row, rates: list[float] | None) -> float | None:
    return rates[row["winner"]] if rates else None


def difference(arm: dict[int, Row], baseline: dict[int, Row]) -> tuple[float, float] | None:
    """Mean difference in accuracy over common seeds, in points, and half of its interval."""
    seeds = sorted(set(arm) & set(baseline))
    return interval([100 * (arm[seed]["test"] - baseline[seed]["test"]) for seed in seeds]) if seeds else None


def chosen_rates(rows: Iterable[Row]) -> str:
    """Which rates won, how often; nothing for an arm of one rate."""
    counts = Counter(row["rate"] for row in rows if row["rate"] is not None)
    return ", ".join(f"{rate:g}×{count}" for rate, count in sorted(counts.items())) if len(counts) > 1 else ""


def table(results: Sequence[Row], size: str, baseline: str = BASELINE) -> str:
    """One data size as a Markdown table; the seconds are those of a run that had the machine to itself."""
    arms = arms_by_seed(results, size)
    alone = {row["arm"]: row["seconds"] for row in results if "alone" in row and row["size"] == size}
    lines = [
        f"| arm, {size} rows | seeds | units | seconds alone | accuracy | against {baseline} | rates chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in arms.items():
        mean, half = interval([100 * row["test"] for row in rows.values()])
        gap = difference(rows, arms.get(baseline, {}))
        against = f"{gap[0]:+.1f} ± {gap[1]:.1f}" if gap and name != baseline else "–"
        units = statistics.fmean(row["row_passes"] for row in rows.values()) / UNIT
        seconds = f"{alone[name]:.1f}" if name in alone else ""
        cells = (name, len(rows), f"{units:.2f}", seconds, f"{mean:.1f} ± {half:.1f}", against)
        lines.append(f"| {' | '.join(map(str, cells))} | {chosen_rates(rows.values())} |")
    return "\n".join(lines)


def headroom(results: Iterable[Row], size: str) -> str:
    """Each task's accuracy under plain LoRA at each rate: whether there is something to tell apart."""
    singles = [arm for arm in derived_arms() if arm.name in [f"LoRA r4 {rate:g}" for rate in RATES]]
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results:
        for arm in singles:
            if row["size"] == size and row["arm"] == arm.joint.name:
                for task, value in row["branches"].get(str(arm.branches[0]), {"tasks": {}})["tasks"].items():
                    tasks[task][arm.name].append(100 * value)
    names = [arm.name for arm in singles]
    lines = [f"| {size} rows | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for task, values in tasks.items():
        cells = [f"{statistics.fmean(values[name]):.1f}" if values[name] else "–" for name in names]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)

"""What the study's results say, as Markdown tables: means with 95% intervals, differences paired by seed, cost."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study_arms import RATES, UNIT, Choice, choices, lora

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


def chosen(choice: Choice, runs: dict[str, Row]) -> Row | None:
    """A choice as a row: the best branch of the seed's runs, the cost of all; None while a run is missing."""
    if not set(choice.arms) <= set(runs):
        return None
    rows = [runs[arm] for arm in choice.arms]
    branches = [branch for row in rows for branch in row["branches"].values()]
    sign = 1 if choice.by == "nll" else -1
    best = min(branches, key=lambda branch: sign * branch[choice.by])
    return {key: sum(row[key] for row in rows) for key in ("row_passes", "seconds")} | {"test": best["test"]}


def arms_by_seed(results: Iterable[Row], size: str) -> dict[str, dict[int, Row]]:
    """arm -> seed -> {test, row_passes, seconds} of one data size, the choices included; a later line wins."""
    runs: dict[int, dict[str, Row]] = defaultdict(dict)
    for row in results:
        if row["size"] == size:
            runs[row["seed"]][row["arm"]] = {**row, "test": row["branches"][str(row["winner"])]["test"]}
    arms: dict[str, dict[int, Row]] = defaultdict(dict)
    for seed, rows in sorted(runs.items()):
        picked = {choice.name: chosen(choice, rows) for choice in choices()}
        for name, row in {**rows, **{name: row for name, row in picked.items() if row}}.items():
            arms[name][seed] = row
    return arms


def difference(arm: dict[int, Row], baseline: dict[int, Row]) -> tuple[float, float] | None:
    """Mean difference in accuracy over common seeds, in points, and half of its interval."""
    seeds = sorted(set(arm) & set(baseline))
    return interval([100 * (arm[seed]["test"] - baseline[seed]["test"]) for seed in seeds]) if seeds else None


def table(results: Iterable[Row], size: str, baseline: str = BASELINE) -> str:
    """One data size as a Markdown table."""
    arms = arms_by_seed(results, size)
    lines = [
        f"| arm, {size} rows | seeds | units | seconds | accuracy | against {baseline} |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in arms.items():
        mean, half = interval([100 * row["test"] for row in rows.values()])
        gap = difference(rows, arms.get(baseline, {}))
        against = f"{gap[0]:+.1f} ± {gap[1]:.1f}" if gap and name != baseline else "–"
        units = statistics.fmean(row["row_passes"] for row in rows.values()) / UNIT
        seconds = statistics.fmean(row["seconds"] for row in rows.values())
        lines.append(f"| {name} | {len(rows)} | {units:.2f} | {seconds:.0f} | {mean:.1f} ± {half:.1f} | {against} |")
    return "\n".join(lines)


def headroom(results: Iterable[Row], size: str) -> str:
    """Each task's accuracy under plain LoRA at each rate: whether there is something to tell apart."""
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = [lora(rate).name for rate in RATES]
    for row in results:
        if row["size"] == size and row["arm"] in names:
            for task, value in row["branches"]["0"]["tasks"].items():
                tasks[task][row["arm"]].append(100 * value)
    lines = [f"| {size} rows | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for task, values in tasks.items():
        cells = [f"{statistics.fmean(values[name]):.1f}" if values[name] else "–" for name in names]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_report(results: list[Row]) -> None:
    """The tables of every size that has results, and where they come from."""
    for size in sorted({row["size"] for row in results}, key=int, reverse=True):
        print(f"\n{table(results, size)}\n\n{headroom(results, size)}")
    origins = sorted({(row["commit"], row["machine"], row["workers"]) for row in results})
    for commit, machine, workers in origins:
        print(f"\ncommit {commit}, {machine}, {workers} runs at a time")

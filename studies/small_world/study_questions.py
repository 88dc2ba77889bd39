"""The study's questions: which arm is compared with which, paired by seed."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from study_arms import EARLY, LATE, MIDDLE, NARROW, TUNED, tournament_name
from study_derived import close_rates
from study_report import arms_by_seed, difference, headroom, table

Row = dict[str, Any]
GRID, GUESS = "grid of 4 by {by}", "LoRA r4, rate guessed among the four"
BEST_LORA, BEST_LONG, BEST_COMLORA = (
    f"{name} at its best rate" for name in ("LoRA r4", "LoRA r4 with 4x steps", "ComLoRA K4")
)
FAMILIES = {
    BEST_LORA: r"LoRA r4 [\d.e-]+",
    "LoRA r16 at its best rate": r"LoRA r16 [\d.e-]+",
    BEST_LONG: r"LoRA r4 [\d.e-]+ 4x steps",
    "ComLoRA K2 at its best rate": r"ComLoRA K2 [\d.e-]+",
    BEST_COMLORA: r"ComLoRA K4 [\d.e-]+",
}


def _shared(rungs: str, by: str, note: str = "") -> str:
    return tournament_name(4, rungs, "shared", by, note)


def _all(rungs: str, by: str, note: str = "") -> str:
    return tournament_name(4, rungs, "all", by, note)


def questions() -> list[tuple[str, str, str]]:
    """(heading, arm, baseline)"""
    asked = []
    for by in ("nll", "accuracy"):
        grid = GRID.format(by=by)
        for rungs in (EARLY, MIDDLE, LATE):
            asked.append(("one unit against four", _shared(rungs, by), grid))
        for rungs in (EARLY, MIDDLE, LATE):
            asked.append(("fewer units against four", _all(rungs, by), grid))
        for rungs in (EARLY, MIDDLE, LATE):
            asked.append(("twice the steps against four units", _all(rungs, by, " 2x steps"), grid))
        for rungs in (EARLY, MIDDLE, LATE):
            asked.append(("one unit against one", _shared(rungs, by), GUESS))
        one_rate = _all(MIDDLE, by, f" 2x steps, all {TUNED:g}")
        asked.append(("rates or seeds, four units", _all(MIDDLE, by, " 2x steps"), one_rate))
        asked.append(("against ComLoRA, four units", _all(MIDDLE, by, " 2x steps"), BEST_COMLORA))
        asked.append(("against four times the steps at the best rate", _all(MIDDLE, by, " 2x steps"), BEST_LONG))
        asked.append(("one unit against ComLoRA's four", _shared(EARLY, by), BEST_COMLORA))
        asked.append(("ComLoRA against seeds, four units", BEST_COMLORA, f"best of 4 seeds {TUNED:g} by {by}"))
        asked.append(("ComLoRA against the grid, four units", BEST_COMLORA, grid))
        asked.append(("the selector on top", _all(MIDDLE, "selector"), _all(MIDDLE, by)))
    asked.append(("a grid against a guess", GRID.format(by="accuracy"), GUESS))
    asked.append(("ComLoRA against LoRA at their best rates", BEST_COMLORA, BEST_LORA))
    asked.append(("ComLoRA against the larger LoRA", BEST_COMLORA, "LoRA r16 at its best rate"))
    asked.append(("accuracy or NLL: the grid", GRID.format(by="accuracy"), GRID.format(by="nll")))
    for rungs in (EARLY, MIDDLE, LATE):
        for name in (_shared, _all):
            asked.append(("accuracy or NLL: tournaments", name(rungs, "accuracy"), name(rungs, "nll")))
    for low in (1, 2, 3):
        close = tournament_name(4, EARLY, "all", "nll", close_rates(low))
        asked.append(("rates a factor of 2 apart: a guess", close, f"LoRA r4, rate guessed among{close_rates(low)}"))
        asked.append(("rates a factor of 2 apart: a grid", close, f"grid of 4{close_rates(low)} by nll"))
    narrow = f" {NARROW} a step"
    for rungs in (EARLY, MIDDLE):
        narrow_grid = f"grid of 4, {NARROW} rows a step by accuracy"
        asked.append((f"{NARROW} rows a step", _shared(rungs, "accuracy", narrow), narrow_grid))
    return asked


def with_best_rates(arms: Mapping[str, Mapping[int, Row]]) -> dict[str, Mapping[int, Row]]:
    """The arms, and of each family the one whose mean is best: a rate that is known only afterwards."""
    found = dict(arms)
    for title, pattern in FAMILIES.items():
        members = [rows for name, rows in arms.items() if re.fullmatch(pattern, name)]
        most = max(map(len, members), default=0)
        whole = [rows for rows in members if len(rows) == most]
        if whole:
            found[title] = max(whole, key=lambda rows: statistics.fmean(row["test"] for row in rows.values()))
    return found


def comparisons(results: Sequence[Row], sizes: Sequence[str]) -> str:
    """A Markdown table of all questions: differences in points with their 95% intervals and seeds."""
    arms = {size: with_best_rates(arms_by_seed(results, size)) for size in sizes}
    lines = [
        f"| question | arm | against | {' | '.join(f'{size} rows' for size in sizes)} |",
        "|---" * (3 + len(sizes)) + "|",
    ]
    for heading, arm, baseline in questions():
        cells = []
        for size in sizes:
            own, other = arms[size].get(arm, {}), arms[size].get(baseline, {})
            gap = difference(own, other)
            cells.append(f"{gap[0]:+.1f} ± {gap[1]:.1f} ({len(set(own) & set(other))})" if gap else "–")
        if set(cells) != {"–"}:
            lines.append(f"| {heading} | {arm} | {baseline} | {' | '.join(cells)} |")
    return "\n".join(lines)


def print_report(results: list[Row]) -> None:
    """The comparisons, the tables of every size that has results, and where they come from."""
    sizes = sorted({row["size"] for row in results}, key=int, reverse=True)
    print(f"\n{comparisons(results, sizes)}")
    for size in sizes:
        print(f"\n{table(results, size)}\n\n{headroom(results, size)}")
    for commit, machine, workers in sorted({(row["commit"], row["machine"], row["workers"]) for row in results}):
        print(f"\ncommit {commit}, {machine}, {workers} runs at a time")

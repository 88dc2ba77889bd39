"""What the results say: Markdown tables with 95% intervals over seeds, differences paired by seed, and the picture."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.common.statistics import Interval, difference, interval
from studies.real_base import base, data
from studies.real_base.arms import (
    AVERAGED,
    EARLIEST,
    EARLY,
    EARLY_OF_EIGHT,
    GRID_FIELD,
    GUESSES,
    LATE,
    LOW,
    MIDDLE,
    MIDDLE_OF_EIGHT,
    OTHER_HORIZONS,
    derived_arms,
    grid_name,
    on_lattice,
    tournament_name,
)

Row = dict[str, Any]
Arms = dict[str, dict[int, Row]]
# A run whose held-out NLL is no number counts as a uniform guess among the base's tokens, 49,152 of the default
DIVERGED = math.log(base.PACKAGES[base.DEFAULT].vocabulary)
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
SHOWN = 0.25  # nats above the best arm, in the picture
GOALS = (0.01, 0.05)  # nats: behind the grid at most, ahead of the low guess at least


def read_results(path: Path) -> list[Row]:
    """The result lines; none if there is no file. Those that name no task are older than the second one."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    for row in rows:
        if "settings" in row:
            row["settings"] = {"task": data.DEFAULT, **row["settings"]}
    return rows


def guess(row: Row) -> float:
    """NLL of a uniform guess among the tokens of a line's base: what a diverged branch counts."""
    return math.log(base.vocabulary(row.get("base", {})))


def grids(results: Iterable[Row]) -> dict[int, dict[float, Row]]:
    """seed -> rate -> a branch's figures, from the fields of the grid."""
    found: dict[int, dict[float, Row]] = {}
    for row in results:
        if GRID_FIELD.fullmatch(row["arm"]):
            for place, rate in enumerate(row["rates"]):
                nothing = {"nll": None, "accuracy": None, "test_nll": None, "guess": guess(row)}
                figures = nothing | row["branches"].get(str(place), {})
                watched = {
                    step: {by: values[place] for by, values in columns.items()}
                    for step, columns in row["watched"].items()
                }
                found.setdefault(row["seed"], {})[rate] = {**figures, "watched": watched, "steps": row["steps"]}
    return found


def best_rate(results: Iterable[Row], rates: Sequence[float], seeds: int) -> float | None:
    """The rate whose mean validation NLL over the seeds is lowest; None as long as a seed's grid is not whole."""
    found, rates = grids(results), [on_lattice(rate) for rate in rates]
    if any(rate not in found.get(seed, {}) for seed in range(seeds) for rate in rates):
        return None
    means = {
        rate: statistics.fmean(
            found[seed][rate]["guess"] if (nll := found[seed][rate]["nll"]) is None else nll for seed in range(seeds)
        )
        for rate in rates
    }
    return min(means, key=means.__getitem__)


def arms_by_seed(results: Sequence[Row], rates: Sequence[float], best: float | None) -> Arms:
    """arm -> seed -> {test_nll, test_accuracy, rate, units}: what is read off the grid, then what was trained."""
    arms: Arms = {}
    for seed, grid in sorted(grids(results).items()):
        for derived in derived_arms(best, rates) if best else []:
            if set(derived.rates) <= set(grid):
                steps = grid[derived.rates[0]]["steps"]
                rate = derived.chosen(grid, steps)
                arms.setdefault(derived.name, {})[seed] = _figures(
                    grid[rate], rate if len(derived.rates) > 1 else None, derived.units(steps)
                )
    for row in results:
        if "alone" in row or GRID_FIELD.fullmatch(row["arm"]):
            continue
        for name, figures in _read_off(row).items():
            arms.setdefault(name, {})[row["seed"]] = figures
    if "base" in arms:  # the same for all seeds
        seeds = sorted({seed for rows in arms.values() for seed in rows})
        arms["base"] = dict.fromkeys(seeds, arms["base"][0])
    return arms


def _figures(branch: Row, rate: float | None, units: float) -> Row:
    test = branch.get("test_nll")
    return {
        "test_nll": branch.get("guess", DIVERGED) if test is None else test,
        "test_accuracy": branch.get("test_accuracy") or 0.0,
        "rate": rate,
        "units": units,
    }


def _read_off(row: Row) -> dict[str, Row]:
    """The arms in a line: its winner, or each branch of a field by itself."""
    branches = {
        place: {"guess": guess(row), **row["branches"].get(str(place), {})}
        for place in range(len(row.get("rates", [0])))
    }
    if match := re.fullmatch(r"field r8 (\d+) passes", row["arm"]):
        passes = int(match[1])
        return {
            f"LoRA r8 {row['rates'][place]:g}, {passes} passes": _figures(one, None, passes)
            for place, one in branches.items()
        }
    if row["arm"] == "field r32":
        return {f"LoRA r32 {row['rates'][place]:g}": _figures(one, None, 1.0) for place, one in branches.items()}
    if match := re.fullmatch(r"four seeds (\S+)", row["arm"]):
        winner = min(branches, key=lambda place: branches[place].get("nll", math.inf))
        every = {f"four seeds {match[1]}, their mean": _mean(branches.values())}
        return {f"four seeds {match[1]}, best by nll": _figures(branches[winner], None, row["units"]), **every}
    rates = row.get("rates", [0])
    rate = rates[row["winner"]] if len(set(rates)) > 1 else None
    return {row["arm"]: _figures(branches[row["winner"]], rate, row["units"])}


def _mean(branches: Iterable[Row]) -> Row:
    figures = [_figures(branch, None, 1.0) for branch in branches]
    return {key: statistics.fmean(one[key] for one in figures) for key in ("test_nll", "test_accuracy", "units")} | {
        "rate": None
    }


def values(arms: Arms, name: str, key: str = "test_nll") -> dict[int, float]:
    """seed -> figure of an arm; empty if it is not there."""
    return {seed: row[key] for seed, row in arms.get(name, {}).items()}


def chosen_rates(rows: Iterable[Row]) -> str:
    """Which rates won, how often; nothing for an arm of one rate."""
    counts = Counter(row["rate"] for row in rows if row["rate"] is not None)
    return ", ".join(f"{rate:g}×{count}" for rate, count in sorted(counts.items()))


def table(arms: Arms, names: Sequence[str | tuple[str, str]], baseline: str) -> str:
    """Arms as a Markdown table; a pair gives a title to an arm's name. Arms that are not there are left out."""
    lines = [
        "| | units | held-out NLL | token accuracy | NLL against the grid of 4 | seeds | rates chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in names:
        title, name = entry if isinstance(entry, tuple) else (entry, entry)
        if not (rows := arms.get(name)):
            continue
        units = statistics.fmean(row["units"] for row in rows.values())
        gap = difference(values(arms, name), values(arms, baseline)) if name != baseline else None
        accuracy = interval([100 * value for value in values(arms, name, "test_accuracy").values()])
        cells = [title, f"{units:.2f}", _text(interval([*values(arms, name).values()])), _text(accuracy, ".1f")]
        cells += [_text(gap, "+.3f") if gap else "–", str(len(rows)), chosen_rates(rows.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(value: Interval, spec: str = ".3f") -> str:
    if math.isnan(value.half) or (value.half == 0 and not spec.startswith("+")):
        return f"{value.mean:{spec}}"
    return format(value, spec)


def chief(best: float) -> list[tuple[str, str]]:
    """What one would run: title and arm."""
    low = on_lattice(best * LOW)
    rows = [("the base as it is", "base")]
    for title, rate in ((f"guess {low:g}, 4 times too low", low), (f"best rate {best:g}, known afterwards", best)):
        rows += [
            (f"one LoRA, {title}", f"LoRA r8 {rate:g}"),
            (f"**tournament of 4**, shared rows, {title}", tournament_name(4, EARLY, "shared", AVERAGED, rate)),
            (f"its rungs by trained weights, {title}", tournament_name(4, EARLY, "shared", "nll", rate)),
            (f"tournament of 8, shared rows, {title}", tournament_name(8, EARLY_OF_EIGHT, "shared", AVERAGED, rate)),
            (f"tournament of 4, all rows, {title}", tournament_name(4, EARLY, "all", AVERAGED, rate)),
            (f"grid of 4, {title}", grid_name(4, "nll", rate)),
            (f"ComLoRA K = 2, {title}", f"ComLoRA K2 {rate:g}"),
            (f"ComLoRA K = 4, {title}", f"ComLoRA K4 {rate:g}"),
        ]
    half = on_lattice(best / 2)
    return [
        *rows,
        ("grid of 10", grid_name(10, "nll")),
        (f"four seeds at {best:g}, the best by validation NLL", f"four seeds {best:g}, best by nll"),
        *((f"LoRA of rank 32, {rate:g}", f"LoRA r32 {rate:g}") for rate in (low, half, best)),
        *((f"LoRA, {n} passes, {rate:g}", f"LoRA r8 {rate:g}, {n} passes") for n in (2, 4) for rate in (half, best)),
    ]


def rescue(arms: Arms, best: float) -> str:
    """What a tournament makes of a wrong guess."""
    lines = [
        "| the guess | LoRA at it | tournament of 4, shared | − LoRA | by trained weights | − LoRA | all rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for factor in GUESSES:
        rate = on_lattice(best * factor)
        tournaments = [("shared", AVERAGED), ("shared", "nll"), ("all", "nll")]
        names = [tournament_name(4, EARLY, rows, by, rate) for rows, by in tournaments]
        own = [values(arms, name) for name in (f"LoRA r8 {rate:g}", *names)]
        single, averaged, trained, every = (_text(interval([*one.values()])) if one else "–" for one in own)
        gaps = [_text(gap, "+.3f") if (gap := difference(one, own[0])) else "–" for one in own[1:3]]
        cells = [single, averaged, gaps[0], trained, gaps[1], every]
        lines.append(f"| {rate:g} ({factor:g} × the best) | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_table(arms: Arms, best: float) -> str:
    """Rungs, rows, criterion and K: held-out NLL around the best rate and around the low guess."""
    centres = (best, on_lattice(best * LOW))
    heads = [text for c in centres for text in (f"NLL, around {c:g}", f"against the grid of 4 around {c:g}")]
    lines = [f"| tournament | units | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for k, rungs in ((4, EARLIEST), (4, EARLY), (4, MIDDLE), (4, LATE), (8, EARLY_OF_EIGHT), (8, MIDDLE_OF_EIGHT)):
        for rows in ("shared", "all"):
            for by in (AVERAGED, *(f"{AVERAGED} {horizon:g}" for horizon in OTHER_HORIZONS), "nll", "accuracy"):
                cells, units = [], None
                for centre in centres:
                    name = tournament_name(k, rungs, rows, by, centre)
                    own = values(arms, name)
                    gap = difference(own, values(arms, grid_name(4, "nll", centre)))
                    cells += [_text(interval([*own.values()])) if own else "–", _text(gap, "+.3f") if gap else "–"]
                    units = statistics.fmean(values(arms, name, "units").values()) if own else units
                if units is not None:
                    lines.append(f"| K{k} {rungs} {rows} rows by {by} | {units:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comlora_table(arms: Arms, best: float) -> str:
    """ComLoRA and its ablations against one LoRA of the same rate, and against the best of four seeds."""
    low, seeds = on_lattice(best * LOW), f"four seeds {best:g}, best by nll"
    names = [f"ComLoRA K{k} {rate:g}" for k in (2, 4) for rate in (low, best)]
    names += [f"ComLoRA K2 {best:g} w/o {loss}" for loss in ("L_LM", "L_align", "L_pairwise")]
    lines = [
        "| | units | held-out NLL | against one LoRA of its rate | against the best of four seeds | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*names, seeds]:
        if not (own := values(arms, name)):
            continue
        rate = best if name == seeds else float(name.split()[2])
        gaps = [difference(own, values(arms, f"LoRA r8 {rate:g}"))]
        gaps.append(difference(own, values(arms, seeds)) if rate == best and name != seeds else None)
        cells = [_text(gap, "+.3f") if gap else "–" for gap in gaps]
        units = statistics.fmean(values(arms, name, "units").values())
        lines.append(
            f"| {name} | {units:.2f} | {_text(interval([*own.values()]))} | {' | '.join(cells)} | {len(own)} |"
        )
    return "\n".join(lines)


def goals(arms: Arms, best: float) -> str:
    """The two goals, each for the tournament of 4 on shared rows, and beside them the one on all rows."""
    low, lines = on_lattice(best * LOW), []
    for rows, by in ((rows, by) for rows in ("shared", "all") for by in (AVERAGED, "nll")):
        for centre in (best, low):
            name = tournament_name(4, EARLY, rows, by, centre)
            for baseline in (grid_name(4, "nll", centre), grid_name(10, "nll")):
                if gap := difference(values(arms, name), values(arms, baseline)):
                    verdict = "met" if gap.mean + gap.half <= GOALS[0] else "missed" if gap.mean > GOALS[0] else "open"
                    lines.append(f"| {name} | {baseline} | at most +{GOALS[0]} | {gap:+.3f} | {verdict} |")
        name, baseline = tournament_name(4, EARLY, rows, by, low), f"LoRA r8 {low:g}"
        if gap := difference(values(arms, name), values(arms, baseline)):
            met = gap.mean <= -GOALS[1] and gap.excludes_zero
            verdict, goal = "met" if met else "missed", f"{-GOALS[1]} or lower, without 0"
            lines.append(f"| {name} | {baseline} | {goal} | {gap:+.3f} | {verdict} |")
    head = "| tournament | against | goal, nats | mean ± 95% | |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines)


def clock(results: Sequence[Row]) -> str:
    """Wall clock of the runs that had the machine to themselves."""
    alone = {row["arm"]: row for row in results if "alone" in row}
    single = next((row["seconds"] for name, row in alone.items() if name.startswith("TRL")), None)
    lines = ["| seed 0, alone on the machine | units | seconds | to TRL's | held-out NLL |", "|---|---|---|---|---|"]
    for name, row in sorted(alone.items(), key=lambda arm: arm[1]["seconds"]):
        ratio = f"{row['seconds'] / single:.2f}" if single else "–"
        nll = _figures({"guess": guess(row), **row["branches"].get(str(row["winner"]), {})}, None, 0)["test_nll"]
        lines.append(f"| {name} | {row['units']:.2f} | {row['seconds']:.1f} | {ratio} | {nll:.3f} |")
    return "\n".join(lines) if alone else ""


def replies_table(folder: Path) -> str:
    """The greedy replies' metrics, by arm: means over seeds with 95% intervals."""
    rows = read_results(folder / "replies.jsonl")
    names = ("bleu", "meteor", "rouge_l", "bertscore_f1", "average")
    lines = [f"| | {' | '.join(names)} | seeds |", "|---" * (len(names) + 2) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = [_text(interval([row["metrics"][name] for row in own]), ".2f") for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(lines) if rows else ""


def provenance(results: Sequence[Row]) -> str:
    """Where the results come from, a line for each way."""
    keys = ("commit", "machine", "workers", "mps", "versions", "settings", "base")
    ways = Counter(json.dumps({key: row[key] for key in keys}, sort_keys=True) for row in results)
    lines = []
    for way, count in sorted(ways.items()):
        of = json.loads(way)
        packages = ", ".join(f"{name} {number}" for name, number in of["versions"].items())
        shared = f"{of['workers']} processes" + (" under MPS" if of["mps"] else "")
        lines.append(f"- {count} runs: commit {of['commit']}, {of['machine']}, {shared}; {packages}; {of['settings']}")
    return "\n".join([*lines, f"- base: {json.loads(next(iter(ways)))['base']}"]) if lines else ""


def sections(results: Sequence[Row], rates: Sequence[float], best: float | None, folder: Path) -> str:
    """All tables of the page."""
    if best is None:
        return f"{len(results)} runs; no table yet: the grid is not whole.\n\n{provenance(results)}"
    arms = arms_by_seed(results, rates, best)
    baseline = grid_name(4, "nll", best)
    named = {name for _, name in chief(best)}
    parts = {
        "What one would run": table(arms, chief(best), baseline),
        "Goals": goals(arms, best),
        "A wrong guess": rescue(arms, best),
        "Rungs, rows, criterion": settings_table(arms, best),
        "ComLoRA": comlora_table(arms, best),
        "Greedy replies": replies_table(folder),
        "Wall clock": clock(results),
        "The other arms": table(arms, [name for name in arms if name not in named], baseline),
        "Where the figures come from": provenance(results),
    }
    head = f"The grid's best rate by mean validation NLL is {best:g}.\n\n![Cost and quality of all arms](cost.png)\n\n"
    return head + "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if filled(text))


def is_second(results: Sequence[Row]) -> bool:
    """Whether they are of another base or another task than the study's page is about."""
    own = base.PACKAGES[base.DEFAULT].file, data.DEFAULT
    return bool(results) and (results[0]["base"]["source"], results[0]["settings"]["task"]) != own


def second(results: Sequence[Row], rates: Sequence[float], best: float | None) -> str:
    """The page of another base or task: the chief arms."""
    settings, origin = results[0]["settings"], results[0]["base"]
    title = f"# {origin['source']} learns {settings['task']}"
    text = f"{title}\n\nWritten by `run.py`; [the study](README.md) explains it."
    if best is None:
        return f"{text}\n\n{len(results)} runs; no table yet: the grid is not whole.\n\n{provenance(results)}"
    arms, baseline = arms_by_seed(results, rates, best), grid_name(4, "nll", best)
    singles = [f"LoRA r8 {on_lattice(rate):g}" for rate in rates]
    rows: list[str | tuple[str, str]] = [
        ("the base as it is", "base"),
        (f"grid of {len(rates)}", grid_name(len(rates), "nll")),
    ]
    for rate in (best, on_lattice(best * LOW)):
        rows.append((f"grid of 4 around {rate:g}", grid_name(4, "nll", rate)))
        rows += [
            (f"tournament of 4, {seen} rows, around {rate:g}", tournament_name(4, EARLY, seen, by, rate))
            for seen, by in (("shared", AVERAGED), ("all", "nll"))
        ]
        rows += [
            (
                f"rungs {EARLIEST}, by {by}, shared rows, around {rate:g}",
                tournament_name(4, EARLIEST, "shared", by, rate),
            )
            for by in (AVERAGED, f"{AVERAGED} {OTHER_HORIZONS[-1]:g}")
        ]
    parts = {
        "Grids and tournaments": table(arms, rows, baseline),
        "One LoRA": table(arms, singles, baseline),
        "Goals": goals(arms, best),
        "Where the figures come from": provenance(results),
    }
    text += f" The grid's best rate by mean validation NLL is {best:g}."
    return "\n\n".join([text, *(f"## {title}\n\n{part}" for title, part in parts.items() if filled(part))])


def write_second(results: Sequence[Row], rates: Sequence[float], best: float | None, page: Path) -> None:
    """Writes the page of another base or task, whole."""
    page.write_text(second(results, rates, best) + "\n", encoding="utf-8")
    print(f"tables written to {page}")


def filled(text: str) -> bool:
    """Whether a table has a row with a figure."""
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return any(re.search(r"\d\.\d", row) for row in rows) or text.startswith("- ")


FAMILIES = {  # the first pattern that an arm's name has counts
    "LoRA of rank 32": r"LoRA r32",
    "LoRA, more passes": r"passes",
    "one LoRA": r"LoRA r8",
    "grid": r"grid",
    "best of four seeds": r"four seeds .*best",
    "tournament, shared rows": r"tournament .* shared .* averaged nll,",
    "tournament, all rows": r"tournament .* all .* averaged nll,",
    "tournament with other rungs": r"tournament",
    "ComLoRA": r"ComLoRA",
}


def draw(arms: Arms, best: float, path: Path) -> None:
    """Cost against quality, all arms within `SHOWN` of the best; the others are counted in a note.

    Arrows lead from one LoRA at a guess to the tournament that is given the same guess.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name: interval([*values(arms, name).values()]) for name in arms}
    units = {name: statistics.fmean(row["units"] for row in rows.values()) for name, rows in arms.items()}
    limit = min(value.mean for value in found.values()) + SHOWN
    figure, axes = pyplot.subplots(figsize=(7.2, 4.6))
    families = {name: next((own for own, one in FAMILIES.items() if re.search(one, name)), None) for name in arms}
    # families stand side by side
    places = {title: 2 ** (0.035 * (place - len(FAMILIES) / 2)) for place, title in enumerate(FAMILIES)}
    for mark, title in zip("so^DPvX*h", FAMILIES, strict=True):
        shown = [name for name in arms if families[name] == title and found[name].mean <= limit]
        if shown:
            x, y = [units[name] * places[title] for name in shown], [found[name].mean for name in shown]
            bars = [0.0 if math.isnan(found[name].half) else found[name].half for name in shown]
            axes.errorbar(x, y, bars, fmt=mark, markersize=5, linewidth=0.8, alpha=0.75, label=title)
    for factor in GUESSES:
        rate = on_lattice(best * factor)
        ends = f"LoRA r8 {rate:g}", tournament_name(4, EARLY, "shared", AVERAGED, rate)
        if all(name in found and found[name].mean <= limit for name in ends):
            start, stop = ((units[name] * places[families[name]], found[name].mean) for name in ends)
            axes.annotate("", stop, start, arrowprops={"arrowstyle": "->", "color": "grey", "linewidth": 0.8})
            axes.annotate(f"{rate:g}", start, (-4, 0), textcoords="offset points", fontsize=7, ha="right", va="center")
    axes.set_ylim(top=limit)
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=0.75)
    axes.set_xticks(ticks := [1, 2, 4, 8], [str(tick) for tick in ticks])
    axes.set_xlabel("cost: passes of one LoRA over the training rows")
    axes.set_ylabel("held-out NLL (nats a token), lower is better")
    if hidden := sum(value.mean > limit and families[name] is not None for name, value in found.items()):
        axes.set_title(f"{hidden} arms above {limit:.2f} are not shown", fontsize=8)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(results: Sequence[Row], rates: Sequence[float], best: float | None, folder: Path) -> None:
    """Puts the tables between the page's markers, or prints them where there is no page, and draws the picture."""
    text, page = sections(results, rates, best, folder), folder / "README.md"
    if best is not None and results:
        try:
            draw(arms_by_seed(results, rates, best), best, folder / "cost.png")
        except ImportError:
            print("no picture: pip install matplotlib")
    if not page.exists():
        print(text)
        return
    content = page.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise ValueError(f"{page} has not both {BEGIN} and {END}: put them where the tables belong")
    head, rest = content.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"tables written to {page}")


def adapters_to_score(results: Sequence[Row], rates: Sequence[float], best: float) -> list[Mapping[str, Any]]:
    """The chief arms' adapters: {"arm", "seed", "title"}, where the title names the folder they were kept in."""
    low, found, grid = on_lattice(best * LOW), [], grids(results)
    fields = {
        (row["seed"], rate): f"{row['arm']}, seed {row['seed']}, {place}"
        for row in results
        if GRID_FIELD.fullmatch(row["arm"])
        for place, rate in enumerate(row["rates"])
    }
    derived = {arm.name: arm for arm in derived_arms(best, rates)}
    singles = [f"LoRA r8 {rate:g}" for rate in (low, best)]
    wanted = [*singles, grid_name(4, "nll", best), tournament_name(4, EARLY, "all", "nll", low)]
    for seed, own in sorted(grid.items()):
        for arm in (derived[name] for name in wanted if name in derived):
            if set(arm.rates) <= set(own):
                rate = arm.chosen(own, own[arm.rates[0]]["steps"])
                found.append({"arm": arm.name, "seed": seed, "title": fields[seed, rate]})
    kinds = (("shared", AVERAGED), ("all", AVERAGED), ("shared", "nll"))
    trained = [tournament_name(4, EARLY, rows, by, rate) for rows, by in kinds for rate in (low, best)]
    trained.append(f"ComLoRA K4 {best:g}")
    for row in results:
        if row["arm"] in trained and "alone" not in row:
            title = f"{row['arm']}, seed {row['seed']}, {row['winner']}"
            found.append({"arm": row["arm"], "seed": row["seed"], "title": title})
    return found

"""The paper's Tables 2 to 10, with the figures that lm_eval measured beside the paper's."""

from itertools import product
from pathlib import Path

from comlora_trl.evaluation.conditions import COMMONSENSE
from comlora_trl.evaluation.results import paper, read_results
from comlora_trl.evaluation.runs import Run, clashes, group_seeds, make_runs, method_key
from comlora_trl.evaluation.tables_render import Cell, Row, Table

# The tables of a data set's results; the others are commonsense accuracies of certain methods
MEASURED = ("2", "3", "4")


def build_tables(runs: list[Run], numbers: list[str]) -> list[Table]:
    """The paper's tables with the runs' figures: each method's measured rows follow the paper's row.

    Args:
        runs: what was measured, see [`comlora_trl.evaluation.runs.make_runs`].
        numbers: which tables, of "2" to "10". From 5 on they are commonsense accuracies of certain methods only.
    """
    tables = []
    for number in numbers:
        table = number if number in MEASURED else "3"
        tables.append(_build_table([run for run in runs if run.table == table], number))
    return tables


def read_runs(arguments: list[str]) -> list[Run]:
    """The runs of every result file that the arguments name, see [`comlora_trl.evaluation.results.read_results`]."""
    return make_runs(read_results(arguments))


def _build_table(runs: list[Run], number: str) -> Table:
    content = paper()["tables"][number]
    table = Table(number, content["title"], content["columns"], [])
    measured: dict[str, list[Run]] = {}
    for run in runs:
        measured.setdefault(method_key(run.method), []).append(run)
    for row in content["rows"]:
        cells = {column: Cell((row[column],) if column in row else ()) for column in table.columns}
        table.rows.append(Row(row["method"], "paper", 0, cells))
        if group := measured.pop(method_key(row["method"]), None):
            _add_method(table, row["method"], group)
    branch = f"{method_key(content['rows'][0]['method'])},branch"  # Table 10 has all branches, whichever won
    for key, group in measured.items():
        if number in MEASURED or (number == "10" and key.startswith(branch)):
            _add_method(table, group[0].method, group)
    if all(row.source == "paper" for row in table.rows):
        table.notes.append("Nothing was measured for this table.")
    _note_weights_of_two_methods(table, runs)
    return table


def _add_method(table: Table, method: str, runs: list[Run]) -> None:
    """A row for the runs of a method, or one for each set of runs that may be merged."""
    groups = group_seeds(runs)
    names = [method] if len(groups) == 1 else [f"{method} ({letter})" for letter in _letters(len(groups))]
    for name, group in zip(names, groups, strict=True):
        _add_measured(table, name, group)
    for second in range(1, len(groups)):
        for first in range(second):
            found = clashes(groups[first][0], groups[second][0])
            for one, two in product(groups[first], groups[second]):
                found = found or clashes(one, two)
            said = ", ".join(_clash(name, values) for name, values in found.items())
            table.notes.append(f"{names[first]} and {names[second]} are not merged: {said}.")


def _letters(number: int) -> list[str]:
    return [chr(ord("a") + index) if index < 26 else str(index + 1) for index in range(number)]


def _clash(name: str, values: tuple[str, str]) -> str:
    if name == "weights":
        return "they are the same adapter"
    return f"{name} {values[0]} / {values[1]}"


def _add_measured(table: Table, method: str, runs: list[Run]) -> None:
    values = [run.values | _average(table, run) for run in runs]
    cells = {column: Cell(tuple(v[column] for v in values if column in v)) for column in table.columns}
    conditions = runs[0].conditions()
    conditions["average"] = (
        str(sorted(conditions.items())) if _is_commonsense(table) else conditions.get("average", "")
    )
    table.rows.append(Row(method, "measured", len(runs), cells, conditions))
    table.notes.append(f"{method}: " + ", ".join(_place(run) for run in runs) + ".")
    for column, heading in table.columns.items():
        if 0 < len(cells[column].figures) < len(runs):
            table.notes.append(f"{method}: {heading} is of {len(cells[column].figures)} of {len(runs)} runs.")
    for run in runs:
        if _is_commonsense(table) and (missing := _missing(run)):
            headings = ", ".join(table.columns[task] for task in missing)
            table.notes.append(f"{method}: no average for {_place(run)}, which has no {headings}.")
        remarked: dict[str, list[str]] = {}
        for measure in run.measures.values():
            if measure.remarks:
                remarked.setdefault(", ".join(measure.remarks), []).append(measure.task)
        if remarked:
            said = "; ".join(f"{', '.join(tasks)}: {remarks}" for remarks, tasks in remarked.items())
            table.notes.append(f"{method}: {_place(run)} is not as the paper's. {said}.")
        table.notes += [f"{method}: {note}." for note in run.notes]


def _note_weights_of_two_methods(table: Table, runs: list[Run]) -> None:
    methods: dict[str, dict[str, str]] = {}
    for run in runs:
        methods.setdefault(run.identity, {})[method_key(run.method)] = run.method
    for named in methods.values():
        if len(named) > 1:
            table.notes.append(f"{' and '.join(named.values())} are figures of the same adapter.")


def _place(run: Run) -> str:
    """The run's adapter, from the current folder if it is below it, with its weights and seed where they are known."""
    place = run.place.removeprefix(f"{Path.cwd()}/")
    known = [f"weights {run.about['sha256'][:8]}"] if run.about.get("sha256") else []
    known += [f"seed {run.about['seed']}"] if run.about.get("seed") is not None else []
    return f"{place} ({', '.join(known)})" if known else place


def _is_commonsense(table: Table) -> bool:
    return "boolq" in table.columns


def _missing(run: Run) -> list[str]:
    return [task for task in COMMONSENSE if task not in run.values]


def _average(table: Table, run: Run) -> dict[str, float]:
    """The unweighted mean of the eight, for a run that has them all."""
    if not _is_commonsense(table) or _missing(run):
        return {}
    return {"average": sum(run.values[task] for task in COMMONSENSE) / len(COMMONSENSE)}

"""`comlora-tables`: the paper's Tables 2 to 10 with what lm_eval measured beside the paper's figures."""

import argparse
import sys
from itertools import product
from pathlib import Path

from comlora_trl.evaluation.conditions import COMMONSENSE
from comlora_trl.evaluation.results import paper, read_results
from comlora_trl.evaluation.runs import Run, clashes, group_seeds, make_runs, method_key
from comlora_trl.evaluation.scores import put_on_card
from comlora_trl.evaluation.tables_render import FORMATS, Cell, Row, Table

# The tables of a data set's results; the others are commonsense accuracies of certain methods
MEASURED = ("2", "3", "4")
_DESCRIPTION = """\
Prints the paper's Table 2 (MMLU), 3 (commonsense), 4 (CONVAI2) or an ablation (5 to 10) from lm_eval's result files:
under each method of the paper its figures (LLaMA-3-8B, means of 5 seeds) and the measured ones,
mean ± standard deviation over seeds, the best of each column bold and the second underlined."""

_EPILOG = """\
What belongs together:
  The method is NAME where it is given. Else the adapter tells, if its folder is still there: rank from
  adapter_config.json, K from competition.json ("ComLoRA K=2 r=8", "LoRA r=8"). Else it is the model's name.
  A method called as the paper calls it stands beside the paper's row; others follow below.
  An adapter is known by the hash of its weights. Adapters of one method that were trained and measured in the same
  way but for the seed make one row; every other difference (prompt, decoding, chat template, rows, data, base,
  settings, BERTScore's model) keeps rows apart and is named below the table, as is which adapters a row is of.
  Result files of one adapter are put together; the newer one counts where two measured the same in the same way.

What is not guessed:
  A cell that was not measured is "–". The average of Table 3 is that of all eight tasks, else "–".
  What sets figures apart from the paper's (--limit, part of the data, another prompt, beams, sampling, a chat
  template, another BERTScore model than roberta-large) is named below the table.

Examples:
  lm_eval --model hf --model_args peft=seed1/winner/ --tasks comlora_commonsense --output_path results/
  comlora-tables results/
  comlora-tables results/ --table 3 --format latex --output table3.tex
  comlora-tables results/ --card winner/
  comlora-tables "ComLoRA K=2 r=8=runs/*/results" "LoRA r=8=lora/results" "mine=other/results"
"""


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "comlora-tables",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        nargs="*",
        default=["."],
        metavar="RESULTS",
        help="a result file of lm_eval, a folder searched for them (what --output_path named) or a quoted pattern; "
        "NAME=RESULTS names the method (default: the current folder)",
    )
    parser.add_argument(
        "--card",
        metavar="ADAPTER",
        help="instead of tables: write the results of this adapter's weights on its card, ADAPTER/README.md",
    )
    parser.add_argument(
        "--table",
        choices=[*paper()["tables"], "all"],
        default="all",
        help="which table (default: all three of the results: 2, 3 and 4; 5 to 10 are the ablations)",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="markdown",
        help="markdown (default), latex (for the booktabs package) or csv (one unrounded figure a line)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write to FILE (replaced) instead of the screen")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The console script `comlora-tables`.

    Returns:
        0, or 1 after one line on stderr if the results can't be read.
    """
    options = _parser().parse_args(arguments)
    numbers = list(MEASURED) if options.table == "all" else [options.table]
    try:
        if options.card:
            path, scores = put_on_card(options.card, options.results)
            for score in scores:
                said = ", ".join(f"{name} {value:.2f}" for name, value in score.metrics.items())
                print(f"{path}: {score.task} {said} ({score.conditions})")
            return 0
        tables = build_tables(read_runs(options.results), numbers)
        text = FORMATS[options.format](tables)
        if options.output:
            options.output.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"comlora-tables: {error}", file=sys.stderr)
        return 1
    if not options.output:
        sys.stdout.write(text)
    if options.format == "csv":
        for table in tables:
            for note in table.notes:
                print(f"Table {table.number}: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`comlora-tables`: the paper's Tables 2, 3 and 4 with what lm_eval measured beside the paper's figures."""

import argparse
import re
import sys
from pathlib import Path

from comlora_trl.evaluation.results import COMMONSENSE, Run, paper, read_runs
from comlora_trl.evaluation.tables_render import FORMATS, Cell, Row, Table

_DESCRIPTION = """\
Prints the paper's Table 2 (MMLU), Table 3 (commonsense) and Table 4 (CONVAI2) from lm_eval's result files:
under each method of the paper its figures (LLaMA-3-8B, means of 5 seeds) and the measured ones,
mean ± standard deviation over seeds, the best of each column bold and the second underlined."""

_EPILOG = """\
What belongs together:
  The method is NAME where it is given. Else the adapter tells, if its folder is still there: rank from
  adapter_config.json, K from competition.json ("ComLoRA K=2 r=8", "LoRA r=8"). Else it is the model's name.
  A method called as the paper calls it stands beside the paper's row; others follow below.
  Adapters of one method are its seeds. Result files of one adapter are put together; the newer one counts
  where two measured the same. Each table says below it which runs it took for seeds of one method.

What is not guessed:
  A cell that was not measured is "–". The average of Table 3 is that of all eight tasks, else "–".
  A test set of another size than the paper's (--limit, part of the data) and another BERTScore model than
  roberta-large are named below the table.

Examples:
  lm_eval --model hf --model_args peft=seed1/winner/ --tasks comlora_commonsense --output_path results/
  comlora-tables results/
  comlora-tables results/ --table 3 --format latex --output table3.tex
  comlora-tables "ComLoRA K=2 r=8=runs/*/results" "LoRA r=8=lora/results" "mine=other/results"
"""


def build_tables(runs: list[Run], numbers: list[str]) -> list[Table]:
    """The paper's tables with the runs' figures: each method's measured row follows the paper's row.

    Args:
        runs: what was measured, one entry per seed.
        numbers: which tables, of "2", "3" and "4".
    """
    return [_build_table(runs, number) for number in numbers]


def _build_table(runs: list[Run], number: str) -> Table:
    content = paper()["tables"][number]
    table = Table(number, content["title"], content["columns"], [])
    measured: dict[str, list[Run]] = {}
    names: dict[str, str] = {}
    for run in runs:
        if run.values[number]:
            names.setdefault(_key(run.method), run.method)
            measured.setdefault(_key(run.method), []).append(run)
    for row in content["rows"]:
        cells = {column: Cell((row[column],) if column in row else ()) for column in table.columns}
        table.rows.append(Row(row["method"], "paper", 0, cells))
        if _key(row["method"]) in measured:
            _add_measured(table, row["method"], measured.pop(_key(row["method"])))
    for key, group in measured.items():
        _add_measured(table, names[key], group)
    if all(row.source == "paper" for row in table.rows):
        table.notes.append("Nothing was measured for this table.")
    return table


def _key(method: str) -> str:
    """Method names are compared without regard to case and white space."""
    return re.sub(r"\s+", "", method).lower()


def _add_measured(table: Table, method: str, runs: list[Run]) -> None:
    values = [run.values[table.number] | _average(table, run) for run in runs]
    cells = {column: Cell(tuple(v[column] for v in values if column in v)) for column in table.columns}
    table.rows.append(Row(method, "measured", len(runs), cells))
    table.notes.append(f"{method}: " + ", ".join(_place(run) for run in runs) + ".")
    bases = sorted({run.base for run in runs if run.base})
    if len(bases) > 1:
        table.notes.append(f"{method}: its runs have different base models ({', '.join(bases)}), so are no seeds.")
    for column, heading in table.columns.items():
        if 0 < len(cells[column].figures) < len(runs):
            table.notes.append(f"{method}: {heading} is of {len(cells[column].figures)} of {len(runs)} runs.")
    for run in runs:
        if table.number == "3" and (missing := _missing(run)):
            headings = ", ".join(table.columns[task] for task in missing)
            table.notes.append(f"{method}: no average for {_place(run)}, which has no {headings}.")
        if remarks := run.remarks[table.number]:
            table.notes.append(f"{method}: {_place(run)} has {', '.join(remarks.values())}.")


def _place(run: Run) -> str:
    """The run's adapter, from the current folder if it is below it."""
    return run.model.removeprefix(f"{Path.cwd()}/")


def _missing(run: Run) -> list[str]:
    return [task for task in COMMONSENSE if task not in run.values["3"]]


def _average(table: Table, run: Run) -> dict[str, float]:
    """Table 3's unweighted mean of the eight, for a run that has them all."""
    if table.number != "3" or _missing(run):
        return {}
    return {"average": sum(run.values["3"][task] for task in COMMONSENSE) / len(COMMONSENSE)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "comlora-tables",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="a result file of lm_eval, a folder searched for them (what --output_path named) or a quoted pattern; "
        "NAME=RESULTS names the method",
    )
    parser.add_argument("--table", choices=["2", "3", "4", "all"], default="all", help="which table (default: all)")
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
    numbers = ["2", "3", "4"] if options.table == "all" else [options.table]
    try:
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

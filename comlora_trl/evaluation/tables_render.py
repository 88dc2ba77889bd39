"""A table of means over seeds as Markdown, LaTeX or CSV: the best of each column bold, the second underlined."""

import csv
import io
import statistics
from dataclasses import dataclass, field

UNMEASURED = "–"


@dataclass(frozen=True)
class Cell:
    """The figures of one column over the seeds that have it (in percent); none if it was not measured."""

    figures: tuple[float, ...] = ()

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.figures) if self.figures else None

    @property
    def std(self) -> float | None:
        """The sample's standard deviation (n - 1), or None for fewer than two seeds."""
        return statistics.stdev(self.figures) if len(self.figures) > 1 else None


@dataclass(frozen=True)
class Row:
    """One method, from the paper or measured over `runs` seeds; `cells` by column, as are the `conditions` of figures
    that can be compared."""

    method: str
    source: str
    runs: int
    cells: dict[str, Cell]
    conditions: dict[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """A table of the paper: `columns` maps a column's key to its heading."""

    number: str
    title: str
    columns: dict[str, str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def ranks(table: Table) -> dict[tuple[int, str], int]:
    """Which cells (row index, column) are best (1) and second (2), among the paper's rows and the measured apart, and
    among the measured only those that were measured alike.

    What is printed decides, so equal figures share a rank. A figure with nothing to compare it with has none.
    """
    result = {}
    for column in table.columns:
        comparable: dict[tuple[str, str], dict[int, float]] = {}
        for index, row in enumerate(table.rows):
            if row.cells[column].mean is not None:
                alike = comparable.setdefault((row.source, row.conditions.get(column, "")), {})
                alike[index] = round(row.cells[column].mean, 2)
        for means in comparable.values():
            if len(means) > 1:
                order = sorted(set(means.values()), reverse=True)[:2]
                result |= {(index, column): 1 + order.index(m) for index, m in means.items() if m in order}
    return result


def markdown(tables: list[Table]) -> str:
    """GitHub's Markdown, notes below each table."""
    parts = []
    for table in tables:
        marks = {1: "**{}**", 2: "<u>{}</u>"}
        lines = [f"**Table {table.number}: {table.title}**", ""]
        lines += [
            _pipe(["method", "", *table.columns.values()]),
            _pipe(["---", "---", *["---:"] * len(table.columns)]),
        ]
        lines += [_pipe([a.replace("|", "\\|") for a in cells]) for cells in _texts(table, marks, " ± ")]
        lines += ["", *(f"- {note}" for note in table.notes)] if table.notes else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def latex(tables: list[Table]) -> str:
    """A `table` environment each, for the booktabs package; notes as comments above it."""
    parts = []
    for table in tables:
        marks = {1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
        lines = [f"% {note}" for note in table.notes]
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{_escape(table.title)}}}"]
        lines += [rf"\begin{{tabular}}{{ll{'r' * len(table.columns)}}}", r"\toprule"]
        lines += [" & ".join(["method", "", *map(_escape, table.columns.values())]) + r" \\", r"\midrule"]
        for method, source, *cells in _texts(table, marks, r" $\pm$ "):
            cells = [cell.replace(UNMEASURED, "--") for cell in cells]
            lines.append(" & ".join([_escape(method), _escape(source), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def comma_separated(tables: list[Table]) -> str:
    """One line per figure, unrounded: table, method, source, column, mean, std, runs. Unmeasured ones are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "method", "source", "column", "mean", "std", "runs"])
    for table in tables:
        for row in table.rows:
            for column, cell in row.cells.items():
                if cell.figures:
                    std = "" if cell.std is None else cell.std
                    runs = "" if row.source == "paper" else len(cell.figures)
                    writer.writerow([table.number, row.method, row.source, column, cell.mean, std, runs])
    return text.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def _texts(table: Table, marks: dict[int, str], plus_minus: str) -> list[list[str]]:
    ranked = ranks(table)
    result = []
    for index, row in enumerate(table.rows):
        source = row.source if row.source == "paper" else f"{row.runs} run" + "s" * (row.runs != 1)
        cells = []
        for column in table.columns:
            cell = row.cells[column]
            if cell.mean is None:
                cells.append(UNMEASURED)
                continue
            mean = marks.get(ranked.get((index, column), 0), "{}").format(f"{cell.mean:.2f}")
            cells.append(mean if cell.std is None else f"{mean}{plus_minus}{cell.std:.2f}")
        result.append([row.method, source, *cells])
    return result


def _pipe(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)

"""What `run.py` found, as a table and as JSON."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import about
import torch
from cases import Shape
from rich.table import Table


class Results:
    """Rows of the table, and every figure behind them, in the JSON file `output`."""

    def __init__(self, shape: Shape, output: str) -> None:
        self.output = Path(output)
        self.rows: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {"environment": _environment(shape)}

    def row(self, name: str, value: float, goal: float | None = None, detail: str = "") -> None:
        """A measured ratio; without a goal it is shown beside the others and judged by nobody."""
        met = None if goal is None else value <= goal
        self.rows.append({"row": name, "value": value, "goal": goal, "met": met, "detail": detail})

    def missing(self, name: str, reason: str) -> None:
        """A row that could not be measured."""
        self.rows.append({"row": name, "value": None, "goal": None, "met": None, "detail": reason})

    def write(self) -> None:
        """Writes everything found so far."""
        content = {"rows": self.rows, "figures": self.figures}
        self.output.write_text(json.dumps(content, indent=1) + "\n")

    def table(self) -> Table:
        """The rows with goal and verdict."""
        environment = self.figures["environment"]
        table = Table(title=", ".join(f"{key} {value}" for key, value in environment.items()))
        for column in ("", "measured", "goal", "verdict", "detail"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            value, goal = ("" if row[key] is None else f"{row[key]:.3f}" for key in ("value", "goal"))
            table.add_row(row["row"], value, goal, _verdict(row), row["detail"])
        return table


def _verdict(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "not measured"
    if row["goal"] is None:
        return ""
    if not torch.cuda.is_available():
        return "no GPU"
    return "met" if row["met"] else "not met"


def _environment(shape: Shape) -> dict[str, Any]:
    cuda = shape.device.type == "cuda"
    return {
        "machine": about.machine(),
        "commit": about.commit(),
        "layers": shape.config.num_hidden_layers,
        "rows": shape.rows,
        "tokens": shape.tokens,
        "cuda": torch.version.cuda,
        "triton": version("triton") if cuda else None,
        **about.versions(),
    }

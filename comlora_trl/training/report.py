"""What a run tells: the parameter line at its start, the table at its end, and `competition.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comlora_trl.branches.expansion import SEPARATELY
from comlora_trl.competition import CompetitionState
from comlora_trl.training.model import ComLoRAModel

COMPETITION_FILE = "competition.json"


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model with branches: base, all K adapters, selector."""

    base: int
    adapters: int
    selector: int

    @classmethod
    def of(cls, model: ComLoRAModel) -> "ParameterCounts":
        adapters = sum(_numel(p) for branch in range(model.settings.k) for p in model.branch_parameters(branch))
        selector = sum(_numel(p) for p in model.selector.parameters()) if model.selector is not None else 0
        return cls(sum(_numel(p) for p in model.parameters()) - adapters - selector, adapters, selector)

    @property
    def adapter_share(self) -> float:
        """Adapters over base plus adapters, in percent (the paper's Table 3)."""
        return 100 * self.adapters / (self.base + self.adapters)

    @property
    def selector_share(self) -> float:
        """Selector over base plus adapters plus selector, in percent."""
        return 100 * self.selector / (self.base + self.adapters + self.selector)

    def __str__(self) -> str:
        text = f"adapters {self.adapters:,} ({self.adapter_share:.2f}% of base + adapters)"
        if self.selector:
            text += f", selector {self.selector:,} ({self.selector_share:.2f}% of everything, training only)"
        return text


def _numel(parameter: Any) -> int:
    # 4-bit weights are packed two to a byte; DeepSpeed ZeRO-3 keeps the full count in ds_numel
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def start_line(model: ComLoRAModel, kernels: str, chunk: int | None) -> str:
    """The line that training prints at its start."""
    config = model.peft_config[model.active_adapter]
    k, place = model.settings.k, model.expansion.place
    together = "all at once" if chunk in (None, k) else f"{chunk} at a time"
    how = f"{kernels} kernels"
    if k > 1 and place == SEPARATELY:
        together = place
    elif (chunk or k) > 1:
        how += f"; the batch widens {place}"
    return f"ComLoRA: K={k} branches of rank {config.r}, {together} ({how}); {ParameterCounts.of(model)}"


def competition_summary(state: CompetitionState, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of `competition.json`: the final table and the logged history of the competition."""
    result = state.selection or {}
    total = sum(state.wins)
    branches = [
        {
            "branch": branch,
            "validation_nll": result["validation_nll"][branch] if result else None,
            "validation_accuracy": result["validation_accuracy"][branch] if result else None,
            "score": result["scores"][branch] if result.get("scores") else None,
            "share_of_wins": state.wins[branch] / total if total else None,
            "disqualified_at_step": state.disqualified.get(branch),
        }
        for branch in range(state.k)
    ]
    kept = [
        {
            key: value
            for key, value in entry.items()
            if key in ("step", "epoch", "loss", "eval_loss") or "comlora/" in key
        }
        for entry in history
        if any("comlora/" in key for key in entry)
    ]
    return {
        "k": state.k,
        "winner": state.leader,
        "winner_by_validation_loss": result.get("winner_by_validation_loss"),
        "step": result.get("step"),
        "validation_examples": result.get("examples"),
        "branches": branches,
        "history": kept,
    }


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Writes `competition.json` into a folder."""
    (folder / COMPETITION_FILE).write_text(json.dumps(summary, indent=2) + "\n")


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the competition's outcome as a table."""
    table = Table(
        title=f"Competition of {summary['k']} branches, {summary['validation_examples']} validation examples"
    )
    for heading in ("branch", "validation NLL", "accumulated score", "share of wins", ""):
        table.add_column(heading, justify="left" if heading in ("branch", "") else "right")
    for line in summary["branches"]:
        remark = "winner" if line["branch"] == summary["winner"] else ""
        if line["disqualified_at_step"] is not None:
            remark = f"disqualified at step {line['disqualified_at_step']}"
        table.add_row(
            f"branch_{line['branch']}",
            _cell(line["validation_nll"], ".4f"),
            _cell(line["score"], ".2f"),
            _cell(line["share_of_wins"], ".0%"),
            remark,
        )
    by_loss = summary["winner_by_validation_loss"]
    if by_loss != summary["winner"]:
        table.caption = f"by validation NLL alone, branch_{by_loss} would have won"
    (console or Console()).print(table)


def _cell(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)

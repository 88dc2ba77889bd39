"""A run's reports: the lines at its start, the tables at rungs and at its end, and `competition.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from comlora_trl.branches.passes import SEPARATELY
from comlora_trl.competition import CompetitionState
from comlora_trl.competition.rungs import Rung, early_remark, edge_remark
from comlora_trl.training.model import ComLoRAModel
from comlora_trl.winner.folder import COMPETITION_FILE
from comlora_trl.winner.table import averaged_remark, cell, competition_table


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model with branches.

    Attributes:
        base: parameters of the base model.
        adapters: parameters of all K adapters.
        selector: parameters of the selector.
    """

    base: int
    adapters: int
    selector: int

    @classmethod
    def of(cls, model: ComLoRAModel) -> "ParameterCounts":
        """Counts the parameters of a model."""
        adapters = sum(_numel(p) for branch in range(model.k) for p in model.branch_parameters(branch))
        selector = sum(_numel(p) for p in model.selector_parameters())
        return cls(sum(_numel(p) for p in model.parameters()) - adapters - selector, adapters, selector)

    @property
    def adapter_share(self) -> float:
        """Adapters in percent of base and adapters, as in the paper's Table 3."""
        return 100 * self.adapters / (self.base + self.adapters)

    @property
    def selector_share(self) -> float:
        """Selector in percent of base, adapters and selector."""
        return 100 * self.selector / (self.base + self.adapters + self.selector)

    def __str__(self) -> str:
        text = f"adapters {self.adapters:,} ({self.adapter_share:.2f}% of base + adapters)"
        if self.selector:
            text += f", selector {self.selector:,} ({self.selector_share:.2f}% of everything, training only)"
        return text


def _numel(parameter: Any) -> int:
    # bitsandbytes packs two 4-bit weights into a byte; under ZeRO-3, ds_numel is the count of the whole parameter
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def start_line(model: ComLoRAModel, kernels: str, chunk: int | None, by_module: bool = False) -> str:
    """The line about the branches that training prints at its start.

    Args:
        model: the model with its branches.
        kernels: "torch" or "triton", see [`selected_kernels`].
        chunk: number of branches that run at a time; None for all.
        by_module: whether weights are gathered one module at a time, see [`sharding.gathers_by_module`].
    """
    config = model.peft_config[model.active_adapter]
    k, place = model.k, model.expansion.place
    together = "all at once" if chunk in (None, k) else f"{chunk} at a time"
    how = f"{kernels} kernels"
    if k > 1 and place == SEPARATELY:
        together = place
    elif (chunk or k) > 1:
        how += f"; the batch widens {place}"
    if k > 1 and by_module:
        how += "; slower than unsharded, because each adapted layer runs its branches one after the other"
    return f"ComLoRA: K={k} branches of rank {config.r}, {together} ({how}); {ParameterCounts.of(model)}"


def tournament_line(
    args: Any, rates: list[str] | None, rungs: dict[int, Rung], max_steps: int, averaged: bool = False
) -> str | None:
    """The line about rates, rungs and shared rows that training prints at its start.

    If the first rung comes too early, a second line says so, see [`early_remark`].

    Args:
        args: the training arguments.
        rates: rate of each branch, as text from the optimizer's groups; None if all rates are the same.
        rungs: the rungs by optimizer step.
        max_steps: number of optimizer steps of the run.
        averaged: whether rungs measure averages of the weights.

    Returns:
        the text; None if there are no different rates or betas, no rungs and no shared rows.
    """
    parts = []
    if rates is not None:
        parts.append("rates " + ", ".join(rates))
    if betas := getattr(args, "comlora_branch_betas", None):
        parts.append("betas " + ", ".join(f"{beta:g}" for beta in betas))
    if rungs:
        steps = ", ".join(f"{rung.survivors} after step {step}" for step, rung in rungs.items())
        parts.append(f"branches that go on: {steps}, by {args.winner_by.replace('_', ' ')}")
        parts[-1] += " of averaged weights" if averaged else ""
    if args.comlora_rows == "shared":
        parts.append("rows shared: the cost of one LoRA")
    if not parts:
        return None
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    warmup = args.get_warmup_steps(max_steps)
    remark = early_remark(rungs, rows, args.comlora_k, args.comlora_rows == "shared", warmup)
    return "Tournament: " + "; ".join(parts) + (f"\n{remark}" if remark else "")


def competition_summary(state: CompetitionState, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of `competition.json`: the final table and the logged history of the competition.

    Args:
        state: the state of the competition.
        history: the Trainer's log history.
    """
    result, total = state.selection or {}, sum(state.wins)
    branches = [
        {
            "branch": branch,
            "learning_rate": state.rates[branch] if state.rates else None,
            **({"beta": state.betas[branch]} if state.betas else {}),
            **_last_figures(state, branch),
            "share_of_wins": state.wins[branch] / total if total else None,
            "retired_at_step": state.retired.get(branch),
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
        "measured": state.measured,
        "branches": branches,
        "rungs": state.rungs,
        "row_passes": state.row_passes,
        "history": kept,
    }


def write_summary(summary: dict[str, Any], folder: Path) -> None:
    """Writes `competition.json` into a folder."""
    (folder / COMPETITION_FILE).write_text(json.dumps(summary, indent=2) + "\n")


def print_table(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the outcome of a competition as a table, with remarks below.

    Args:
        summary: content of `competition.json`.
        console: where to print; None for the terminal.
    """
    title = f"Competition of {summary['k']} branches"
    if summary["validation_examples"]:
        title += f", {summary['validation_examples']} validation examples"
    headings, rows = competition_table(summary)
    table = _table(title, headings[1:-1])
    for row in rows:
        table.add_row(*row)
    by_loss, remarks = summary["winner_by_validation_loss"], [one] if (one := averaged_remark(summary)) else []
    if by_loss not in (summary["winner"], None):
        remarks.append(f"by validation {summary['measured'][0]} alone, branch_{by_loss} would have won")
    rates = [line["learning_rate"] for line in summary["branches"]]
    if None not in rates and edge_remark(rates, summary["winner"]):
        remarks.append(edge_remark(rates, summary["winner"]))
    betas = [line["beta"] for line in summary["branches"] if "beta" in line]
    if betas and edge_remark(betas, summary["winner"], "beta"):
        remarks.append(edge_remark(betas, summary["winner"], "beta"))
    if summary["rungs"] or None not in rates:
        remarks.append(f"cost: {summary['row_passes']:,} row passes (one row through one branch and back)")
    _print(table, remarks, console)


def print_rung(
    record: dict[str, Any],
    rates: list[float | None],
    steps: int,
    state: CompetitionState,
    console: Console | None = None,
) -> None:
    """Prints the figures of the branches at a rung, and which of them go on.

    Args:
        record: the rung's record.
        rates: rate of each branch; None if it is not known.
        steps: number of optimizer steps of the run.
        state: the state of the competition.
        console: where to print; None for the terminal.
    """
    loss, accuracy = state.measured
    headings = ["rate", *(["beta"] if state.betas else []), f"validation\n{loss}", accuracy.replace(" ", "\n")]
    weights = ", averaged weights" if record["average"] else ""
    table = _table(f"Rung at step {record['step']} of {steps}{weights}", headings)
    for branch, rate in enumerate(rates):
        beta = [cell(state.betas[branch], "g")] if state.betas else []
        nll, accuracy = record["validation_nll"][branch], record["validation_accuracy"][branch]
        if nll is not None:
            outcome = "retired" if branch in record["retired"] else "goes on"
            table.add_row(f"branch_{branch}", cell(rate, "g"), *beta, cell(nll, ".4f"), cell(accuracy, ".1%"), outcome)
    _print(table, [], console)


def _print(table: Table, remarks: list[str], console: Console | None) -> None:
    console = console or Console()
    console.print()  # the cursor may be in the line of a progress bar
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False, soft_wrap=True)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title)
    table.add_column("branch")
    for heading in headings:
        table.add_column(heading, justify="right")
    table.add_column("")
    return table


def _last_figures(state: CompetitionState, branch: int) -> dict[str, Any]:
    """A branch's newest validation figures, from the last selection or from the rung that retired it.

    `average` is the horizon if they are those of averaged weights.
    """
    columns = {"validation_nll": "validation_nll", "validation_accuracy": "validation_accuracy", "score": "scores"}
    for measured in (state.selection, *reversed(state.rungs)):
        if measured is not None and measured["validation_nll"][branch] is not None:
            figures = {key: measured[column][branch] if measured[column] else None for key, column in columns.items()}
            return figures | {"average": measured.get("average")}
    return dict.fromkeys((*columns, "average"))

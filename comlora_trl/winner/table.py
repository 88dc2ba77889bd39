"""The final table of a competition, for the terminal and the model card."""

from typing import Any


def _columns(measured: list[str]) -> tuple[tuple[str, str, str], ...]:
    """The columns as (heading, key, format). The headings contain line breaks for a narrow table."""
    loss, accuracy = measured
    return (
        ("rate", "learning_rate", "g"),
        ("beta", "beta", "g"),
        (f"validation\n{loss}", "validation_nll", ".4f"),
        (accuracy.replace(" ", "\n"), "validation_accuracy", ".1%"),
        ("score", "score", ".2f"),
        ("wins", "share_of_wins", ".0%"),
    )


def competition_table(summary: dict[str, Any], adapter: int | None = None) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of cells: each branch with its figures and its outcome.

    Columns without any figure are left out, except for the validation loss.

    Args:
        summary: content of `competition.json`.
        adapter: the branch to mark as "this adapter"; None for no mark.
    """
    branches = summary["branches"]
    columns = [
        column
        for column in _columns(summary.get("measured") or ["NLL", "token accuracy"])
        if column[1] == "validation_nll" or any(branch.get(column[1]) is not None for branch in branches)
    ]
    rows = []
    for branch in branches:
        outcome = _outcome(branch, summary.get("winner"))
        if branch["branch"] == adapter:
            outcome = f"{outcome}, this adapter" if outcome else "this adapter"
        cells = [cell(branch.get(key), spec) for _, key, spec in columns]
        rows.append([f"branch_{branch['branch']}", *cells, outcome])
    return ["branch", *(heading for heading, _, _ in columns), ""], rows


def averaged_remark(summary: dict[str, Any]) -> str | None:
    """A remark that names the branches whose figures are those of averaged weights; None if there are none."""
    names = [f"branch_{one['branch']}" for one in summary["branches"] if one.get("average") is not None]
    if not names:
        return None
    return f"{', '.join(names)}: figures of averaged weights, at a rung"


def cell(value: float | None, spec: str) -> str:
    """A figure as text, or a dash if there is none."""
    return "–" if value is None else format(value, spec)


def _outcome(branch: dict[str, Any], winner: int | None) -> str:
    if branch["branch"] == winner:
        return "winner"
    ends = ((what, branch.get(f"{what}_at_step")) for what in ("retired", "disqualified"))
    return next((f"{what} at step {step}" for what, step in ends if step is not None), "")

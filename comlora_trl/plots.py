"""Draws pictures of a competition from the `competition.json` in a winner's folder.

losses: each branch's validation loss over the run, with the rungs; wins: the paper's Figure 2, which branch had the
lowest training loss how often; scores: its Figure 3, the selector's score against the validation loss. This module
needs matplotlib (the extra `plots`) and nothing else of the package, so that a picture takes no torch.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = (".png", ".svg", ".pdf")
# With so few validations the curve says little, and the training loss is drawn too
_FEW = 8
_SELECTION = re.compile(r"eval(?:_.+)?_comlora/(loss|score)_(\d+)")
_STRONG, _LIGHT = {"linewidth": 2.6, "zorder": 3}, {"linewidth": 1.4, "zorder": 2}

Curve = dict[int, float]  # values by optimizer step, ascending


@dataclass(frozen=True)
class Competition:
    """The part of `competition.json` that the pictures need.

    Attributes:
        branches: the final table, a line per branch.
        validation, scores: each branch's mean validation NLL (nats per token) and summed selector scores.
        training: each branch's mean training NLL since the log before.
        wins: optimizer steps won since the log before, of each living branch.
        rungs: (optimizer step, branches before it, branches after it).
    """

    winner: int
    row_passes: int
    branches: list[dict[str, Any]]
    validation: list[Curve]
    training: list[Curve]
    scores: list[Curve]
    wins: list[Curve]
    rungs: list[tuple[int, int, int]]

    @property
    def k(self) -> int:
        return len(self.branches)

    def end(self, branch: int) -> int | None:
        """The optimizer step at which a branch was retired or disqualified, None if it never was."""
        line = self.branches[branch]
        ends = [line.get(f"{what}_at_step") for what in ("retired", "disqualified")]
        return min((step for step in ends if step is not None), default=None)

    def label(self, branch: int) -> str:
        """A branch's name in the legend, with its rate if rates differ, and its end."""
        line = self.branches[branch]
        text = f"branch_{branch}"
        if line.get("learning_rate") is not None:
            text += f", rate {line['learning_rate']:g}"
        if branch == self.winner:
            return f"{text}: winner"
        for what in ("retired", "disqualified"):
            if line.get(f"{what}_at_step") is not None:
                text += f": {what} at step {line[f'{what}_at_step']}"
        return text


def read_competition(folder: str | Path) -> Competition:
    """Reads a winner's folder (a retired branch's, too), or a `competition.json`.

    Raises:
        ValueError: if there is none, it is unreadable, or it has no history.
    """
    path = Path(folder)
    path = path / "competition.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{folder}: no competition.json there, so this is no winner of a competition; give the folder that "
            "training exported (winner/ unless --comlora_winner_dir said otherwise)."
        )
    try:
        content = json.loads(path.read_text())
        return _parse(content)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is not what training writes ({type(error).__name__}: {error}); export the winner again."
        ) from error


def _parse(content: dict[str, Any]) -> Competition:
    k = len(content["branches"])
    found: dict[str, list[Curve]] = {name: [{} for _ in range(k)] for name in ("train", "wins", "loss", "score")}
    for entry in content["history"]:
        for name, value in entry.items():
            selection = _SELECTION.fullmatch(name)
            kind, _, branch = name.removeprefix("comlora/").rpartition("_")
            if selection:
                found[selection[1]][int(selection[2])][entry["step"]] = value
            elif name.startswith("comlora/") and kind in ("loss", "wins"):
                found["train" if kind == "loss" else "wins"][int(branch)][entry["step"]] = value
    measured = [len(curve) for curve in found["loss"]]
    for rung in content["rungs"]:
        for branch, value in enumerate(rung["validation_nll"]):
            # The figures of averaged weights do not lie on the curve of the trained ones
            if value is not None and (rung.get("average") is None or measured[branch] < 2):
                found["loss"][branch][rung["step"]] = value
    curves = {name: [dict(sorted(curve.items())) for curve in of_all] for name, of_all in found.items()}
    before = [k, *(rung["survivors"] for rung in content["rungs"])]
    rungs = [(rung["step"], n, rung["survivors"]) for n, rung in zip(before, content["rungs"], strict=False)]
    return Competition(
        content["winner"],
        content["row_passes"],
        content["branches"],
        validation=curves["loss"],
        training=curves["train"],
        scores=curves["score"],
        wins=curves["wins"],
        rungs=rungs,
    )


def draw_losses(axes: Any, run: Competition) -> None:
    """Validation loss over the run; thin lines are the training loss, crosses the last point of a retired branch."""
    few = len({step for curve in run.validation for step in curve}) < _FEW
    if not any(run.validation) and not any(run.training):
        raise ValueError("its history has no branch's loss: train with --logging_steps, or with validation data.")
    for branch in range(run.k):
        color, style = _color(run, branch), _style(run, branch)
        training, curve, end = run.training[branch], run.validation[branch], run.end(branch)
        if training and (few or not curve):
            # The last log of a retired branch is later than its end, so its point is moved to the end
            training = {min(step, math.inf if end is None else end): value for step, value in training.items()}
            axes.plot(*_xy(training), color=color, linewidth=0.9, alpha=0.45, zorder=1)
        axes.plot(*_xy(curve), color=color, label=run.label(branch), marker="o", markersize=4, **style)
        if end is not None and curve:
            last = max(curve)
            axes.plot(last, curve[last], "X", color=color, markeredgecolor="white", markersize=10, zorder=4)
    values = [v for curve in run.validation or run.training for v in curve.values() if 0 < v < math.inf]
    if values and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_ylabel("validation loss (nats per token)" + ("; thin: training" if few and any(run.training) else ""))
    _mark_rungs(axes, run)
    _over_steps(axes, run, f"{run.row_passes:,} row passes")


def draw_wins(axes: Any, run: Competition) -> None:
    """The paper's Figure 2: each branch's share of the steps so far in which its training loss was the lowest."""
    steps = sorted({step for curve in run.wins for step in curve})
    # The last branch wins every step, so these steps are left out
    steps = [step for step in steps if sum(step in curve for curve in run.wins) > 1]
    if not steps:
        raise ValueError("its history has no step that several branches could win: train with --logging_steps.")
    totals, so_far = [0.0] * run.k, {}
    for step in steps:
        for branch, curve in enumerate(run.wins):
            totals[branch] += curve.get(step, 0.0)
        so_far[step] = [100 * total / max(sum(totals), 1.0) for total in totals]
    for branch, curve in enumerate(run.wins):
        end = run.end(branch)
        shares = {step: so_far[step][branch] for step in steps if step in curve and (end is None or step <= end)}
        axes.plot(
            *_xy(shares),
            color=_color(run, branch),
            label=run.label(branch),
            marker="o",
            markersize=3,
            **_style(run, branch),
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the steps so far won (%)")
    _mark_rungs(axes, run, until=steps[-1])
    _over_steps(axes, run, "lowest training loss")


def draw_scores(axes: Any, run: Competition) -> None:
    """The paper's Figure 3: the selector's score of each branch against its validation loss, a point a selection."""
    both = [sorted(scores.keys() & loss.keys()) for scores, loss in zip(run.scores, run.validation, strict=True)]
    if not any(both):
        raise ValueError("its history has no scores: only a run with a selector has them (--comlora_selector true).")
    for branch, steps in enumerate(both):
        color, style = _color(run, branch), _style(run, branch)
        x = [run.validation[branch][step] for step in steps]
        y = [run.scores[branch][step] for step in steps]
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5, zorder=1)
        axes.scatter(x[:-1], y[:-1], color=color, s=22, alpha=0.6, zorder=2, linewidths=0)
        size = 110 if style is _STRONG else 60
        axes.scatter(x[-1:], y[-1:], color=color, s=size, zorder=3, edgecolors="white", label=run.label(branch))
    axes.set_xlabel("validation loss (nats per token)")
    axes.set_ylabel("selector's score, summed over the validation set")
    axes.set_title(_title(run, "large: the last selection"), fontsize=11)
    axes.legend(fontsize=9)


FIGURES: dict[str, Callable[[Any, Competition], None]] = {
    "losses": draw_losses,
    "wins": draw_wins,
    "scores": draw_scores,
}


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def _color(run: Competition, branch: int) -> Any:
    from matplotlib import colormaps

    if run.k <= 10:
        return colormaps["tab10"](branch)
    return colormaps["viridis"](0.9 * branch / (run.k - 1))


def _style(run: Competition, branch: int) -> dict[str, float]:
    return _STRONG if branch == run.winner else _LIGHT


def _title(run: Competition, remark: str) -> str:
    return f"Competition of {run.k} branches ({remark})" if run.k > 1 else f"One branch ({remark})"


def _over_steps(axes: Any, run: Competition, remark: str) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_title(_title(run, remark), fontsize=11, pad=18 if run.rungs else 8)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.legend(fontsize=9)


def _mark_rungs(axes: Any, run: Competition, until: float = math.inf) -> None:
    for step, before, after in run.rungs:
        if step <= until:
            axes.axvline(step, color="0.45", linestyle="--", linewidth=1, zorder=0)
            place = {"xy": (step, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 3)}
            text = f"{before} → {after}"
            axes.annotate(text, **place, textcoords="offset points", ha="center", fontsize=9, color="0.3")


def draw(folder: str | Path, output: str | Path | None = None, figure: str = "losses") -> Path:
    """Draws a picture of the competition that a winner comes from.

    Args:
        folder: the winner's folder.
        output: a .png, .svg or .pdf; None for `competition.png` in the folder (which its card shows), or `FIGURE.png`.
        figure: "losses", "wins" or "scores".

    Returns:
        the picture's path.

    Raises:
        ValueError: if the folder is no winner's, its history has nothing to draw, or the format is unknown.
        ImportError: if matplotlib is missing.
        OSError: if the picture can't be written.
    """
    run = read_competition(folder)
    home = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    output = Path(output) if output is not None else home / f"{'competition' if figure == 'losses' else figure}.png"
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {output} is not possible: the name must end in {', '.join(FORMATS)}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "pictures need matplotlib: pip install matplotlib (or this package with the extra plots)."
        raise ImportError(message) from error
    # Without pyplot there is no window, no backend and no global state
    picture = Figure(figsize=(8, 4.5), layout="constrained")
    axes = picture.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    try:
        FIGURES[figure](axes, run)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    picture.savefig(output, dpi=110)
    return output

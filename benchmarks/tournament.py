"""Whole runs of tournaments and of TRL's trainer, for `run.py`.

A run counts from `train()` to the adapter on disk, ours with its validations, retirements and the winner's export.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Bench, rotated
from report import Results
from trainers import StepTimer, make_trainer, quiet
from trl import SFTTrainer

from comlora_trl import ComLoRASFTTrainer

# 8 rows are to 40 steps what the default validation set's 120 are to a run of 600
VALIDATION = 8
_TOURNAMENT = {"comlora_tournament": True}


@dataclass
class Run:
    """What a run took.

    Attributes:
        seconds: from `train()` to the adapter on disk.
        rungs: seconds in the rungs, all of it: validation, export of the retired, what is freed.
        forward: seconds of the validations' own forwards, within the rungs.
        peak_gib: peak memory until the last rung (without rungs: of the whole run).
        last_ms: median milliseconds of a step after the last rung.
        last_peak_gib: peak memory after the last rung.
    """

    seconds: float = 0.0
    rungs: float = 0.0
    forward: float = 0.0
    peak_gib: float = 0.0
    last_ms: float = 0.0
    last_peak_gib: float = 0.0


def tournaments(bench: Bench, results: Results) -> None:
    """Tournaments with their default rungs against TRL's LoRA: whole runs, time and memory."""
    shape, small = bench.shape, bench.shape.rows // 4
    steps = 40 if shape.device.type == "cuda" else 12
    arms: dict[str, tuple[str, int, dict[str, Any]]] = {
        "TRL": ("trl", shape.rows, {}),
        "4, shared": ("comlora", shape.rows, {**_TOURNAMENT, "comlora_k": 4}),
        "8, shared": ("comlora", shape.rows, {**_TOURNAMENT, "comlora_k": 8}),
        "4, all rows": ("comlora", shape.rows, {**_TOURNAMENT, "comlora_k": 4, "comlora_rows": "all"}),
        "K=1": ("comlora", shape.rows, {"comlora_k": 1, "comlora_selector": False}),
        "TRL, small": ("trl", small, {}),
        "4, shared, small": ("comlora", small, {**_TOURNAMENT, "comlora_k": 4}),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, settings in (("trl", {}), ("comlora", {**_TOURNAMENT, "comlora_rungs": "0.3:2,0.6:1"})):
            _run(make_trainer(bench, kind, shape.rows, folder, 3, VALIDATION, **settings), 3)  # warm-up
        runs: dict[str, list[Run]] = {arm: [] for arm in arms}
        for turn in range(max(1, shape.rounds // 4)):
            for arm in rotated(arms, turn):
                kind, rows, settings = arms[arm]
                runs[arm].append(_run(make_trainer(bench, kind, rows, folder, steps, VALIDATION, **settings), steps))
                gc.collect()  # trainers hold themselves in circles
            found = {arm: _median(measured) for arm, measured in runs.items()}
            results.figures[f"runs of {steps} steps"] = {
                arm: {"median": asdict(found[arm]), "runs": [asdict(one) for one in measured]}
                for arm, measured in runs.items()
            }
            results.write()  # a call that is cut keeps the turns it had
    _rows(found, results, shape.rows, small, shape.device.type == "cuda")


def _rows(found: dict[str, Run], results: Results, large: int, small: int, cuda: bool) -> None:
    single, one = found["TRL"], found["4, shared"]
    for name, arm, base, times, goal in (
        (f"tournament of 4, shared rows / one TRL LoRA run, {large} rows a step", "4, shared", "TRL", 1, 0.85),
        (f"the same, {small} rows a step", "4, shared, small", "TRL, small", 1, 0.90),
        (f"tournament of 8, shared rows / one TRL LoRA run, {large} rows", "8, shared", "TRL", 1, 0.90),
        (f"tournament of 4, all rows / four TRL LoRA runs, {large} rows", "4, all rows", "TRL", 4, 0.30),
    ):
        ours, theirs = found[arm], found[base]
        detail = f"{ours.seconds:.2f} s, {ours.rungs:.2f} of it in the rungs; TRL {theirs.seconds:.2f} s a run"
        results.row(name, ours.seconds / (times * theirs.seconds), goal, detail)
    for name, arm in ((f"{large} rows", "4, shared"), (f"{small} rows", "4, shared, small")):
        ours = found[arm]
        detail = f"{ours.rungs:.3f} s in the rungs, {ours.forward:.3f} of it forward, of {ours.seconds:.2f} s"
        share = (ours.rungs - ours.forward) / ours.seconds
        results.row(
            f"a rung's validation and retirement but for the forward, share of the run, {name}", share, 0.02, detail
        )
    alone = found["K=1"]
    detail = f"{one.last_ms:.1f}, {alone.last_ms:.1f} ms"
    results.row(f"step after the last rung / K=1's, {large} rows", one.last_ms / alone.last_ms, 1.02, detail)
    memory = (
        (f"peak memory, tournament of 4, shared rows / one PEFT LoRA, {large} rows", one.peak_gib, single, 1.05),
        (f"peak memory after the last rung / K=1's, {large} rows", one.last_peak_gib, alone, 1.02),
    )
    for name, ours, other, goal in memory:
        if cuda:
            results.row(name, ours / other.peak_gib, goal, f"{ours:.2f}, {other.peak_gib:.2f} GiB")
        else:
            results.missing(name, "needs a GPU")


def _run(trainer: SFTTrainer, steps: int) -> Run:
    """One whole run; nothing of the trainer is needed afterwards."""
    run, timer = Run(), _PhaseTimer(trainer)
    trainer.add_callback(timer)
    ours = isinstance(trainer, ComLoRASFTTrainer)
    if ours:
        _watch_rungs(trainer, run)
    start = _now()
    with quiet():
        trainer.train()
        if not ours:
            trainer.save_model()  # ours leaves its adapter by itself
    run.seconds = _now() - start
    # The last step has the winner's selection in it
    after = max(trainer.competition.rungs, default=0) if ours else 0
    run.last_ms = statistics.median(timer.intervals()[after + 1 : steps - 2] or timer.intervals())
    run.peak_gib, run.last_peak_gib = timer.peaks[0], timer.peaks[-1]
    return run


def _watch_rungs(trainer: ComLoRASFTTrainer, run: Run) -> None:
    """Times the rungs, and within them the forwards of the validation."""
    reach_rung: Callable[[], None] = trainer.reach_rung
    began: list[float] = []
    inside = False

    def timed() -> None:
        nonlocal inside
        if trainer.state.global_step not in trainer.competition.rungs:
            return
        start, inside = _now(), True
        reach_rung()
        run.rungs, inside = run.rungs + _now() - start, False

    def before(*_: Any) -> None:
        if inside:
            began.append(_now())

    def after(*_: Any) -> None:
        if inside:
            run.forward += _now() - began.pop()

    trainer.reach_rung = timed
    trainer.comlora_model.register_forward_pre_hook(before)
    trainer.comlora_model.register_forward_hook(after)


class _PhaseTimer(StepTimer):
    """Ends of steps, and the peak memory of the phases before and after the last rung, in GiB."""

    def __init__(self, trainer: SFTTrainer) -> None:
        super().__init__(trainer.args.device)
        self.trainer = trainer
        self.peaks: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, *rest, **kwargs)
        rungs = self.trainer.competition.rungs if isinstance(self.trainer, ComLoRASFTTrainer) else {}
        # ... up to the step before the last one, which has the winner's selection in it
        if state.global_step == max(rungs, default=0) or state.global_step == state.max_steps - 1:
            self._end_phase()

    def _end_phase(self) -> None:
        cuda = self.device.type == "cuda"
        self.peaks.append(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)
        if cuda:
            torch.cuda.reset_peak_memory_stats()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _median(runs: list[Run]) -> Run:
    return Run(**{name: statistics.median(asdict(run)[name] for run in runs) for name in asdict(runs[0])})

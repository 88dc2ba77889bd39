"""The study: what does competition buy over one LoRA, a grid of rates, several seeds? One command, resumable.

    python scripts/study.py                             # every arm, 8 seeds, both data sizes; a GPU
    python scripts/study.py --arms 'lora r4 *' --seeds 2 --sizes 640 --workers 2
    python scripts/study.py --report                    # only the tables of what is there

Runs go to worker processes that share the GPU. Each finished run is one line of studies/results.jsonl; a second call
trains what is missing. Seeds draw the data, the branches and the order of rows: arms are compared seed by seed.
"""

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from make_demo_data import make_splits
from study_arms import SIZES, TUNED, Arm, all_arms
from study_report import print_report, read_results
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
VALIDATION, TEST = 25, 150  # rows of each task


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--seeds", type=int, default=8, help="0 to N-1 (default %(default)s)")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES), help="default: both")
    parser.add_argument("--workers", type=int, default=4, help="processes at a time (default %(default)s)")
    parser.add_argument("--tuned", type=float, default=TUNED, help="rate of ComLoRA's ablations (default %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "studies" / "results.jsonl", help="file of the results")
    parser.add_argument("--seconds", type=float, help="give out no run after this many seconds")
    parser.add_argument("--dry_run", action="store_true", help="list the missing runs and their cost")
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    return parser.parse_args()


def missing_jobs(arms: Iterable[Arm], sizes: list[str], seeds: int, results: Path) -> list[dict[str, Any]]:
    """The runs that have no line yet: the core's first, seed by seed, the dearest of a seed first."""
    done = {(row["arm"], row["size"], row["seed"]) for row in read_results(results)}
    ordered = sorted(arms, key=lambda arm: -arm.steps * (1 + arm.row_passes / arm.steps / 64))
    groups = ([arm for arm in ordered if arm.core], [arm for arm in ordered if not arm.core])
    runs = ((arm, seed, size) for group in groups for seed in range(seeds) for arm in group for size in sizes)
    jobs = [{"arm": arm.name, "size": size, "seed": seed} for arm, seed, size in runs]
    return [job for job in jobs if (job["arm"], job["size"], job["seed"]) not in done]


def write_data(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Draws the data of every size and seed, and names its file in the jobs."""
    for job in tqdm(jobs, desc="data", leave=False):
        path = folder / f"{job['size']}-{job['seed']}.json"
        job["data"] = str(path)
        if not path.exists():
            path.write_text(json.dumps(make_splits(SIZES[job["size"]], VALIDATION, TEST, job["seed"])))


class Pool:
    """Worker processes, each fed by a thread; results are written as they come."""

    def __init__(self, jobs: list[dict[str, Any]], arguments: argparse.Namespace, about: dict[str, Any]) -> None:
        self.results, self.about = arguments.results, about
        self.deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
        self.command = [sys.executable, str(Path(__file__).with_name("study_run.py")), str(arguments.tuned)]
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        for job in jobs:
            self.waiting.put(job)
        self.bar, self.lock, self.failed = tqdm(total=len(jobs), desc="runs"), threading.Lock(), 0
        self.log = (self.results.parent / "study.log").open("a")
        self.threads = [threading.Thread(target=self._work) for _ in range(min(arguments.workers, len(jobs)))]

    def run(self) -> int:
        """Trains all; returns how many runs failed."""
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()
        self.bar.close()
        return self.failed

    def _work(self) -> None:
        worker = None
        while job := self._next():
            if worker is None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
                worker = subprocess.Popen(self.command, text=True, **pipes)
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                worker.wait()
                worker, line = None, '{"error": "its worker died; see study.log"}'
            self._keep(job, json.loads(line))
        if worker is not None:
            worker.stdin.close()
            worker.wait()

    def _next(self) -> dict[str, Any] | None:
        late = self.deadline is not None and time.monotonic() > self.deadline
        try:
            return None if late else self.waiting.get_nowait()
        except queue.Empty:
            return None

    def _keep(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        with self.lock:
            self.bar.update()
            if "error" in result:
                self.failed += 1
                self.bar.write(f"{job['arm']}, {job['size']} rows, seed {job['seed']}: {result['error']}")
                return
            with self.results.open("a") as file:
                file.write(json.dumps({**result, **self.about}) + "\n")


def describe_run(workers: int) -> dict[str, Any]:
    """Commit, machine and how many runs shared it."""
    import torch

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {"commit": commit.strip() or "unknown", "machine": machine, "workers": workers}


def main() -> None:
    arguments = parse_arguments()
    arms = [arm for arm in all_arms(arguments.tuned) if any(fnmatch(arm.name, name) for name in arguments.arms)]
    if not arms:
        sys.exit(f"error: no arm is called {' or '.join(arguments.arms)}; --dry_run without --arms lists them")
    jobs = [] if arguments.report else missing_jobs(arms, arguments.sizes, arguments.seeds, arguments.results)
    if arguments.dry_run:
        passes = {arm.name: arm.row_passes for arm in arms}
        for job in jobs:
            print(f"{job['arm']}, {job['size']} rows, seed {job['seed']}: {passes[job['arm']]:,} row passes")
        sys.exit(f"{len(jobs)} runs, {sum(passes[job['arm']] for job in jobs):,} row passes")
    failed = 0
    if jobs:
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            write_data(jobs, Path(folder))
            failed = Pool(jobs, arguments, describe_run(arguments.workers)).run()
    print_report(read_results(arguments.results))
    if failed:
        sys.exit(f"{failed} of {len(jobs)} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()

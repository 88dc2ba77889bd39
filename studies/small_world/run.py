"""The study: what does competition buy over one LoRA, a grid of rates, several seeds? One command, resumable.

    python studies/small_world/run.py                             # every arm, 8 seeds, both data sizes; a GPU
    python studies/small_world/run.py --arms 'ComLoRA K2 *' --seeds 2 --sizes 640 --workers 2
    python studies/small_world/run.py --report                    # only the tables of what is there

Worker processes share the GPU. Each finished run is one line of results.jsonl in this folder; a second call trains
what is missing. A seed draws the world (facts that the base does not know), the rows, their order and the branches:
arms are compared seed by seed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "demo")]
from demo_facts import shuffled_world  # noqa: E402
from make_demo_data import make_splits  # noqa: E402
from study_arms import SHARE, SIZES, TIMED, TUNED, Arm, all_arms  # noqa: E402
from study_questions import print_report  # noqa: E402
from study_report import read_results  # noqa: E402

from benchmarks import about  # noqa: E402
from studies.common.pool import Job, Pool, shared_gpu  # noqa: E402

VALIDATION, TEST = 25, 150  # rows of each task


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=["*"], help="names or patterns (default: all)")
    parser.add_argument("--seeds", type=int, default=8, help="0 to N-1 (default %(default)s)")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES), help="default: both")
    parser.add_argument("--workers", type=int, default=4, help="processes at a time (default %(default)s)")
    parser.add_argument("--tuned", type=float, default=TUNED, help="rate of ComLoRA's ablations (default %(default)s)")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", help="file of the results")
    parser.add_argument("--seconds", type=float, help="give out no run after this many, and wait 60 more")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 (default: float32, tf32 on a GPU)")
    parser.add_argument("--dry_run", action="store_true", help="list the missing runs and their cost")
    parser.add_argument("--report", action="store_true", help="print the tables, train nothing")
    arguments = parser.parse_args()
    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} is not possible: give 1 or more")
    return arguments


def missing_jobs(arms: Iterable[Arm], sizes: list[str], seeds: int, results: Path) -> list[Job]:
    """The runs that have no line yet: by priority, then seed by seed, the longest of a seed first."""
    done = {(row["arm"], row["size"], row["seed"]) for row in read_results(results) if "alone" not in row}
    ordered = sorted(arms, key=lambda arm: -arm.expected)
    groups = [[arm for arm in ordered if arm.priority == priority] for priority in (1, 2, 3)]
    runs = ((arm, seed, size) for group in groups for seed in range(seeds) for arm in group for size in sizes)
    jobs = [{"arm": arm.name, "size": size, "seed": seed} for arm, seed, size in runs if seed < (arm.seeds or seeds)]
    return [job for job in jobs if (job["arm"], job["size"], job["seed"]) not in done]


def jobs_alone(arms: Iterable[Arm], results: Path) -> list[Job]:
    """Runs of seed 0 that get the machine to themselves, for their seconds."""
    done = {row["arm"] for row in read_results(results) if "alone" in row}
    names = [arm.name for arm in arms if arm.name in TIMED and arm.name not in done]
    return [{"arm": name, "size": "6000", "seed": 0, "alone": True} for name in names]


def write_data(jobs: list[Job], folder: Path) -> None:
    """Draws the world and the rows of every size and seed, and names their file in the jobs."""
    for job in jobs:
        path = folder / f"{job['size']}-{job['seed']}.json"
        job["data"] = str(path)
        if not path.exists():
            # The world's seed apart from the rows': sizes of one seed share their world
            world, seed = shuffled_world(job["seed"], SHARE), 1000 + job["seed"]
            path.write_text(json.dumps(make_splits(SIZES[job["size"]], VALIDATION, TEST, seed, world)))


def train(jobs: list[Job], alone: list[Job], arguments: argparse.Namespace) -> int:
    """Trains the jobs, first those that are timed alone; returns how many failed."""
    deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
    precision = precision_of(arguments)
    command = [sys.executable, str(Path(__file__).with_name("study_run.py")), str(arguments.tuned), precision]
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    single = Pool(command, arguments.results, describe_run(1, precision), 1 if alone else 0, deadline)
    with tempfile.TemporaryDirectory() as folder, shared_gpu() as environment:
        about, workers = describe_run(arguments.workers, precision) | {"mps": bool(environment)}, arguments.workers
        pool = Pool(command, arguments.results, about, min(workers, len(jobs)), deadline, environment=environment)
        write_data([*alone, *jobs], Path(folder))
        return single.run(supplier(alone)) + pool.run(supplier(jobs))


def supplier(jobs: list[Job]) -> Callable[[], Job | None]:
    """Gives the jobs one by one, then None."""
    waiting = iter(jobs)
    return lambda: next(waiting, None)


def precision_of(arguments: argparse.Namespace) -> str:
    """What the runs are trained in; ends the program where the file has runs in another precision."""
    precision = "bf16" if arguments.bf16 else "float32"
    others = {row["precision"] for row in read_results(arguments.results)} - {precision}
    if others:
        sys.exit(
            f"error: {arguments.results} has runs in {others.pop()}, and arms are compared in one precision: "
            f"{'leave --bf16 out' if arguments.bf16 else 'add --bf16'}, or give another file with --results"
        )
    return precision


def describe_run(workers: int, precision: str) -> dict[str, Any]:
    """Commit, machine, how many runs shared it, and in what precision."""
    return {"commit": about.commit(), "machine": about.machine(), "workers": workers, "precision": precision}


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
        print(f"{len(jobs)} runs, {sum(passes[job['arm']] for job in jobs):,} row passes")
        return
    alone = [] if arguments.report else jobs_alone(arms, arguments.results)
    failed = train(jobs, alone, arguments) if jobs or alone else 0
    print_report(read_results(arguments.results))
    if failed:
        sys.exit(f"{failed} of {len(jobs)} runs failed, see above; the same command tries them again")


if __name__ == "__main__":
    main()

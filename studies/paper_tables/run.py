"""Train and score every row of one of the paper's tables, and print the paper's figures and ours side by side.

    python studies/paper_tables/run.py --table 5                    # embedded base and data, offline, two CPU cores
    python studies/paper_tables/run.py --table 3 --dry_run          # the runs and what they cost, nothing else
    python studies/paper_tables/run.py --figure 2                   # trains one competition and draws it
    python studies/paper_tables/run.py --table 4 --scale real       # SmolLM2-135M-Instruct, CONVAI2, three seeds
    python studies/paper_tables/run.py --table 3 --scale paper --launch "accelerate launch --num_processes 8"

Tables 2 to 10, Figures 2 and 3. Each row is a recipe in recipes/, which `scripts/sft.py --config` takes by itself;
tables.yaml says which rows a table has, whose competition a figure shows and what a scale adds. What follows
`--` goes to sft.py as it is and wins. A run that is there is not done again, and one that was interrupted goes on from
its last checkpoint: the same command continues.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from plan import (
    REPOSITORY,
    Planned,
    last_checkpoint,
    plan,
    plan_figure,
    results_of,
    tables_file,
    training_command,
)

from comlora_trl.cli.tables import main as print_tables
from comlora_trl.data.demo import read_demo_rows
from comlora_trl.plots import draw

COST_FILE = "cost.json"
EXTRA_FILE = "extra.json"  # the flags of sft.py that a run was given besides its recipe
MOST_JOBS = 4  # of the demo's runs at once, each of 1 to 2 GB


def demo_data(output: Path) -> Path:
    """The embedded test set in the layout of the eight commonsense tasks."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in read_demo_rows("test"):
        by_task.setdefault(row["task"], []).append(row)
    for task, rows in by_task.items():
        file = output / "demo" / "data" / "commonsense" / task / "test.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows), encoding="utf-8")
    return output / "demo" / "data"


def execute(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """Runs a command, its output in a file.

    Raises:
        RuntimeError: it failed; names the file and its last line.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {}))
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise RuntimeError(f"{' '.join(command[:3])} ... failed, see {log}: {lines[-1]}")


def perform(run: Planned, options: argparse.Namespace, data_dir: Path | None) -> float:
    """Trains and scores a run, as far as that is not done; a figure's is not scored. Returns the seconds it took."""
    start, new = time.monotonic(), not run.trained
    # Two processes that both want every core are slower than one after the other
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))} if options.jobs > 1 else {}
    environment = {"COMLORA_DATA_DIR": str(data_dir)} if data_dir else {}
    if new:
        execute(training_command(run, options.launch, options.extra), run.folder / "train.log", threads)
        (run.folder / EXTRA_FILE).write_text(json.dumps(options.extra), encoding="utf-8")
    if not options.figure:
        score(run, options, threads | environment)
    seconds = time.monotonic() - start
    if new:
        cost = {"row_passes": run.row_passes, "seconds": seconds}
        (run.folder / COST_FILE).write_text(json.dumps(cost), encoding="utf-8")
    return seconds


def score(run: Planned, options: argparse.Namespace, environment: dict[str, str]) -> None:
    """lm_eval on what a run has exported."""
    if run.every_branch and not run.adapters():
        script = str(REPOSITORY / "scripts" / "export_winner.py")
        checkpoint = str(last_checkpoint(run.folder / "output"))
        target = str(run.folder / "branches")
        command = [sys.executable, script, checkpoint, "--branch", "all", "--output", target]
        execute(command, run.folder / "export.log", environment)
    for _, adapter in run.adapters():
        if results_of(adapter).is_dir():
            continue
        # written elsewhere first, so that results are whole when they are there
        unfinished = results_of(adapter).with_suffix(".unfinished")
        command = [sys.executable, "-m", "comlora_trl.cli.eval", "--model", "hf", "--tasks", run.tasks]
        command += [
            "--model_args",
            f"peft={adapter}",
            "--batch_size",
            options.batch_size,
            "--output_path",
            str(unfinished),
        ]
        execute(command, run.folder / f"score-{adapter.name}.log", environment)
        unfinished.rename(results_of(adapter))


def remaining(runs: list[Planned], output: Path, jobs: int) -> str:
    """What is left to train, and how long that takes if any run in the folder tells."""
    passes = sum(run.row_passes for run in runs if not run.trained)
    costs = [json.loads(file.read_text()) for file in output.glob(f"*/*/*/*/{COST_FILE}")]
    text = f"{passes:,} row passes left"
    if costs and passes:
        rate = sum(cost["seconds"] for cost in costs) / sum(cost["row_passes"] for cost in costs)
        text += f", about {passes * rate / 60 / min(jobs, len(runs)):.0f} min"
    return text


def check_extra(runs: list[Planned], extra: list[str]) -> None:
    """Ends the command if a run that is there was trained with other flags after `--`."""
    for run in runs:
        file = run.folder / EXTRA_FILE
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        if run.trained and own != extra:
            said, asked = (shlex.join(flags) or "no flags" for flags in (own, extra))
            sys.exit(
                f"error: {run.folder} was trained with {said} after --, and this command has {asked}: give the same, "
                "or another folder with --output"
            )


def main(argv: list[str]) -> None:
    options = parse(argv)
    output = options.output.absolute()
    if options.figure:
        runs = [plan_figure(options.figure, options.scale, output, options.model)]
        todo = [run for run in runs if not run.trained]
    else:
        runs = plan(options.table, options.scale, output, options.seeds, options.model)
        todo = [run for run in runs if not run.done]
    check_extra(runs, options.extra)
    name = f"Figure {options.figure}" if options.figure else f"Table {options.table}"
    print(f"{name}, scale {options.scale}: {len(runs)} run{'s' * (len(runs) > 1)}, ", end="")
    print(f"{len(runs) - len(todo)} done; {remaining(runs, output, options.jobs)}")
    if options.dry_run:
        for run in runs:
            state = "trained" if run.trained and run in todo else f"{run.row_passes:,} row passes"
            print(f"{run.method}, seed {run.seed}: {state if run in todo else 'done'}")
            print("  " + shlex.join(training_command(run, options.launch, options.extra)))
        return
    work(todo, runs, options, output)
    if options.figure:
        print(picture(runs[0], options.figure, output / options.scale))
        return
    print()
    named = [f"{method}={results_of(adapter)}" for run in runs for method, adapter in run.adapters()]
    sys.exit(print_tables([*named, "--table", options.table]))


def check_scale(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command in one line where a scale lacks the table, or its base model is not there yet."""
    chosen = tables_file()["scales"][options.scale]
    allowed = chosen.get("tables")
    if allowed and options.table not in allowed:
        asked = f"--table {options.table}" if options.table else f"--figure {options.figure}"
        names = ", ".join(f"--table {table}" for table in allowed)
        parser.error(f"--scale {options.scale} has no {asked}: give {names}, or another scale")
    if options.scale == "real" and not options.model and not options.dry_run and not Path(chosen["model"]).is_dir():
        parser.error(
            f"the folder {chosen['model']} is not here: write it with `python studies/real_base/base.py --output "
            f"{chosen['model']}`, or name another base with --model"
        )


def work(todo: list[Planned], runs: list[Planned], options: argparse.Namespace, output: Path) -> None:
    """Trains and scores what is left to do, several runs at a time; the first failure ends it."""
    data = demo_data(output) if options.scale == "demo" and not options.figure else None
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(perform, run, options, data): run for run in todo}
        for number, future in enumerate(as_completed(futures), start=1):
            run = futures[future]
            try:
                seconds = future.result()
            except RuntimeError as error:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"error: {run.method}, seed {run.seed}: {error}; the same command goes on from here")
            left = remaining(runs, output, options.jobs)
            print(f"[{number}/{len(todo)}] {run.method}, seed {run.seed}: {seconds:.0f} s; {left}", flush=True)


def picture(run: Planned, figure: str, folder: Path) -> Path:
    """Draws a figure of a run that is trained."""
    try:
        return draw(run.folder / "winner", folder / f"figure{figure}.png", tables_file()["figures"][figure]["picture"])
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def parse(argv: list[str]) -> argparse.Namespace:
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=[str(number) for number in range(2, 11)], help="which table")
    what.add_argument("--figure", choices=["2", "3"], help="which figure; needs matplotlib (the extra plots)")
    parser.add_argument(
        "--scale",
        choices=list(tables_file()["scales"]),
        default="demo",
        help="demo (default): everything embedded; real: SmolLM2-135M-Instruct, Table 4 only; paper: LLaMA-3-8B",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("reproduced"), help="folder of all runs (default: reproduced)"
    )
    parser.add_argument("--seeds", type=int, help="how many seeds (default: demo 1, real 3, paper 5)")
    parser.add_argument("--model", help="base model instead of the scale's own, with --scale real or paper")
    parser.add_argument("--launch", default=sys.executable, help='how sft.py is started, such as "accelerate launch"')
    parser.add_argument("--batch_size", default="32", help="of the evaluation (default: 32; or auto)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: 1; at demo scale one a core, at most 4)")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the runs, their cost and commands, and do nothing"
    )
    options = parser.parse_args(argv[:at])
    options.extra = argv[at + 1 :]
    check_scale(parser, options)
    if options.jobs is None:
        options.jobs = min(MOST_JOBS, os.cpu_count() or 1) if options.scale == "demo" else 1
    for name in ("seeds", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is not possible: give 1 or more")
    if options.figure and options.seeds is not None:
        parser.error("--seeds does nothing with --figure, which shows one run: leave it out")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])

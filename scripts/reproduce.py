"""Train and score every row of one of the paper's tables, and print the paper's figures and ours side by side.

    python scripts/reproduce.py --table 5                    # embedded base and data, offline, two CPU cores
    python scripts/reproduce.py --table 3 --dry_run          # the runs and what they cost, nothing else
    python scripts/reproduce.py --table 3 --scale paper --launch "accelerate launch --num_processes 8"

Tables 2 to 10. Each row is a recipe in recipes/, which `scripts/sft.py --config` takes by itself; recipes/tables.yaml
says which rows a table has and what a scale adds. What follows `--` goes to sft.py as it is and wins. A run that is
there is not done again, and one that was interrupted goes on from its last checkpoint: the same command continues.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comlora_trl.data.demo import read_demo_rows
from comlora_trl.evaluation.tables import main as print_tables
from comlora_trl.winner.folder import method_name

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "recipes"
COST_FILE = "cost.json"


@dataclass(frozen=True)
class Planned:
    """One run: a recipe with one seed on one data set, and the folder it is in."""

    recipe: str
    seed: int
    folder: Path
    flags: dict[str, Any]
    tasks: str
    row_passes: int
    every_branch: bool

    @property
    def settings(self) -> dict[str, Any]:
        return yaml.safe_load((RECIPES / f"{self.recipe}.yaml").read_text(encoding="utf-8"))

    @property
    def method(self) -> str:
        return method_name(self.settings["lora_r"], self.settings["comlora_k"], self.settings)

    @property
    def trained(self) -> bool:
        return (self.folder / "winner" / "adapter_config.json").is_file()

    def adapters(self) -> list[tuple[str, Path]]:
        """(method, adapter's folder) of what is to be scored."""
        if not self.every_branch:
            return [(self.method, self.folder / "winner")]
        exported = sorted(file.parent for file in (self.folder / "branches").glob("branch_*/adapter_config.json"))
        winner = json.loads((self.folder / "winner" / "competition.json").read_text())["winner"] if exported else None
        return [
            (self.method if path.name == f"branch_{winner}" else f"{self.method}, {path.name.replace('_', ' ')}", path)
            for path in exported
        ]

    @property
    def done(self) -> bool:
        adapters = self.adapters() if self.trained else []
        return bool(adapters) and all(results_of(path).is_dir() for _, path in adapters)


def results_of(adapter: Path) -> Path:
    """Where the results of an adapter's evaluation are."""
    return adapter.with_name(f"{adapter.name}-results")


def plan(table: str, scale: str, output: Path, seeds: int | None, model: str | None) -> list[Planned]:
    """The runs of a table."""
    content = yaml.safe_load((RECIPES / "tables.yaml").read_text(encoding="utf-8"))
    chosen = content["scales"][scale]
    data = content["data"].get(table, content["data"]["other"])
    flags = dict(chosen["flags"])
    if scale == "paper":
        flags = {"model_name_or_path": model or chosen["model"], "dataset_name": data["dataset_name"], **flags}
        rows = chosen["train_rows"].get(table, chosen["train_rows"]["other"]) * flags["num_train_epochs"]
    else:
        rows = flags["max_steps"] * flags["per_device_train_batch_size"]
    every_branch = table == "10"
    if every_branch:  # the branches are exported from the last checkpoint
        flags |= {"save_strategy": "steps", "save_steps": flags["max_steps"]} if scale == "demo" else {}
    where = data["dataset_name"] if scale == "paper" else "demo"
    tasks = data["tasks"] if scale == "paper" else "comlora_commonsense"
    runs = []
    for recipe in content["tables"][table]:
        k = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))["comlora_k"]
        for seed in range(seeds) if seeds else chosen["seeds"]:
            folder = output / scale / where / (f"{recipe}-branches" if every_branch else recipe) / f"seed{seed}"
            runs.append(Planned(recipe, seed, folder, flags, tasks, rows * k, every_branch))
    return runs


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


def training_command(run: Planned, launch: str, extra: list[str]) -> list[str]:
    """sft.py on the run's recipe."""
    command = [
        *shlex.split(launch),
        str(REPOSITORY / "scripts" / "sft.py"),
        "--config",
        f"{RECIPES / run.recipe}.yaml",
    ]
    for name, value in run.flags.items():
        command += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    output = run.folder / "output"
    command += [
        "--seed",
        str(run.seed),
        "--output_dir",
        str(output),
        "--comlora_winner_dir",
        str(run.folder / "winner"),
    ]
    if checkpoint := last_checkpoint(output):
        command += ["--resume_from_checkpoint", str(checkpoint)]
    return [*command, *extra]


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return found[-1] if found else None


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


def perform(run: Planned, options: argparse.Namespace, data_dir: Path | None) -> None:
    """Trains and scores a run, as far as that is not done."""
    start = time.monotonic()
    if not run.trained:
        execute(training_command(run, options.launch, options.extra), run.folder / "train.log")
        cost = {"row_passes": run.row_passes, "seconds": time.monotonic() - start}
        (run.folder / COST_FILE).write_text(json.dumps(cost), encoding="utf-8")
    if run.every_branch and not run.adapters():
        script = str(REPOSITORY / "scripts" / "export_winner.py")
        checkpoint = str(last_checkpoint(run.folder / "output"))
        target = str(run.folder / "branches")
        execute([sys.executable, script, checkpoint, "--branch", "all", "--output", target], run.folder / "export.log")
    environment = {"COMLORA_DATA_DIR": str(data_dir)} if data_dir else None
    for _, adapter in run.adapters():
        if results_of(adapter).is_dir():
            continue
        # written elsewhere first, so that results are whole when they are there
        unfinished = results_of(adapter).with_suffix(".unfinished")
        command = [sys.executable, "-m", "comlora_trl.evaluation.cli", "--model", "hf", "--tasks", run.tasks]
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


def remaining(runs: list[Planned], output: Path) -> str:
    """What is left to train, and how long that takes if any run of this machine tells."""
    passes = sum(run.row_passes for run in runs if not run.trained)
    costs = [json.loads(file.read_text()) for file in output.rglob(COST_FILE)]
    text = f"{passes:,} row passes left"
    if costs and passes:
        rate = sum(cost["seconds"] for cost in costs) / sum(cost["row_passes"] for cost in costs)
        text += f", about {passes * rate / 60:.0f} min of training"
    return text


def main(argv: list[str]) -> None:
    options = parse(argv)
    output = options.output.absolute()
    runs = plan(options.table, options.scale, output, options.seeds, options.model)
    todo = [run for run in runs if not run.done]
    print(f"Table {options.table}, scale {options.scale}: {len(runs)} runs, {len(runs) - len(todo)} done; ", end="")
    print(remaining(runs, output))
    if options.dry_run:
        for run in runs:
            state = "done" if run.done else "trained" if run.trained else f"{run.row_passes:,} row passes"
            print(f"{run.method}, seed {run.seed}: {state}")
            print("  " + shlex.join(training_command(run, options.launch, options.extra)))
        return
    data_dir = demo_data(output) if options.scale == "demo" else None
    for number, run in enumerate(todo, start=1):
        print(f"[{number}/{len(todo)}] {run.method}, seed {run.seed} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            perform(run, options, data_dir)
        except RuntimeError as error:
            sys.exit(f"\nerror: {error}; the same command goes on from here")
        print(f"{time.monotonic() - start:.0f} s; {remaining(runs, output)}", flush=True)
    print()
    named = [f"{method}={results_of(adapter)}" for run in runs for method, adapter in run.adapters()]
    sys.exit(print_tables([*named, "--table", options.table]))


def parse(argv: list[str]) -> argparse.Namespace:
    at = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=[str(number) for number in range(2, 11)], help="which table")
    parser.add_argument("--scale", choices=["demo", "paper"], default="demo", help="demo (default) or paper")
    parser.add_argument(
        "--output", type=Path, default=Path("reproduced"), help="folder of all runs (default: reproduced)"
    )
    parser.add_argument("--seeds", type=int, help="how many seeds (default: 1 at demo scale, 5 at paper scale)")
    parser.add_argument("--model", help="base model instead of the paper's, with --scale paper")
    parser.add_argument("--launch", default=sys.executable, help='how sft.py is started, such as "accelerate launch"')
    parser.add_argument("--batch_size", default="32", help="of the evaluation (default: 32; or auto)")
    parser.add_argument(
        "--dry_run", action="store_true", help="list the runs, their cost and commands, and do nothing"
    )
    options = parser.parse_args(argv[:at])
    options.extra = argv[at + 1 :]
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds {options.seeds} is not possible: give 1 or more")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])

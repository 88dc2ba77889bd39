"""The runs behind the paper's tables and figures, as `tables.yaml` lists them: see `run.py`."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comlora_trl.winner.folder import method_name

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RECIPES = REPOSITORY / "recipes"


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
        """What its recipe says."""
        return read_recipe(self.recipe)

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


def tables_file() -> dict[str, Any]:
    """The content of `tables.yaml`."""
    return yaml.safe_load((HERE / "tables.yaml").read_text(encoding="utf-8"))


def settings_of(table: str, scale: str, model: str | None) -> tuple[dict[str, Any], int, str, str]:
    """sft.py's flags at a scale, the rows that one branch trains on, the data's name and what is scored."""
    content = tables_file()
    chosen, data = content["scales"][scale], content["data"].get(table, content["data"]["other"])
    flags = dict(chosen["flags"])
    if "max_steps" in flags:
        rows = flags["max_steps"] * flags["per_device_train_batch_size"]
    else:
        rows = chosen["train_rows"].get(table, chosen["train_rows"]["other"]) * flags["num_train_epochs"]
    if "model" not in chosen:  # the embedded base and data
        return flags, rows, "demo", "comlora_commonsense"
    flags = {"model_name_or_path": model or chosen["model"], "dataset_name": data["dataset_name"], **flags}
    return flags, rows, data["dataset_name"], data["tasks"]


def plan(table: str, scale: str, output: Path, seeds: int | None, model: str | None) -> list[Planned]:
    """The runs of a table."""
    content = tables_file()
    flags, rows, where, tasks = settings_of(table, scale, model)
    every_branch = table == "10"
    if every_branch:  # the branches are exported from the last checkpoint
        flags |= {"save_strategy": "steps", "save_steps": flags["max_steps"]} if scale == "demo" else {}
    runs = []
    for recipe in content["tables"][table]:
        for seed in range(seeds) if seeds else content["scales"][scale]["seeds"]:
            folder = output / scale / where / (f"{recipe}-branches" if every_branch else recipe) / f"seed{seed}"
            runs.append(
                Planned(recipe, seed, folder, flags, tasks, rows * read_recipe(recipe)["comlora_k"], every_branch)
            )
    return runs


def plan_figure(figure: str, scale: str, output: Path, model: str | None) -> Planned:
    """The run that a figure shows: commonsense, seed 0, logged and validated often enough for a picture."""
    content = tables_file()
    flags, rows, where, tasks = settings_of("other", scale, model)
    flags |= content["scales"][scale]["figure_flags"]
    recipe = content["figures"][figure]["recipe"]
    folder = output / scale / where / f"{recipe}-figures" / "seed0"
    return Planned(recipe, 0, folder, flags, tasks, rows * read_recipe(recipe)["comlora_k"], False)


def read_recipe(name: str) -> dict[str, Any]:
    """A file of `recipes/`."""
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))


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

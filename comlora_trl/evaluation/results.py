"""Reads lm_eval's result files: the figures, their adapter and their conditions.

No large library is imported, so reading is fast.
"""

import glob
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from comlora_trl.evaluation.adapters import describe
from comlora_trl.evaluation.conditions import COMMONSENSE, Measure, add_conditions, leaf_records, short
from comlora_trl.winner.folder import weights_sha256

PAPER_FILE = Path(__file__).with_name("paper_tables.json")
# lm_eval writes FOLDER/MODEL/results_DATE.json, or NAME_DATE.json for --output_path NAME.json
_RESULT_NAME = re.compile(r"_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?\.json$")
# Keys of --model_args that name the evaluated weights, the most specific first
_MODEL_KEYS = ("peft", "lora_local_path", "delta", "pretrained", "model", "path")
_PROTOCOLS = ("llm_adapters", "hira")

_MMLU = {"comlora_mmlu": "accuracy"} | {
    f"comlora_mmlu_{category}": category for category in ("stem", "humanities", "social_sciences", "other")
}
_CONVAI2 = ("bleu", "meteor", "rouge_l", "bertscore_f1", "bertscore_recall", "bertscore_precision", "average")


@cache
def paper() -> dict[str, Any]:
    """The paper's Tables 2 to 10."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


@dataclass
class ResultFile:
    """The content of one result file.

    Attributes:
        method: how the adapter was made, such as "ComLoRA K=2 r=8".
        identity: the hash of its weights, else their folder.
        place: the adapter's folder, else what --model_args said.
        about: its description, see [`comlora_trl.evaluation.adapters.describe`].
        notes: doubts about which adapter the figures belong to.
    """

    method: str
    identity: str
    place: str
    about: dict[str, Any]
    measures: list[Measure]
    notes: list[str] = field(default_factory=list)


def read_results(arguments: list[str]) -> list[ResultFile]:
    """The contents of the result files that the arguments name, see [`load_results`]."""
    return [_read(content, file, name) for content, file, name in load_results(arguments)]


def load_results(arguments: list[str]) -> list[tuple[dict[str, Any], Path, str | None]]:
    """Every result file that the arguments name, the oldest first: (content, file, the method's given name).

    Args:
        arguments: files, folders (searched for lm_eval's result files) or patterns, each with or without `NAME=`
            before it. With it, NAME is the method of all that it names.

    Raises:
        ValueError: in one line, if an argument names nothing, or a file is not lm_eval's.
    """
    files: dict[Path, str | None] = {}
    for argument in arguments:
        name, paths = _split_argument(argument)
        found = [file for path in paths for file in _result_files(path)]
        if not found:
            raise ValueError(
                f"{argument}: no result file of lm_eval (results_DATE.json) in it: give what --output_path named."
            )
        for file in found:
            # a file named twice is one file; a name given to it stays
            files[file.resolve()] = name or files.get(file.resolve())
    read = [(_load(file), file, name) for file, name in files.items()]
    return sorted(read, key=lambda entry: (entry[0].get("date") or 0, str(entry[1])))


def _split_argument(argument: str) -> tuple[str | None, list[Path]]:
    """`NAME=PATH` or `PATH`. Names such as "LoRA r=8" hold the sign too: the first split whose right side exists."""
    parts = argument.split("=")
    for at in range(len(parts)):
        name, pattern = "=".join(parts[:at]).strip(), "=".join(parts[at:])
        paths = [Path(pattern)] if Path(pattern).exists() else [Path(path) for path in sorted(glob.glob(pattern))]
        if pattern and paths:
            return name or None, paths
    raise ValueError(f"{argument}: no such file or folder: give PATH or NAME=PATH.")


def _result_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*.json") if _RESULT_NAME.search(file.name))


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: can't be read as JSON ({error}): give a results_DATE.json of lm_eval.") from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise ValueError(f'{file}: has no "results", so it is not lm_eval\'s: give a results_DATE.json of lm_eval.')
    return content


def _read(content: dict[str, Any], file: Path, name: str | None) -> ResultFile:
    model = _model(content)
    folders = _folders_upwards(model, file)
    adapters = (r["adapter"] for task in content["results"] for r in leaf_records(content, task) if r.get("adapter"))
    recorded = next(adapters, {})
    notes = []
    if identity := recorded.get("sha256"):
        about = recorded
        there = next((folder for folder in folders if weights_sha256(folder) == identity), None)
        place = str(there or model)
        if folders and there is None:
            notes.append(f"{place} no longer holds the adapter that was measured (weights {short(identity)})")
    else:
        about = describe(folders[0]) if folders else {}
        place = str(folders[0]) if folders else model
        # without its weights' hash, equal names (such as `winner`) in two folders of results are two runs; a base
        # is known by its revision on the hub or its full path
        revision = (content.get("config") or {}).get("model_sha")
        known = folders or revision or Path(model).is_absolute()
        identity = f"{place} {revision or ''}" if known else f"{model} ({file.parent})"
        if folders:
            notes.append("its results name no weights, so they are taken for those of the adapter there now")
    method = name or about.get("method") or model.rstrip("/")
    return ResultFile(method, identity, place, about, _measures(content, file), notes)


def _model(content: dict[str, Any]) -> str:
    arguments = (content.get("config") or {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    for key in _MODEL_KEYS:
        if arguments.get(key):
            return str(arguments[key])
    return str(content.get("model_name") or "unnamed model")


def _folders_upwards(model: str, file: Path) -> list[Path]:
    """Where the adapter may be: a relative folder is looked for upwards from the results, then in the current one."""
    found = []
    for parent in (*file.parents, Path.cwd()):
        folder = parent / Path(model).expanduser()
        if (folder / "adapter_config.json").is_file() and folder.resolve() not in found:
            found.append(folder.resolve())
    return found


def _measures(content: dict[str, Any], file: Path) -> list[Measure]:
    measures = []
    for task in content["results"]:
        plain = next((task.removesuffix(f"_{p}") for p in _PROTOCOLS if task.endswith(f"_{p}")), task)
        if plain in _MMLU:
            table, values = "2", _accuracy(content, task, _MMLU[plain], file)
        elif plain.removeprefix("comlora_") in COMMONSENSE:
            table, values = "3", _accuracy(content, task, plain.removeprefix("comlora_"), file)
        elif plain == "comlora_convai2":
            found = {name: _value(content, task, name, file) for name in _CONVAI2}
            table, values = "4", {name: value for name, value in found.items() if value is not None}
        else:
            continue
        if values:
            measures.append(add_conditions(Measure(table, plain, values), content, task))
    return measures


def _value(content: dict[str, Any], task: str, metric: str, file: Path) -> float | None:
    """A metric of a task, whatever lm_eval calls its filter, or None if it was not measured."""
    found = {
        key: value
        for key, value in (content["results"].get(task) or {}).items()
        if key.split(",")[0] == metric and isinstance(value, int | float) and math.isfinite(value)
    }
    if len(set(found.values())) > 1:
        raise ValueError(f"{file}: {task} has {metric} under {len(found)} filters ({', '.join(found)}): keep one.")
    return next(iter(found.values()), None)


def _accuracy(content: dict[str, Any], task: str, column: str, file: Path) -> dict[str, float]:
    value = _value(content, task, "acc", file)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{file}: {task} has acc {value}: an accuracy of lm_eval is from 0 to 1.")
    return {} if value is None else {column: 100 * value}

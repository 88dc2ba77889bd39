"""Reading lm_eval's result files: which adapter each one measured, by which method it was made, and the figures.

Nothing heavy is imported, so that reading results takes no longer than reading their files.
"""

import glob
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.data.mmlu import TEST_ROWS as MMLU_TEST_ROWS
from comlora_trl.evaluation.metrics import DEFAULT_MODEL

PAPER_FILE = Path(__file__).with_name("paper_tables.json")
# lm_eval writes FOLDER/MODEL/results_DATE.json, or NAME_DATE.json for --output_path NAME.json
_RESULT_NAME = re.compile(r"_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?\.json$")
# What names the evaluated weights in --model_args, the most particular first
_MODEL_KEYS = ("peft", "lora_local_path", "delta", "pretrained", "model", "path")

# Tasks in lm_eval, and the sizes of the paper's test sets
COMMONSENSE = {name.lower().replace("-", "_"): task.test_rows for name, task in COMMONSENSE_TASKS.items()}
_TEST_ROWS = {"comlora_mmlu": MMLU_TEST_ROWS} | {f"comlora_{name}": rows for name, rows in COMMONSENSE.items()}
_MMLU = {"accuracy": "comlora_mmlu"} | {
    category: f"comlora_mmlu_{category}" for category in ("stem", "humanities", "social_sciences", "other")
}
_CONVAI2 = ("bleu", "meteor", "rouge_l", "bertscore_f1", "bertscore_recall", "bertscore_precision", "average")


@cache
def paper() -> dict[str, Any]:
    """The paper's Tables 2 to 4."""
    return json.loads(PAPER_FILE.read_text(encoding="utf-8"))


@dataclass
class Run:
    """One trained adapter (one seed) and what was measured of it, from one or several result files.

    Attributes:
        method: how it was made, such as "ComLoRA K=2 r=8".
        model: what was evaluated, as far as it is known: the adapter's folder, else what --model_args said.
        base: the base model that the adapter names, or None.
        values: table number to column to figure in percent.
        remarks: table number to task to what makes its figure incomparable with the paper's.
    """

    method: str
    model: str
    base: str | None = None
    values: dict[str, dict[str, float]] = field(default_factory=lambda: {"2": {}, "3": {}, "4": {}})
    remarks: dict[str, dict[str, str]] = field(default_factory=lambda: {"2": {}, "3": {}, "4": {}})


def read_runs(arguments: list[str]) -> list[Run]:
    """Reads every result file that the arguments name.

    Files of one adapter make one run; where two of them measured the same, the newer counts.

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
    runs: dict[tuple[str, str], Run] = {}
    read = [(_load(file), file, name) for file, name in files.items()]
    for content, file, name in sorted(read, key=lambda entry: (entry[0].get("date") or 0, str(entry[1]))):
        _add(runs, content, file, name)
    return list(runs.values())


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


def _add(runs: dict[tuple[str, str], Run], content: dict[str, Any], file: Path, name: str | None) -> None:
    model = _model(content)
    adapter = _adapter_folder(model, file)
    # Without the adapter at hand, equal names (such as `winner`) in two folders of results are two runs
    identity = str(adapter) if adapter else f"{model} ({file.parent})"
    config = _adapter_config(adapter)
    method = name or _method(adapter, config) or model.rstrip("/")
    run = runs.setdefault((method, identity), Run(method, identity, config.get("base_model_name_or_path")))
    measured = {"2": _mmlu(content, file), "3": _commonsense(content, file), "4": _convai2(content, file)}
    for table, values in measured.items():
        run.values[table] |= values
    for task in (*_TEST_ROWS, "comlora_convai2"):
        if task in content["results"]:
            table = {"comlora_mmlu": "2", "comlora_convai2": "4"}.get(task, "3")
            # an older file's remark goes with the figure that it was about
            run.remarks[table].pop(task, None)
            if remark := _remark(content, task):
                run.remarks[table][task] = remark


def _model(content: dict[str, Any]) -> str:
    arguments = (content.get("config") or {}).get("model_args") or {}
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    for key in _MODEL_KEYS:
        if arguments.get(key):
            return str(arguments[key])
    return str(content.get("model_name") or "unnamed model")


def _adapter_folder(model: str, file: Path) -> Path | None:
    """The adapter's folder: a relative one is looked for upwards from the results, then in the current folder."""
    for parent in (*file.parents, Path.cwd()):
        folder = parent / Path(model).expanduser()
        if (folder / "adapter_config.json").is_file():
            return folder.resolve()
    return None


def _adapter_config(adapter: Path | None) -> dict[str, Any]:
    return _json(adapter / "adapter_config.json") if adapter else {}


def _method(adapter: Path | None, config: dict[str, Any]) -> str | None:
    """The paper's name of what an adapter is: by rank, and by `competition.json` if it won a competition."""
    if adapter is None or "r" not in config:
        return None
    competition = _json(adapter / "competition.json")
    if not competition.get("k"):
        return f"LoRA r={config['r']}"
    name = f"ComLoRA K={competition['k']} r={config['r']}"
    exported = competition.get("exported_branch")
    return name if exported in (None, competition.get("winner")) else f"{name}, branch {exported}"


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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


def _percent(content: dict[str, Any], tasks: dict[str, str], file: Path) -> dict[str, float]:
    values = {column: _value(content, task, "acc", file) for column, task in tasks.items()}
    for column, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{file}: {tasks[column]} has acc {value}: an accuracy of lm_eval is from 0 to 1.")
    return {column: 100 * value for column, value in values.items() if value is not None}


def _mmlu(content: dict[str, Any], file: Path) -> dict[str, float]:
    return _percent(content, _MMLU, file)


def _commonsense(content: dict[str, Any], file: Path) -> dict[str, float]:
    return _percent(content, {name: f"comlora_{name}" for name in COMMONSENSE}, file)


def _convai2(content: dict[str, Any], file: Path) -> dict[str, float]:
    values = {name: _value(content, "comlora_convai2", name, file) for name in _CONVAI2}
    return {name: value for name, value in values.items() if value is not None}


def _remark(content: dict[str, Any], task: str) -> str | None:
    """What sets a task's figure apart from the paper's: another number of rows, another model for BERTScore."""
    if task == "comlora_convai2":
        limit = (content.get("config") or {}).get("limit")
        model = content["results"][task].get("bertscore_model,none", DEFAULT_MODEL)
        parts = [f"--limit {limit:g}"] if limit else []
        parts += [f"BERTScore by {model} instead of {DEFAULT_MODEL}"] if Path(str(model)).name != DEFAULT_MODEL else []
        return f"{task} with {' and '.join(parts)}" if parts else None
    samples = content.get("n-samples") or {}
    counts = [
        samples[leaf]["effective"] for leaf in _leaves(task, content.get("group_subtasks") or {}) if leaf in samples
    ]
    expected = _TEST_ROWS[task]
    return f"{task} on {sum(counts):,} of {expected:,} rows" if counts and sum(counts) != expected else None


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    return [leaf for child in groups[task] for leaf in _leaves(child, groups)] if groups.get(task) else [task]

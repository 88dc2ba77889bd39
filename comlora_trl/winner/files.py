"""Writes the files that an exported winner has in addition to PEFT's own.

- `training.json`: base model and revision, tokenizer, prompt template, data, settings and seed. Evaluation reads it.
- `lm_eval.yaml`: for `lm_eval run --config winner/lm_eval.yaml`, which needs no other argument and no hook.
- `README.md`: the model card, see [`comlora_trl.winner.card`].
- `competition.png`: a picture of the competition, if matplotlib is installed.
"""

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from comlora_trl.data.files import tasks_folder
from comlora_trl.data.prompts import check_template
from comlora_trl.demo import DEMO_BASE, base_name, resolve_base
from comlora_trl.version import __version__
from comlora_trl.winner.card import write_card
from comlora_trl.winner.folder import TOKENIZER_FILES, TRAINING_FILE, Adapter, demo_base_sha256, read_json, tasks_for

logger = logging.getLogger(__name__)

LM_EVAL_FILE = "lm_eval.yaml"
# TRL's settings that influence the result, in the order of the card
_RECORDED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "optim", "weight_decay"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "max_length", "packing", "bf16"),
    *("loss_type", "loss_weights", "beta", "label_smoothing", "desirable_weight", "undesirable_weight"),
    "center_rewards_coefficient",
)
# Fields that are not settings of the method, or that another part of the record contains
_NOT_RECORDED = ("comlora_winner_dir", "comlora_overwrite_winner", "comlora_prompt")
_PACKAGES = ("trl", "peft", "transformers", "torch")


def training_record(
    *,
    base: str,
    base_revision: str | None = None,
    tokenizer: str | None = None,
    prompt_template: str | None = None,
    data: str | None = None,
    settings: dict[str, Any] | None = None,
    seed: int | None = None,
    tags: Iterable[str] = (),
) -> dict[str, Any]:
    """The content of `training.json`: the arguments, and the versions of the packages.

    Args:
        base: hub id or folder of the base model; empty if it has no name.
        base_revision: the base model's revision on the hub.
        tokenizer: the tokenizer's name, if it is neither saved with the adapter nor the base model's.
        prompt_template: the template of the training prompts; None if the data's prompts use no template.
        data: the training data: the name of a preset, a hub id or a path.
        settings: other settings by the names of their flags, see [`settings_of`].
        seed: the run's seed.
        tags: the trainer's tags for the hub, such as "dpo".

    Raises:
        ValueError: if the template is unknown.
    """
    if prompt_template is not None:
        check_template(prompt_template)
    base = str(Path(base).absolute()) if base and Path(base).is_dir() else base
    named: dict[str, Any] = {"name": base_name(base), "revision": base_revision}
    if named["name"] == DEMO_BASE:
        named["sha256"] = demo_base_sha256()
    return {
        "base": named,
        "tokenizer": tokenizer,
        "prompt_template": prompt_template,
        "data": data,
        "seed": seed,
        "settings": settings or {},
        "tags": list(tags),
        "versions": {"comlora-trl": __version__} | _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # an installation that is only for evaluation has no trl
            found[name] = version(name)
    return found


def write_training_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Writes `training.json` into the folder of an adapter or a checkpoint.

    Checkpoints have this file too, because a branch may be exported from them later.
    """
    (Path(folder) / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_training_record(folder: str | Path) -> dict[str, Any] | None:
    """The content of `training.json` in a folder; None if there is no such file."""
    return read_json(Path(folder) / TRAINING_FILE) or None


def write_winner_files(folder: str | Path, *, target: str | Path, record: dict[str, Any]) -> None:
    """Writes `training.json`, `lm_eval.yaml` and `README.md` into an exported adapter's folder.

    `adapter_config.json`, `competition.json` and the tokenizer must be in the folder already.

    Args:
        folder: the folder to write into, which may be temporary.
        target: the final folder; `lm_eval.yaml` contains its path.
        record: the result of [`training_record`], or of [`read_training_record`] for a checkpoint.
    """
    folder, target = Path(folder), Path(target).expanduser().absolute()
    write_training_record(folder, record)
    if record["base"]["name"] and not Adapter.read(folder).is_classifier:  # lm_eval can't evaluate a classifier
        _write_lm_eval_config(folder, target, record)
    _draw_competition(folder)
    write_card(folder, place=target.name)


def settings_of(args: Any) -> dict[str, Any]:
    """The settings for the record: this package's, and those of TRL that influence the result.

    Args:
        args: the training arguments, a dataclass of TRL or of this package.
    """
    names = [
        field.name for field in fields(args) if field.name.startswith("comlora_") and field.name not in _NOT_RECORDED
    ]
    settings = {name: getattr(args, name) for name in [*names, *_RECORDED] if hasattr(args, name)}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    plain = str | int | float | bool | list | tuple
    return {name: value for name, value in settings.items() if isinstance(value, plain)}


def _draw_competition(folder: Path) -> None:
    """Draws the competition into a winner's folder, if matplotlib is installed and there is a history to draw."""
    adapter = Adapter.read(folder)
    if len(adapter.competition.get("branches") or []) < 2 or adapter.branch != adapter.competition.get("winner"):
        return
    try:
        from comlora_trl.plots import draw

        draw(folder)
    except (ImportError, ValueError):
        return
    except Exception as error:  # an error while drawing must not stop the export
        logger.warning(f"no picture of the competition ({type(error).__name__}: {error})")


def _write_lm_eval_config(folder: Path, target: Path, record: dict[str, Any]) -> None:
    arguments = {"pretrained": resolve_base(record["base"]["name"]), "peft": str(target)}
    if revision := record["base"]["revision"]:
        arguments["revision"] = revision
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        arguments["tokenizer"] = str(target)
    elif record["tokenizer"]:
        arguments["tokenizer"] = resolve_base(record["tokenizer"])
    config = {
        "model": "hf",
        "model_args": arguments,
        "tasks": tasks_for(record["data"]),
        "include_path": str(tasks_folder()),
        "batch_size": 32,
    }
    head = "# lm_eval run --config lm_eval.yaml; its paths are those of the machine on which the winner was exported\n"
    (folder / LM_EVAL_FILE).write_text(head + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

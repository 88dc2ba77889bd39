"""Reads an adapter's base model, revision, tokenizer and prompt template for lm_eval, from a folder or the hub.

Nothing here imports torch.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from comlora_trl.demo import DEMO_BASE, base_name, resolve_base
from comlora_trl.winner.folder import (
    TOKENIZER_FILES,
    TRAINING_FILE,
    Adapter,
    file_sha256,
    read_json,
    vllm_rank,
    weights_sha256,
)

_SMALL_AND_WEIGHTS = ["*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt"]


@lru_cache
def _download(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=_SMALL_AND_WEIGHTS))
    except Exception as error:  # the hub's errors share no class
        raise ValueError(
            f"{adapter}: no such folder, and not found on the hub ({type(error).__name__}); check the name"
        ) from error


def adapter_folder(adapter: str) -> Path:
    """The folder of an adapter, which is downloaded if it is named by its hub id.

    Raises:
        ValueError: there is no such folder, or no adapter in it.
    """
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1 or adapter.endswith("/"):
            raise ValueError(f"{adapter}: no such folder; expected the folder of a PEFT adapter, such as winner/")
        folder = _download(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder / 'adapter_config.json'}: no such file; expected the folder of a PEFT adapter, such as winner/"
        )
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """Describes an adapter in a result: sha256, method, base, rank, seed, settings and data of its training."""
    adapter = Adapter.read(folder)
    return {
        "sha256": weights_sha256(folder),
        "method": adapter.method,
        "base": adapter.base or None,
        "rank": adapter.config.get("r"),
        "seed": adapter.record.get("seed"),
        "data": adapter.record.get("data"),
        "settings": adapter.record.get("settings"),
    }


def recorded_prompt(adapter: str) -> str | None:
    """The prompt template an adapter was trained under, or None if it does not say (or can't be found)."""
    try:
        return read_json(adapter_folder(adapter) / TRAINING_FILE).get("prompt_template")
    except ValueError:
        return None


def base_model(adapter: str, folder: Path) -> str:
    """The base model of an adapter, as `from_pretrained` takes it.

    Raises:
        ValueError: it names none, or a local path that does not exist, or another edition of the embedded one.
    """
    record = read_json(folder / TRAINING_FILE).get("base") or {}
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    recorded = Path(record.get("name") or "")
    if not named or (recorded.is_absolute() and recorded.is_dir() and not Path(named).expanduser().is_dir()):
        named = record.get("name")  # if the base was loaded by a relative path, the record has the absolute one
    if not named:
        raise ValueError(
            f"{adapter}: its adapter_config.json names no base model; add pretrained=BASE to --model_args"
        )
    base = resolve_base(named)
    if base_name(named) == DEMO_BASE:
        _check_edition(adapter, base, record.get("sha256"))
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    if is_path and not Path(base).expanduser().is_dir():
        raise ValueError(
            f"{adapter}: its base model {base} does not exist (any more); add pretrained=BASE to --model_args, "
            "with the base model's folder or hub id"
        )
    return base


def _check_edition(adapter: str, base: str, trained_on: str | None) -> None:
    weights = Path(base).expanduser() / "model.safetensors"
    if trained_on and weights.is_file() and file_sha256(weights) != trained_on:
        raise ValueError(
            f"{adapter}: it was trained on another edition of the embedded base model than {base} holds; train it "
            "again, or add pretrained=BASE to --model_args with the folder of that edition"
        )


def hf_arguments(adapter: str, given: dict[str, Any], argument: str = "peft") -> dict[str, Any]:
    """Arguments of `--model hf` that the adapter knows and the user has not given.

    Args:
        adapter: folder or hub id of the adapter.
        given: the user's arguments.
        argument: the one that names the adapter.

    Raises:
        ValueError: there is no adapter, or its base model is a path that no longer exists.
    """
    folder = adapter_folder(adapter)
    known, filled = Adapter.read(folder), {"pretrained": base_model(adapter, folder)}
    local = Path(adapter).expanduser().is_dir()
    if not local:
        # lm_eval uses `revision` for the adapter and the tokenizer too, but it is the base's
        filled[argument] = str(folder)
    if known.revision and "revision" not in given:
        filled["revision"] = known.revision
    if "tokenizer" not in given:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            filled["tokenizer"] = adapter if local else str(folder)
        elif known.record.get("tokenizer"):
            filled["tokenizer"] = resolve_base(known.record["tokenizer"])
    return filled


def vllm_arguments(adapter: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `--model vllm` that the adapter knows and the user has not given; see [`hf_arguments`]."""
    filled = hf_arguments(adapter, given, "lora_local_path")
    if "max_lora_rank" not in given:
        filled["max_lora_rank"] = vllm_rank(read_json(adapter_folder(adapter) / "adapter_config.json"))
    return filled

"""What an adapter's folder tells: its weights' hash, base model, tokenizer, prompt template and how it was made.

`training.json`, which the export of a winner writes ([`comlora_trl.evaluation.winner_files`]), tells most; an adapter
of another origin has only `adapter_config.json`. Nothing here imports torch.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from comlora_trl.data.files import file_state
from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.demo import DEMO_BASE, base_name, demo_model_path, resolve_base

TRAINING_FILE = "training.json"
COMPETITION_FILE = "competition.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Ranks vLLM accepts for max_lora_rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TASKS_FOR = {"demo": "comlora_demo", "mmlu": "comlora_mmlu", "convai2": "comlora_convai2"}
_SMALL_AND_WEIGHTS = ["*.json", "*.safetensors", "*.bin", "*.jinja", "*.model", "*.txt"]


def tasks_for(data: str | None) -> list[str]:
    """The tasks that score an adapter trained on a data set: a preset's own, else the commonsense ones."""
    if data in COMMONSENSE_TASKS:
        return [f"comlora_{data.lower().replace('-', '_')}"]
    return [_TASKS_FOR.get(data or "", "comlora_commonsense")]


@lru_cache
def _download(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=_SMALL_AND_WEIGHTS))
    except Exception as error:  # the hub's errors share no class; the reason is kept
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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@lru_cache(maxsize=16)
def _sha256(state: tuple[str, int, int]) -> str:
    with open(state[0], "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_sha256(folder: Path) -> str | None:
    """The SHA-256 of an adapter's weight file, or None if there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return _sha256(file_state(folder / name))
    return None


def demo_base_sha256() -> str:
    """The SHA-256 of the embedded base model's weights."""
    return _sha256(file_state(demo_model_path() / "model.safetensors"))


def describe(folder: Path) -> dict[str, Any]:
    """What identifies an adapter in a result: sha256, method, base, rank, seed, settings and data of its training."""
    config, record = read_json(folder / "adapter_config.json"), read_json(folder / TRAINING_FILE)
    base = (record.get("base") or {}).get("name") or config.get("base_model_name_or_path")
    return {
        "sha256": weights_sha256(folder),
        "method": method_of(folder),
        "base": base_name(base) if base else None,
        "rank": config.get("r"),
        "seed": record.get("seed"),
        "data": record.get("data"),
        "settings": record.get("settings"),
    }


def method_of(folder: Path) -> str | None:
    """The paper's name of what an adapter is, such as "LoRA r=8" or "ComLoRA K=4 r=4, w/o selector"."""
    config, competition = read_json(folder / "adapter_config.json"), read_json(folder / COMPETITION_FILE)
    if "r" not in config:
        return None
    settings = read_json(folder / TRAINING_FILE).get("settings") or {}
    k = competition.get("k")
    scored = any(branch.get("score") is not None for branch in competition.get("branches") or [])
    selector = settings.get("comlora_selector", scored or "branches" not in competition)
    name = method_name(config["r"], k, {**settings, "comlora_selector": selector})
    name = name.replace("LoRA", "DoRA", 1) if config.get("use_dora") and name.startswith("LoRA") else name
    exported = competition.get("exported_branch")
    return name if exported in (None, competition.get("winner")) else f"{name}, branch {exported}"


def method_name(rank: int, k: int | None, settings: dict[str, Any]) -> str:
    """The paper's name of a method.

    Args:
        rank: of each branch.
        k: the number of branches; None or 0 for an adapter without a competition.
        settings: `comlora_*` settings; those left out are at their default.
    """
    selector = settings.get("comlora_selector", True)
    if not k or (k == 1 and not selector):
        return f"LoRA r={rank}"
    return ", ".join([f"ComLoRA K={k} r={rank}", *_variant(settings, k, selector)])


def _variant(settings: dict[str, Any], k: int, selector: bool) -> list[str]:
    """What sets a competition apart from the paper's default."""
    if settings.get("comlora_tournament"):
        return ["tournament"]
    if not selector:
        return ["w/o selector"]
    parts = []
    for name, loss in (("lm", "L_LM"), ("alignment", "L_align"), ("pairwise", "L_pairwise")):
        weight = settings.get(f"comlora_{name}_weight", 1)
        parts += [f"w/o {loss}" if weight == 0 else f"{weight:g} {loss}"] if weight != 1 else []
    parts += [f"N={n}"] if (n := settings.get("comlora_top_n")) not in (None, k) else []
    parts += [annealing] if (annealing := settings.get("comlora_annealing", "exponential")) != "exponential" else []
    parts += [f"α={noise:g}"] if (noise := settings.get("comlora_noise", 0.1)) != 0.1 else []
    return parts


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
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or record.get("name")
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
    if trained_on and weights.is_file() and _sha256(file_state(weights)) != trained_on:
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
    config, record = read_json(folder / "adapter_config.json"), read_json(folder / TRAINING_FILE)
    filled = {"pretrained": base_model(adapter, folder)}
    local = Path(adapter).expanduser().is_dir()
    if not local:
        # lm_eval takes `revision` for the adapter and the tokenizer too, and it is the base's
        filled[argument] = str(folder)
    revision = (record.get("base") or {}).get("revision") or config.get("revision")
    if revision and "revision" not in given:
        filled["revision"] = revision
    if "tokenizer" not in given:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            filled["tokenizer"] = adapter if local else str(folder)
        elif record.get("tokenizer"):
            filled["tokenizer"] = resolve_base(record["tokenizer"])
    return filled


def vllm_arguments(adapter: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `--model vllm` that the adapter knows and the user has not given; see [`hf_arguments`]."""
    filled = hf_arguments(adapter, given, "lora_local_path")
    if "max_lora_rank" not in given:
        filled["max_lora_rank"] = vllm_rank(read_json(adapter_folder(adapter) / "adapter_config.json"))
    return filled


def vllm_rank(config: dict[str, Any]) -> int:
    """The `max_lora_rank` that vLLM needs for an adapter's configuration."""
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)

"""Reads the folder of an adapter: the hash of its weights, its training record, and the tasks that score it.

Most of this comes from `training.json`, which [`comlora_trl.winner.files`] writes when a winner is exported. An
adapter from elsewhere has only `adapter_config.json`.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from comlora_trl.data.files import file_state
from comlora_trl.data.keywords import COMMONSENSE_TASKS
from comlora_trl.demo import base_name, demo_model_path

TRAINING_FILE = "training.json"
COMPETITION_FILE = "competition.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# The files that `comlora-plot` writes into an adapter's folder by default
PICTURES = tuple(f"{name}.{kind}" for name in ("competition", "wins", "scores") for kind in ("png", "svg"))
# Ranks vLLM accepts for max_lora_rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TASKS_FOR = {"demo": "comlora_demo", "mmlu": "comlora_mmlu", "convai2": "comlora_convai2"}


def tasks_for(data: str | None) -> list[str]:
    """The lm_eval tasks for an adapter that was trained on `data`: the preset's tasks, or the commonsense tasks."""
    if data in COMMONSENSE_TASKS:
        return [f"comlora_{data.lower().replace('-', '_')}"]
    return [_TASKS_FOR.get(data or "", "comlora_commonsense")]


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if the file is missing or contains no JSON object."""
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
    """The SHA-256 of an adapter's weight file; None if there is no such file."""
    return next((file_sha256(folder / name) for name in WEIGHT_FILES if (folder / name).is_file()), None)


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file. The result is cached while the file does not change."""
    return _sha256(file_state(file))


def demo_base_sha256() -> str:
    """The SHA-256 of the embedded base model's weights."""
    return file_sha256(demo_model_path() / "model.safetensors")


@dataclass(frozen=True)
class Adapter:
    """The records of an adapter.

    Attributes:
        config: content of `adapter_config.json`.
        record: content of `training.json`, see [`comlora_trl.winner.files.training_record`].
        competition: content of `competition.json`.
        chats: whether the tokenizer has a chat template.
        pictures: names of the pictures in the folder.
    """

    config: dict[str, Any]
    record: dict[str, Any]
    competition: dict[str, Any]
    chats: bool = False
    pictures: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Reads an adapter's folder. A missing file is read as an empty record."""
        config, record, competition, tokenizer = (
            read_json(folder / name)
            for name in ("adapter_config.json", TRAINING_FILE, COMPETITION_FILE, "tokenizer_config.json")
        )
        chats = (folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template"))
        pictures = tuple(name for name in PICTURES if (folder / name).is_file())
        return cls(config, record, competition, chats, pictures)

    @property
    def base(self) -> str:
        """The recorded name of the base model: a hub id, a folder or `DEMO_BASE`; empty if it is not known."""
        named = (self.record.get("base") or {}).get("name") or self.config.get("base_model_name_or_path")
        return base_name(named) if named else ""

    @property
    def revision(self) -> str | None:
        """The base model's revision on the hub."""
        return (self.record.get("base") or {}).get("revision") or self.config.get("revision")

    @property
    def is_classifier(self) -> bool:
        """Whether the adapter is a reward model or another classifier."""
        return self.config.get("task_type") == "SEQ_CLS"

    @property
    def branch(self) -> int | None:
        """The index of the branch that this adapter was exported from."""
        return self.competition.get("exported_branch", self.competition.get("winner"))

    @property
    def method(self) -> str | None:
        """The paper's name for the adapter's method, such as "LoRA r=8" or "ComLoRA K=4 r=4, w/o selector"."""
        if "r" not in self.config:
            return None
        settings = self.record.get("settings") or {}
        k = self.competition.get("k", settings.get("comlora_k"))
        branches = self.competition.get("branches")
        scored = branches is None or any(branch.get("score") is not None for branch in branches)
        selector = settings.get("comlora_selector", scored)
        name = method_name(self.config["r"], k, {**settings, "comlora_selector": selector})
        name = name.replace("LoRA", "DoRA", 1) if self.config.get("use_dora") and name.startswith("LoRA") else name
        return name if self.branch == self.competition.get("winner") else f"{name}, branch {self.branch}"


def method_name(rank: int, k: int | None, settings: dict[str, Any]) -> str:
    """The paper's name for a method.

    Args:
        rank: rank of each branch.
        k: number of branches; None or 0 for an adapter without a competition.
        settings: the `comlora_*` settings; missing ones have their default value.
    """
    selector = settings.get("comlora_selector", True)
    if not k or (k == 1 and not selector):
        return f"LoRA r={rank}"
    return ", ".join([f"ComLoRA K={k} r={rank}", *_variant(settings, k, selector)])


def _variant(settings: dict[str, Any], k: int, selector: bool) -> list[str]:
    """The settings of a competition that differ from the paper's default, as the paper names them."""
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


def vllm_rank(config: dict[str, Any]) -> int:
    """The smallest `max_lora_rank` of vLLM that an adapter's configuration fits."""
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)

"""Reads the folder of an adapter: its weights' hash, its training record, the tasks that score it.

`training.json`, which the export of a winner writes ([`comlora_trl.winner.files`]), has most of it; other adapters
have only `adapter_config.json`.
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
# Pictures of the competition that may lie beside an adapter, as `comlora-plot` names them
PICTURES = tuple(f"{name}.{kind}" for name in ("competition", "wins", "scores") for kind in ("png", "svg"))
# Ranks vLLM accepts for max_lora_rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TASKS_FOR = {"demo": "comlora_demo", "mmlu": "comlora_mmlu", "convai2": "comlora_convai2"}


def tasks_for(data: str | None) -> list[str]:
    """The tasks that score an adapter trained on a data set: a preset's own, else the commonsense ones."""
    if data in COMMONSENSE_TASKS:
        return [f"comlora_{data.lower().replace('-', '_')}"]
    return [_TASKS_FOR.get(data or "", "comlora_commonsense")]


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
    return next((file_sha256(folder / name) for name in WEIGHT_FILES if (folder / name).is_file()), None)


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, read once."""
    return _sha256(file_state(file))


def demo_base_sha256() -> str:
    """The SHA-256 of the embedded base model's weights."""
    return file_sha256(demo_model_path() / "model.safetensors")


@dataclass(frozen=True)
class Adapter:
    """The records of an adapter.

    Attributes:
        config: its `adapter_config.json`.
        record: its `training.json`, see [`comlora_trl.winner.files.training_record`].
        competition: its `competition.json`.
        chats: whether its tokenizer has a chat template.
        pictures: names of the pictures beside it.
    """

    config: dict[str, Any]
    record: dict[str, Any]
    competition: dict[str, Any]
    chats: bool = False
    pictures: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Of a folder; what is missing there is empty."""
        config, record, competition, tokenizer = (
            read_json(folder / name)
            for name in ("adapter_config.json", TRAINING_FILE, COMPETITION_FILE, "tokenizer_config.json")
        )
        chats = (folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template"))
        pictures = tuple(name for name in PICTURES if (folder / name).is_file())
        return cls(config, record, competition, chats, pictures)

    @property
    def base(self) -> str:
        """The base model's name as recorded, a hub id, a folder or `DEMO_BASE`; empty where none is known."""
        named = (self.record.get("base") or {}).get("name") or self.config.get("base_model_name_or_path")
        return base_name(named) if named else ""

    @property
    def revision(self) -> str | None:
        """The base model's revision on the hub."""
        return (self.record.get("base") or {}).get("revision") or self.config.get("revision")

    @property
    def is_classifier(self) -> bool:
        """Whether it is a reward model, or another classifier, with a head of its own."""
        return self.config.get("task_type") == "SEQ_CLS"

    @property
    def branch(self) -> int | None:
        """The branch that this adapter is."""
        return self.competition.get("exported_branch", self.competition.get("winner"))

    @property
    def method(self) -> str | None:
        """The paper's name of what it is, such as "LoRA r=8" or "ComLoRA K=4 r=4, w/o selector"."""
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
    """The differences of a competition from the paper's default."""
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
    """The `max_lora_rank` that vLLM needs for an adapter's configuration."""
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)

"""ComLoRA on TRL: K LoRA branches compete during training, the winner leaves as an ordinary PEFT adapter."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from comlora_trl.version import __version__

if TYPE_CHECKING:
    from comlora_trl.trainers.sft import ComLoRASFTTrainer
    from comlora_trl.training.config import ComLoRAConfig

__all__ = ["ComLoRAConfig", "ComLoRASFTTrainer", "__version__"]

# lm_eval imports this package at its start, so importing it must not load torch and trl
_LAZY = {"ComLoRAConfig": "comlora_trl.training.config", "ComLoRASFTTrainer": "comlora_trl.trainers.sft"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

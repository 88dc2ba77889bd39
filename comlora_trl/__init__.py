"""ComLoRA on TRL: K LoRA branches compete in one training run. The winner is exported as an ordinary PEFT adapter."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from comlora_trl.version import __version__

if TYPE_CHECKING:
    from comlora_trl.trainers.dpo import ComLoRADPOTrainer
    from comlora_trl.trainers.kto import ComLoRAKTOTrainer
    from comlora_trl.trainers.reward import ComLoRARewardTrainer
    from comlora_trl.trainers.sft import ComLoRASFTTrainer
    from comlora_trl.training.config import ComLoRAConfig, ComLoRADPOConfig, ComLoRAKTOConfig, ComLoRARewardConfig

__all__ = [
    "ComLoRAConfig",
    "ComLoRADPOConfig",
    "ComLoRADPOTrainer",
    "ComLoRAKTOConfig",
    "ComLoRAKTOTrainer",
    "ComLoRARewardConfig",
    "ComLoRARewardTrainer",
    "ComLoRASFTTrainer",
    "__version__",
]

# lm_eval imports this package when it starts, so the import must not load torch and trl
_LAZY = {
    "ComLoRAConfig": "comlora_trl.training.config",
    "ComLoRADPOConfig": "comlora_trl.training.config",
    "ComLoRADPOTrainer": "comlora_trl.trainers.dpo",
    "ComLoRAKTOConfig": "comlora_trl.training.config",
    "ComLoRAKTOTrainer": "comlora_trl.trainers.kto",
    "ComLoRARewardConfig": "comlora_trl.training.config",
    "ComLoRARewardTrainer": "comlora_trl.trainers.reward",
    "ComLoRASFTTrainer": "comlora_trl.trainers.sft",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

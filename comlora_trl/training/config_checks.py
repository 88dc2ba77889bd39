"""Checks of a configuration as a whole: precision without a GPU, and settings that nothing would read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.logging import get_logger

logger = get_logger(__name__)

_OF_THE_SELECTOR = ("top_n", "annealing", "annealing_rate", "noise", "alignment_weight", "pairwise_weight")
_OF_THE_SELECTOR += ("selector_dim", "selector_ffn_dim", "selector_heads", "selector_input", "selector_learning_rate")
_OF_THE_SELECTOR += ("equation_signs",)


@contextmanager
def settled_without_gpu(config: Any) -> Iterator[None]:
    """Around TRL's own checks: without a GPU its default of bf16 would end in an error.

    Float32 it is then, unless bf16 is asked for; the CPU is taken, and a line says so.
    """
    settle = not (config.use_cpu or config.fp16 or config.bf16 is False or torch.accelerator.is_available())
    if settle:
        config.use_cpu, config.bf16 = True, bool(config.bf16)
    yield
    if settle:
        logger.warning(f"no GPU is found: training on the CPU, in {'bfloat16' if config.bf16 else 'float32'}.")


def check_used(config: Any) -> None:
    """Refuses a setting that nothing would read.

    Raises:
        ValueError: naming it, and what makes it idle.
    """
    idle = {
        "comlora_selector=False": () if config.comlora_selector else _OF_THE_SELECTOR,
        "comlora_alignment_weight=0": () if config.comlora_alignment_weight else ("annealing", "annealing_rate"),
        "comlora_pairwise_weight=0": () if config.comlora_pairwise_weight else ("noise",),
        f"comlora_annealing={config.comlora_annealing}": (
            () if config.comlora_annealing == "exponential" else ("annealing_rate",)
        ),
    }
    defaults = {field.name: field.default for field in fields(config)}
    for reason, names in idle.items():
        for name in (f"comlora_{name}" for name in names):
            value = getattr(config, name)
            if value != defaults[name]:
                raise ValueError(f"{name}={value} does nothing with {reason}: leave one of the two out.")

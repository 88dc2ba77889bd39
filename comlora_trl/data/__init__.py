"""Data and prompts, shared by training and evaluation: sources become instructions, one function makes prompts."""

from typing import TYPE_CHECKING, Any

from comlora_trl.data.errors import DataError
from comlora_trl.data.keywords import COMMONSENSE_TASKS, first_keyword
from comlora_trl.data.prompts import PROMPT_TEMPLATES, build_prompt

if TYPE_CHECKING:
    from comlora_trl.data.loading import load_training_dataset

__all__ = [
    "COMMONSENSE_TASKS",
    "PROMPT_TEMPLATES",
    "DataError",
    "build_prompt",
    "first_keyword",
    "load_training_dataset",
]


def __getattr__(name: str) -> Any:
    # `datasets` is slow to import, and prompts and keywords do not need it
    if name == "load_training_dataset":
        from comlora_trl.data.loading import load_training_dataset

        return load_training_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

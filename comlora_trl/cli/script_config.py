"""The configuration of a command: a trainer's, with folders below the working directory."""

from dataclasses import field, make_dataclass
from typing import Any

_FOLDERS: list[tuple[str, Any, Any]] = [
    (
        "output_dir",
        str | None,
        field(default="comlora-output", metadata={"help": "Folder for checkpoints, logs and the model card."}),
    ),
    (
        "comlora_winner_dir",
        str | None,
        field(default="winner", metadata={"help": "Folder the winning adapter is exported to."}),
    ),
]


def script_config(config: type, module: str) -> type:
    """A trainer's configuration, with `comlora-output` and `winner` as its folders unless others are given.

    Args:
        module: the name of the module that has it, as `ComLoRA...ScriptConfig`: pickles find it there.
    """
    name = config.__name__.replace("Config", "ScriptConfig")
    namespace = {
        "__module__": module,
        "__doc__": "The trainer's configuration, with folders below the working directory.",
    }
    return make_dataclass(name, _FOLDERS, bases=(config,), namespace=namespace)

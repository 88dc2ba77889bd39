"""The configuration of a command: that of its trainer, with default folders in the working directory."""

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
    """Makes a subclass of a trainer's configuration whose default folders are `comlora-output` and `winner`.

    Args:
        config: the configuration, `ComLoRA...Config`.
        module: name of the module that stores the result as `ComLoRA...ScriptConfig`. Unpickling looks for it there.
    """
    name = config.__name__.replace("Config", "ScriptConfig")
    namespace = {
        "__module__": module,
        "__doc__": "The trainer's configuration, with default folders in the working directory.",
    }
    return make_dataclass(name, _FOLDERS, bases=(config,), namespace=namespace)

"""What changes in lm_eval: it finds our tasks, takes an adapter without its base, and checks our data early.

`comlora_lm_eval_hook` (imported at Python's start by a .pth file) calls [`apply`] when lm_eval imports one of the
modules concerned. Nothing the user wrote is overridden.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ranks vLLM accepts for max_lora_rank
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def apply(name: str, module: Any) -> None:
    """Changes one of lm_eval's modules, which has just been imported. A second time does nothing."""
    if getattr(module, "_comlora_hook", False):
        return
    module._comlora_hook = True
    if name == "lm_eval.tasks.manager":
        _add_tasks(module.TaskManager)
    elif name == "lm_eval.models.huggingface":
        _fill_base(module.HFLM, "peft", hf_arguments)
    elif name == "lm_eval.models.vllm_causallms":
        _fill_base(module.VLLM, "lora_local_path", vllm_arguments)


def tasks_folder() -> Path:
    """The folder with our task files."""
    import lm_eval_tasks

    return Path(lm_eval_tasks.__file__).resolve().parent


def _add_tasks(manager: type) -> None:
    init, match_tasks = manager.__init__, manager.match_tasks

    @functools.wraps(init)
    def add_folder(
        self: Any,
        verbosity: str | None = None,
        include_path: Any = None,
        include_defaults: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        named = (
            list(include_path) if isinstance(include_path, list | tuple) else [include_path] if include_path else []
        )
        ours = tasks_folder()
        known = any(Path(path).resolve() in (ours, *ours.parents) for path in named)
        paths = [ours, *named] if include_defaults and not known else include_path
        init(self, verbosity, paths, include_defaults, *args, **kwargs)
        self.include_path = include_path

    @functools.wraps(match_tasks)
    def match_and_check(self: Any, task_list: list[str]) -> list[str]:
        matched = match_tasks(self, task_list)
        # `lm_eval validate` and `ls` give no metadata: they ask for names alone
        if self.metadata is not None and (ours := [name for name in matched if name.startswith("comlora_")]):
            _check(self, ours)
        return matched

    manager.__init__ = add_folder
    manager.match_tasks = match_and_check


def _check(manager: Any, names: list[str]) -> None:
    """Loads our tasks' data now, for lm_eval does it after the model, which can take minutes."""
    from comlora_trl.data.errors import DataError

    try:
        manager.load(names)
    except (DataError, RuntimeError, ValueError) as error:
        _stop(error)


def _stop(error: Exception) -> None:
    """One line on the command line, an exception in a program."""
    if "lm_eval._cli.run" in sys.modules:
        sys.exit(f"error: {error}")
    raise error


def _fill_base(model: type, argument: str, arguments_of: Callable[..., dict[str, Any]]) -> None:
    init = model.__init__

    @functools.wraps(init)
    def fill(self: Any, *args: Any, **kwargs: Any) -> None:
        adapter = kwargs.get(argument)
        if isinstance(adapter, str) and not args and "pretrained" not in kwargs:
            try:
                filled = arguments_of(adapter, kwargs)
            except (OSError, ValueError) as error:
                _stop(error)
            kwargs.update(filled)
            said = ", ".join(f"{key}={value}" for key, value in filled.items())
            print(f"comlora-trl: from {argument}={adapter}: {said}", file=sys.stderr)
        init(self, *args, **kwargs)

    model.__init__ = fill


def hf_arguments(adapter: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `--model hf` that the adapter knows and the user has not given.

    Args:
        adapter: folder or hub id of the adapter.
        given: the user's arguments.

    Raises:
        ValueError: there is no adapter, or its base model is a path that no longer exists.
    """
    config = read_adapter_config(adapter)
    filled = {"pretrained": base_model(adapter, config)}
    folder = Path(adapter).expanduser()
    if config.get("revision") and "revision" not in given and folder.is_dir():
        filled["revision"] = config["revision"]
    if "tokenizer" not in given and any((folder / name).is_file() for name in _TOKENIZER_FILES):
        filled["tokenizer"] = adapter
    return filled


def vllm_arguments(adapter: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `--model vllm` that the adapter knows and the user has not given; see [`hf_arguments`]."""
    filled = hf_arguments(adapter, given)
    if "max_lora_rank" not in given:
        config = read_adapter_config(adapter)
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        filled["max_lora_rank"] = min((allowed for allowed in VLLM_RANKS if allowed >= rank), default=rank)
    return filled


def read_adapter_config(adapter: str) -> dict[str, Any]:
    """The adapter's adapter_config.json, from its folder or the hub."""
    folder = Path(adapter).expanduser()
    path = folder / "adapter_config.json"
    if folder.is_dir() and not path.is_file():
        raise ValueError(f"{path}: no such file; expected the folder of a PEFT adapter, such as winner/")
    if not folder.is_dir():
        if adapter.startswith((".", "/", "~")) or adapter.count("/") != 1 or adapter.endswith("/"):
            raise ValueError(f"{adapter}: no such folder; expected the folder of a PEFT adapter, such as winner/")
        path = _download_config(adapter)
    return json.loads(path.read_text(encoding="utf-8"))


def _download_config(adapter: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(adapter, "adapter_config.json"))
    except Exception as error:  # the hub's errors share no class; the reason is kept
        raise ValueError(
            f"{adapter}: no such folder, and not found on the hub ({type(error).__name__}); check the name"
        ) from error


def base_model(adapter: str, config: dict[str, Any]) -> str:
    """The base model an adapter names.

    Raises:
        ValueError: it names none, or a local path that does not exist.
    """
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter}: its adapter_config.json names no base model; add pretrained=BASE to --model_args"
        )
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    if is_path and not Path(base).expanduser().is_dir():
        raise ValueError(
            f"{adapter}: its base model {base} does not exist (any more); add pretrained=BASE to --model_args, "
            "with the base model's folder or hub id"
        )
    return base

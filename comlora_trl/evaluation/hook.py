"""The changes to lm_eval: it finds this package's tasks, accepts an adapter without its base, checks data early.

`comlora_lm_eval_hook` (imported at Python's start by a .pth file) calls [`apply`] when lm_eval imports one of the
modules concerned. Arguments of the user always win. If a change fails, lm_eval runs as if this
package were not there. Errors of the input (data, an adapter's base) end in one line, before a model is loaded.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comlora_trl import compat
from comlora_trl.data.errors import DataError
from comlora_trl.data.files import tasks_folder
from comlora_trl.evaluation.adapters import hf_arguments, vllm_arguments

OLDEST = (0, 4, 13)


def apply(name: str, module: Any, tell: Callable[[Exception], None]) -> None:
    """Changes one of lm_eval's modules, which has just been imported. A second time does nothing.

    Args:
        tell: says in a line that lm_eval goes on without us, and why.

    Raises:
        RuntimeError: lm_eval is too old to be changed.
    """
    if getattr(module, "_comlora_hook", False):
        return
    _check_version()
    if name == "lm_eval.tasks.manager":
        _add_tasks(module, tell)
    elif name == "lm_eval.config.evaluate_config":
        _check_early(module.EvaluatorConfig, tell)
    elif name == "lm_eval.models.huggingface":
        _fill_base(module.HFLM, "peft", hf_arguments, tell)
    elif name == "lm_eval.models.vllm_causallms":
        _fill_base(module.VLLM, "lora_local_path", vllm_arguments, tell)
    module._comlora_hook = True


def _check_version() -> None:
    version = str(getattr(sys.modules.get("lm_eval"), "__version__", ""))
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if len(numbers) == 3 and numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise RuntimeError(f'lm_eval {version} is older than {oldest}; pip install "lm-eval[hf]>={oldest}"')


def _add_tasks(module: Any, tell: Callable[[Exception], None]) -> None:
    init = module.TaskManager.__init__
    signature = inspect.signature(init)

    @functools.wraps(init)
    def add_folder(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs)
            include_path = given.arguments.get("include_path")
            with_ours = _with_our_tasks(module, include_path, given.arguments.get("include_defaults", True))
            if with_ours is None:
                return init(self, *args, **kwargs)
            given.arguments["include_path"] = with_ours
            init(*given.args, **given.kwargs)
            self.include_path = include_path
        except Exception as error:
            # lm_eval continues unchanged; an error of the user's own code appears again there
            init(self, *args, **kwargs)
            tell(error)

    module.TaskManager.__init__ = add_folder


def _with_our_tasks(module: Any, include_path: Any, include_defaults: bool) -> list[Any] | None:
    """The folders to search with ours before the user's, or None if ours is there or not asked for."""
    ours = tasks_folder()
    named = list(include_path) if isinstance(include_path, list | tuple) else [include_path] if include_path else []
    if not include_defaults or any(Path(path).resolve() in (ours, *ours.parents) for path in named):
        return None
    # lm_eval with the entry points `lm_eval.tasks` (pull request 4015) finds our folder by itself
    discover = getattr(module, "discover_plugin_task_paths", None)
    if discover is not None and ours in map(Path, discover()):
        return None
    return [ours, *named]


def _check_early(config: type, tell: Callable[[Exception], None]) -> None:
    """Has our tasks' data checked before the model is loaded, which can take minutes."""
    process_tasks = config.process_tasks

    @functools.wraps(process_tasks)
    def process_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        manager = process_tasks(self, *args, **kwargs)
        try:
            names = [name for name in self.tasks if isinstance(name, str) and name.startswith("comlora_")]
            if names:
                from comlora_trl.evaluation.harness import check_tasks

                check_tasks(manager, names, predict_only=self.predict_only, num_fewshot=self.num_fewshot)
        except DataError as error:
            _stop(error)
        except Exception as error:  # lm_eval raises it itself when it loads the tasks, unless only this check failed
            tell(error)
        return manager

    config.process_tasks = process_and_check


def _stop(error: Exception) -> None:
    """One line on the command line, an exception in a program."""
    if compat.lm_eval_command_runs():
        sys.exit(f"error: {error}")
    raise error


def _fill_base(
    model: type, argument: str, arguments_of: Callable[..., dict[str, Any]], tell: Callable[[Exception], None]
) -> None:
    init = model.__init__

    @functools.wraps(init)
    def fill(self: Any, *args: Any, **kwargs: Any) -> None:
        adapter = kwargs.get(argument)
        if isinstance(adapter, str) and not args and "pretrained" not in kwargs:
            try:
                filled = arguments_of(adapter, kwargs)
            except (OSError, ValueError) as error:
                _stop(error)
            except Exception as error:
                tell(error)
            else:
                said = ", ".join(f"{key}={value}" for key, value in filled.items())
                print(f"comlora-trl: from {argument}={adapter}: {said}", file=sys.stderr)
                kwargs |= filled
        init(self, *args, **kwargs)

    model.__init__ = fill

"""The hook in folders and environments that are in its way: lm_eval runs as if it were not there.

A few lines stand in for lm_eval here, so that a process takes no seconds; `test_fresh_environments.py` has the real
one.
"""

import types
from pathlib import Path

import pytest
from environments import REPOSITORY, run

import comlora_lm_eval_hook
from comlora_trl.data.files import tasks_folder
from comlora_trl.evaluation import hook

MANAGER = """
class TaskManager:
    def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
        self.include_path = include_path
        self.searched = include_path if isinstance(include_path, list) else [include_path] if include_path else []
"""
MAIN = """
import sys
from lm_eval.tasks.manager import TaskManager
manager = TaskManager(include_path="mine")
print([str(path) for path in manager.searched], manager.include_path)
"""
FOREIGN = {"comlora_trl/__init__.py": "", "comlora_trl/evaluation.py": "raise SystemExit('foreign')"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def fake(tmp_path_factory) -> Path:
    """A folder with an lm_eval of a few lines."""
    folder = tmp_path_factory.mktemp("fake")
    files = {"__init__.py": "__version__ = '0.4.13'", "tasks/__init__.py": "", "tasks/manager.py": MANAGER}
    write(folder / "lm_eval", files | {"__main__.py": MAIN})
    return folder


def run_main(fake: Path, folder: Path, pth: bool = True, first: str = "") -> tuple[str, str]:
    """(stdout, stderr) of `python -m lm_eval` in a folder, with the .pth file's line at its start."""
    line = (REPOSITORY / "comlora_lm_eval_hook.pth").read_text() if pth else ""
    # as with -m, the working folder comes before everything once the start is over
    code = line + f"import sys; sys.path.insert(0, ''){first}\n" + MAIN
    done = run(["-P", "-c", code], folder, PYTHONPATH=f"{REPOSITORY}:{fake}", PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


OURS = f"[{str(tasks_folder())!r}, 'mine'] mine"
STOCK = "['mine'] mine"


@pytest.mark.parametrize(
    ("files", "expected", "told"),
    [
        ({}, OURS, ""),
        ({"lm_eval_tasks/results.txt": ""}, OURS, ""),
        ({"lm_eval_tasks/__init__.py": "raise SystemExit('foreign')"}, OURS, ""),
        ({"lm_eval_tasks.py": "raise SystemExit('foreign')"}, OURS, ""),
        ({"comlora_trl/results.txt": ""}, OURS, ""),
        ({"comlora_lm_eval_hook.py": "raise SystemExit('foreign')"}, OURS, ""),
        (FOREIGN, STOCK, "hides the installed comlora_trl"),
        ({"comlora_trl.py": "raise SystemExit('foreign')"}, STOCK, "hides the installed comlora_trl"),
    ],
    ids=["nothing", "a folder", "a package", "a module", "our folder", "our hook", "our package", "our module"],
)
def test_folders_named_like_our_modules(fake, tmp_path, files, expected, told):
    write(tmp_path, files)
    output, errors = run_main(fake, tmp_path)
    assert output == expected
    assert errors.count("\n") == 0 and (told in errors) and bool(errors) == bool(told), errors


def test_inside_a_folder_of_that_name(fake, tmp_path):
    (tmp_path / "lm_eval_tasks").mkdir()
    assert run_main(fake, tmp_path / "lm_eval_tasks") == (OURS, "")


def test_a_users_own_package_of_our_name_still_imports(fake, tmp_path):
    """It is imported after ours stood down, and before."""
    write(tmp_path, {"comlora_trl/__init__.py": "mine = 1"})
    for first in ("; import comlora_trl; assert comlora_trl.mine", ""):
        output, errors = run_main(fake, tmp_path, first=first)
        assert output == STOCK and errors.startswith("comlora-trl: lm_eval is left as it is (ImportError:")


def module_of(version: str = "0.4.13", **names: object) -> types.SimpleNamespace:
    namespace: dict = {}
    exec(MANAGER, namespace)
    return types.SimpleNamespace(TaskManager=namespace["TaskManager"], **names)


def test_an_older_lm_eval_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(comlora_lm_eval_hook, "_told", False)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", types.SimpleNamespace(__version__="0.4.9"))
    module = module_of()
    comlora_lm_eval_hook.apply("lm_eval.tasks.manager", module)
    assert module.TaskManager(include_path="x").searched == ["x"]
    assert "lm_eval 0.4.9 is older than 0.4.13" in capsys.readouterr().err


def test_a_missing_task_folder_leaves_lm_eval_alone(monkeypatch, capsys):
    """Seen: a TypeError in every run, ours or not."""
    monkeypatch.setattr(comlora_lm_eval_hook, "_told", False)
    monkeypatch.setattr(hook, "tasks_folder", lambda: Path(None))
    module = module_of()
    hook.apply("lm_eval.tasks.manager", module, comlora_lm_eval_hook.tell)
    assert module.TaskManager(None, "x").searched == ["x"]
    assert capsys.readouterr().err.startswith("comlora-trl: lm_eval is left as it is (TypeError")


def test_a_users_own_error_is_theirs(capsys):
    module = module_of()
    hook.apply("lm_eval.tasks.manager", module, comlora_lm_eval_hook.tell)
    with pytest.raises(TypeError, match="unknown"):
        module.TaskManager(unknown=1)
    assert not capsys.readouterr().err


def test_the_users_folders_come_after_ours_and_ours_only_once():
    module = module_of()
    hook.apply("lm_eval.tasks.manager", module, comlora_lm_eval_hook.tell)
    ours = tasks_folder()
    assert module.TaskManager().searched == [ours]
    assert module.TaskManager(include_path=["a", "b"]).searched == [ours, "a", "b"]
    assert module.TaskManager(include_path=str(ours)).searched == [str(ours)]
    assert module.TaskManager(include_defaults=False).searched == []


def test_the_hook_stands_down_when_lm_eval_reads_the_entry_points(tmp_path):
    """As in lm_eval's pull request 4015."""
    module = module_of(discover_plugin_task_paths=lambda: [tmp_path, tasks_folder()])
    hook.apply("lm_eval.tasks.manager", module, comlora_lm_eval_hook.tell)
    assert module.TaskManager(include_path="x").searched == ["x"]
    module = module_of(discover_plugin_task_paths=lambda: [tmp_path])
    hook.apply("lm_eval.tasks.manager", module, comlora_lm_eval_hook.tell)
    assert module.TaskManager(include_path="x").searched == [tasks_folder(), "x"]


def test_an_unexpected_error_in_filling_the_base_leaves_the_model_alone(monkeypatch, capsys):
    monkeypatch.setattr(comlora_lm_eval_hook, "_told", False)

    class HFLM:
        def __init__(self, pretrained="none", **kwargs):
            self.pretrained = pretrained

    def broken(adapter, given):
        raise KeyError("r")

    hook._fill_base(HFLM, "peft", broken, comlora_lm_eval_hook.tell)
    assert HFLM(peft="x").pretrained == "none"
    assert "lm_eval is left as it is (KeyError: 'r')" in capsys.readouterr().err

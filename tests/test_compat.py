"""Private names of other libraries: each stands in `comlora_trl.compat`, and is where it was."""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path

import pytest

import comlora_trl
from comlora_trl import compat

PACKAGE = Path(comlora_trl.__file__).parent
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "compat.py"]
NAMES = {part for seam in compat.SEAMS for part in seam.name.split(".") if part.startswith("_")}
LIBRARIES = {"torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "lm_eval", "bert_score"}


def resolved(name: str) -> object:
    """The object of a full name, importing as far as modules go."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def source_has(owner: str, attribute: str) -> bool:
    """Whether a class sets an attribute of its instances, in its own code or that of its bases."""
    kinds = inspect.getmro(resolved(owner))
    sources = (inspect.getsource(kind) for kind in kinds if kind.__module__.split(".")[0] in LIBRARIES)
    return any(f"self.{attribute}" in source or f'"{attribute}"' in source for source in sources)


@pytest.mark.parametrize("seam", compat.SEAMS, ids=lambda seam: seam.name)
def test_a_private_name_is_where_it_was(seam):
    if importlib.util.find_spec(seam.library.replace("-", "_")) is None:
        pytest.skip(f"{seam.library} is not installed")
    owner, _, name = seam.name.rpartition(".")
    if owner == "Parameter":  # the library puts them onto parameters
        folder = {"deepspeed": "runtime", "torch": "distributed/fsdp"}[seam.library]
        folder = Path(importlib.util.find_spec(seam.library).origin).parent / folder
        assert any(name in file.read_text() for file in folder.rglob("*.py"))
        return
    try:
        resolved(seam.name)
    except AttributeError:
        assert source_has(owner, name), f"{seam.name} has moved: {seam.why}"


def own_names() -> set[str]:
    """Private names that this package defines itself: functions, classes, attributes, parameters."""
    found = set()
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "new"):
                    found.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
                found.add(node.args[1].value)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_comlora")) and name != "_"


OWN = own_names()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_private_names_of_others_are_touched_through_compat_alone(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            on_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            inherited = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super"
            if on_self or inherited:  # a class's own name, or one that it inherits and that stands in the list
                assert node.attr in OWN | NAMES, f"{file}:{node.lineno}: {node.attr}"
            else:
                assert node.attr in OWN - NAMES, f"{file}:{node.lineno}: {node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in LIBRARIES:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not any(map(is_private, names)), f"{file}:{node.lineno}: {node.module}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            assert not (is_private(name) and name not in OWN), f"{file}:{node.lineno}: {name}"


def test_overridden_private_methods_stand_in_the_list():
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages([str(PACKAGE)], "comlora_trl.")
        if info.name.split(".")[1] in ("branches", "training", "trainers")
    ]
    classes = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    for kind in {kind for kind in classes if kind.__module__.startswith("comlora_trl")}:
        others = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        for base in kind.__mro__:
            if base.__module__.startswith("comlora_trl"):
                # autograd's own metaclass makes one for each function
                for name in {*filter(is_private, vars(base))} - {"_backward_cls"}:
                    assert name in NAMES or not any(name in vars(other) for other in others), f"{base}: {name}"

"""Imports between the packages point down, and no modules import each other in a circle."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import comlora_trl

PACKAGE = Path(comlora_trl.__file__).parent
# Which parts of comlora_trl each package may import besides itself
ALLOWED = {
    "branches": {"compat"},
    "competition": set(),
    "training": {"branches", "compat", "competition", "data", "winner"},
    "trainers": {"branches", "competition", "training"},
    # Training writes what evaluation reads
    "winner": {"data", "demo", "plots", "version"},
    "evaluation": {"compat", "data", "demo", "winner"},
    "data": {"demo"},
    "demo": set(),
    "cli": {"branches", "data", "demo", "evaluation", "plots", "training", *comlora_trl.__all__},
}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


HOOK = PACKAGE.parent / "comlora_lm_eval_hook.py"
MODULES = {module_name(file): file for file in [*PACKAGE.rglob("*.py"), HOOK]}


def imported(file: Path) -> set[str]:
    """Names that a file imports, wherever in it: inside functions and under `TYPE_CHECKING` too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_modules(name: str) -> set[str]:
    """This package's modules that one of them imports."""
    found = set()
    for target in imported(MODULES[name]):
        while target and target not in MODULES:
            target = target.rpartition(".")[0]
        found |= {target} - {"", name}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    files = list((PACKAGE / package).rglob("*.py"))
    assert files
    for file in files:
        own = [name.split(".")[1] for name in imported(file) if name.split(".")[0] == "comlora_trl"]
        assert set(own) <= ALLOWED[package] | {package}, file


@pytest.mark.parametrize("package", ["branches", "competition"])
def test_the_lower_packages_know_no_trainer(package):
    for file in (PACKAGE / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(file)} & {"trl", "datasets"}, file


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: imported_modules(name) for name in MODULES}
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    # Those that lead into a circle without being part of it go too
    while leaves := [name for name in left if not any(name in targets for targets in left.values())]:
        for name in leaves:
            del left[name]
    assert not left, {name: targets & left.keys() for name, targets in left.items()}


def test_every_package_is_looked_at():
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert folders == ALLOWED.keys()


def test_a_class_has_at_most_one_base_of_ours():
    """Mixins of several kinds over one bag of state are what a reader can't follow."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "comlora_trl."):
        if "lm_eval_tasks" in info.name:
            continue
        module = importlib.import_module(info.name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            ours = [base for base in kind.__bases__ if base.__module__.split(".")[0] == "comlora_trl"]
            assert kind.__module__ != info.name or len(ours) <= 1, kind

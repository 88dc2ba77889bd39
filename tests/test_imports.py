"""Imports between the packages point down: the lower ones know nothing of the upper ones."""

import ast
from pathlib import Path

import pytest

import comlora_trl

PACKAGE = Path(comlora_trl.__file__).parent
# Which parts of comlora_trl each package may import, besides itself and `compat`
ALLOWED = {
    "branches": set(),
    "competition": set(),
    "training": {"branches", "competition", "data", "winner"},
    "trainers": {"branches", "competition", "data", "training", "winner"},
    # Training writes what evaluation reads
    "winner": {"__version__", "data", "demo", "plots"},
    "evaluation": {"data", "demo", "winner"},
    "data": {"demo"},
    "demo": set(),
    "cli": {"branches", "data", "demo", "evaluation", "plots", "training", *comlora_trl.__all__},
}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    files = list((PACKAGE / package).rglob("*.py"))
    assert files
    for file in files:
        own = [name.split(".")[1] for name in imported(file) if name.split(".")[0] == "comlora_trl"]
        assert set(own) <= ALLOWED[package] | {package, "compat"}, file


@pytest.mark.parametrize("package", ["branches", "competition"])
def test_the_lower_packages_know_no_trainer(package):
    for file in (PACKAGE / package).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(file)} & {"trl", "datasets"}, file

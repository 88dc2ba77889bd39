"""Processes of their own, and fresh virtual environments whose other packages are those of the running one."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCES = ("comlora_trl", "lm_eval_tasks", "pyproject.toml", "setup.py", "MANIFEST.in")
SOURCES += ("comlora_lm_eval_hook.py", "comlora_lm_eval_hook.pth", "README.md", "LICENSE")

LM_EVAL_PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "lm_eval"
version = "{version}"
[project.scripts]
lm_eval = "lm_eval.__main__:cli_evaluate"
[tool.setuptools.packages.find]
include = ["lm_eval*"]
"""


def run(
    command: list[str], folder: Path, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    """Runs Python with these arguments in a folder; the running Python knows the repository, another one does not."""
    paths = {"PYTHONPATH": str(REPOSITORY) if python == sys.executable else ""}
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | paths | environment
    return subprocess.run([python, *command], cwd=folder, env=variables, capture_output=True, text=True)


class Environment:
    """A fresh virtual environment in a folder: everything but us and lm_eval is linked from the running one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.python = str(folder / "venv" / "bin" / "python")
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        self.packages = Path(self.run("-c", code).stdout.strip())
        for entry in sys.path:
            for path in Path(entry).iterdir() if entry.endswith("site-packages") else ():
                ours = path.name.startswith(("comlora", "lm_eval", "__")) or path.suffix == ".pth"
                if not ours and not (self.packages / path.name).exists():
                    (self.packages / path.name).symlink_to(path)

    def run(self, *command: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """Runs this environment's Python."""
        return run(list(command), folder or self.folder, self.python, **environment)

    def pip(self, *command: str) -> None:
        """Runs pip; skips the test where there is no index to take setuptools from."""
        done = self.run("-m", "pip", *command)
        if "Could not find a version that satisfies the requirement setuptools" in done.stderr:
            pytest.skip("no package index to build with")
        assert done.returncode == 0, done.stderr

    def install_ours(self, kind: str) -> None:
        """Installs this package as a "wheel" or "editable", from a copy, for building leaves files behind."""
        source = self.folder / "source"
        source.mkdir()
        for name in SOURCES:
            path = REPOSITORY / name
            if path.is_dir():
                shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, source)
        if kind == "editable":
            self.pip("install", "-q", "--no-deps", "-e", str(source))
            return
        self.pip("wheel", "-q", "--no-deps", "-w", str(self.folder), str(source))
        shutil.rmtree(source)
        [wheel] = self.folder.glob("comlora_trl-*.whl")
        self.pip("install", "-q", "--no-deps", str(wheel))

    def install_lm_eval(self, kind: str) -> None:
        """Links lm_eval as the running environment has it, or installs a copy of it as "editable"."""
        package = Path(importlib.util.find_spec("lm_eval").origin).parent
        if kind == "editable":
            source = self.folder / "lm_eval_source"
            shutil.copytree(package, source / "lm_eval", ignore=shutil.ignore_patterns("__pycache__"))
            project = LM_EVAL_PROJECT.format(version=importlib.metadata.version("lm_eval"))
            (source / "pyproject.toml").write_text(project)
            self.pip("install", "-q", "--no-deps", "-e", str(source))
            return
        (self.packages / "lm_eval").symlink_to(package)
        metadata = importlib.metadata.distribution("lm_eval")._path
        (self.packages / metadata.name).symlink_to(metadata)

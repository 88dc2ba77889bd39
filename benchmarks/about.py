"""What a result says of its run: machine, commit and versions."""

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


def origin(*more: str) -> dict[str, Any]:
    """All three, as entries of a result."""
    return {"commit": commit(), "machine": machine(), "versions": versions(*more)}


def machine() -> str:
    """The name of the GPU, or of the processor if there is no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def commit() -> str:
    """The repository's commit, with + if tracked files are changed; "unknown" without a repository.

    GIT_COMMIT replaces it, for a copy without git's folder.
    """
    if given := os.environ.get("GIT_COMMIT"):
        return given
    head, changes = (
        subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return (head or "unknown") + ("+" if changes else "")


def versions(*more: str) -> dict[str, str]:
    """The versions of the packages that a step runs through, and of `more`, as far as they are installed."""
    return {name: version(name) for name in (*PACKAGES, *more) if importlib.util.find_spec(name)}

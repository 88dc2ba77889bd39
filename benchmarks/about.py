"""What a result says of its run: machine, commit and versions."""

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import version

import torch

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


def machine() -> str:
    """The name of the GPU, or of the processor if there is no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working directory's repository, or GIT_COMMIT, which a copy without a repository needs."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return os.environ.get("GIT_COMMIT") or found or "unknown"


def versions(*more: str) -> dict[str, str]:
    """The versions of the packages that a step runs through, and of `more`, as far as they are installed."""
    return {name: version(name) for name in (*PACKAGES, *more) if importlib.util.find_spec(name)}

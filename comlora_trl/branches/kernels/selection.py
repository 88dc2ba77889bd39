"""Which kernels run where."""

import importlib.util
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from comlora_trl.branches.kernels import torch_path

VARIABLE = "COMLORA_KERNELS"
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def selected_kernels(device: torch.device | str, dropout: float) -> str:
    """Which kernels compute the thin products on `device`, "torch" or "triton".

    Triton's pay where dropout has to be drawn, on CUDA; without dropout cuBLAS is as fast and launched in less time
    (README.md beside this file). `COMLORA_KERNELS=torch` or `triton` forces one (Triton's interpreter,
    `TRITON_INTERPRET=1`, runs on the CPU).

    Raises:
        ValueError: if `COMLORA_KERNELS` names no kernels that exist, or kernels that can't run here.
    """
    device = device if isinstance(device, torch.device) else torch.device(device)
    forced, interpreted = os.environ.get(VARIABLE, ""), os.environ.get("TRITON_INTERPRET") == "1"
    return _select(device.type, dropout > 0, forced, interpreted)


@lru_cache
def _select(device: str, dropout: bool, forced: str, interpreted: bool) -> str:
    if forced not in ("", "torch", "triton"):
        raise ValueError(f"{VARIABLE}={forced} is not possible: it must be torch or triton (leave it out to choose).")
    if forced == "triton" and not (_TRITON_INSTALLED and (device == "cuda" or interpreted)):
        reason = "Triton is not installed" if not _TRITON_INSTALLED else f"the tensors are on {device}"
        raise ValueError(
            f"{VARIABLE}=triton is not possible, {reason}: install triton and train on CUDA, or leave {VARIABLE} out."
        )
    return forced or ("triton" if dropout and _TRITON_INSTALLED and device == "cuda" else "torch")


def products(x: Tensor, a: Tensor, dropout: float) -> ModuleType:
    """The module whose thin products serve x, computing in the type of A, [K, n·r, d].

    Triton's kernels have no float64 and no ranks above 128 (of all layers together), which would not fit their tiles,
    and need a row at least: the PyTorch path serves those.
    """
    if torch.float64 in (a.dtype, x.dtype) or a.size(1) > 128 or x.numel() == 0:
        return torch_path
    if selected_kernels(x.device, dropout) == "torch":
        return torch_path
    from comlora_trl.branches.kernels import triton_path

    return triton_path

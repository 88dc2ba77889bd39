"""LoRA products of K branches over equal shares of the rows, without a loop over branches.

`torch_path` holds them in plain PyTorch: the reference, the CPU path and the fallback.
"""

import os

import torch

from comlora_trl.kernels.torch_path import branch_linear, branch_linear_fused_base

__all__ = ["branch_linear", "branch_linear_fused_base", "selected_kernels"]


def selected_kernels(device: torch.device | str) -> str:
    """Which kernels run on `device`; `COMLORA_KERNELS` forces one.

    Raises:
        ValueError: if `COMLORA_KERNELS` names no kernels that exist.
    """
    forced = os.environ.get("COMLORA_KERNELS", "torch")
    if forced != "torch":
        raise ValueError(f"COMLORA_KERNELS={forced} is not possible: it must be torch (leave it out for the default).")
    return forced

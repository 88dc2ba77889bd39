"""LoRA products of K branches over equal shares of the rows, without a loop over branches.

`branches` holds the autograd functions, `torch_path` their thin products in plain PyTorch (the reference, the CPU path
and the fallback), `triton_path` the same products as Triton kernels, for CUDA.
"""

from comlora_trl.kernels.branches import branch_linear, branch_linear_fused_base
from comlora_trl.kernels.selection import selected_kernels

__all__ = ["branch_linear", "branch_linear_fused_base", "selected_kernels"]

"""LoRA products of K branches over equal shares of the rows, without a loop over branches.

`branches` holds the autograd functions, `stacking` the weights they take, `torch_path` their thin products in plain
PyTorch (the reference, the CPU path and the fallback), `triton_path` the same products as Triton kernels, for CUDA.
"""

from comlora_trl.branches.kernels.branches import (
    BranchWeights,
    branch_delta,
    branch_linears,
    selected_kernels,
    stack_branches,
)

__all__ = ["BranchWeights", "branch_delta", "branch_linears", "selected_kernels", "stack_branches"]

"""LoRA products of K branches over equal shares of the rows, without a loop over branches.

- `branches`: the autograd functions, and the stacking of weights for them.
- `ops`: the same functions as custom operators, for compiled layers.
- `torch_path`: the products with A and B in plain PyTorch: the reference, the path on the CPU, and the fallback.
- `triton_path`: the same products as Triton kernels for CUDA.
"""

from comlora_trl.branches.kernels.branches import (
    BranchWeights,
    branch_delta,
    branch_linears,
    selected_kernels,
    stack_branches,
)

__all__ = ["BranchWeights", "branch_delta", "branch_linears", "selected_kernels", "stack_branches"]

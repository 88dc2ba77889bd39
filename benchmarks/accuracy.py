"""Output and gradients of every path against float64, and PEFT's products on the same input."""

from collections.abc import Callable
from types import ModuleType

import torch
from cases import Bench, forced_kernels
from report import Results
from torch import Tensor
from torch.nn import functional as F

from comlora_trl.branches.kernels import branch_delta, branch_linears, stack_branches, torch_path

K, RANK, SCALING, SEED = 4, 8, 2.0, 2

# (x, K matrices A, K matrices B, frozen weight) -> output
Product = Callable[[Tensor, list[Tensor], list[Tensor], Tensor], Tensor]


def check_gradients(bench: Bench, results: Results) -> None:
    """Output and gradients of every path against float64, and PEFT's products on the same input."""
    case = _Case(bench)
    for p, path in ((0.0, torch_path), *((0.05, path) for path in _dropout_paths(bench))):
        name = path.__name__.rpartition(".")[2].removesuffix("_path") + (f", dropout {p}" if p else "")
        mask = case.mask(path, p)
        expected = case.run(case.one_by_one(mask), torch.float64)
        peft = _errors(case.run(case.one_by_one(mask)), expected)
        results.figures[f"gradient errors: peft, {name}"] = peft
        for kind, product in {"fused base": case.fused(p), "delta": case.delta(p)}.items():
            with forced_kernels("triton" if "triton" in name else "torch"):
                found = _errors(case.run(product), expected)
            results.figures[f"gradient errors: {name}, {kind}"] = found
            worst = max(found[key] / peft[key] for key in found)
            detail = ", ".join(f"{key} {value:.1e}" for key, value in found.items())
            results.row(f"error against float64 / PEFT's: {name}, {kind}", worst, 1.02, detail)


class _Case:
    """Random operands, and the ways to multiply them."""

    def __init__(self, bench: Bench, rows: int = 4) -> None:
        width, out_width = bench.shape.config.hidden_size, bench.shape.config.intermediate_size // 2
        self.device = bench.shape.device
        torch.manual_seed(1)
        self.x = torch.randn(K * rows, bench.shape.tokens, width, device=self.device).bfloat16()
        self.weight = (torch.randn(out_width, width, device=self.device) / width**0.5).bfloat16()
        self.a = [torch.randn(RANK, width, device=self.device) / width**0.5 for _ in range(K)]
        self.b = [torch.randn(out_width, RANK, device=self.device) for _ in range(K)]
        self.grad = torch.randn(*self.x.shape[:-1], out_width, device=self.device).bfloat16()

    def run(self, product: Product, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output, dx, dA and dB; under autocast to bf16, or wholly in another type."""
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (self.x, *self.a, *self.b)]
        weight, grad = (t.to(dtype or t.dtype) for t in (self.weight, self.grad))
        torch.manual_seed(SEED)  # of dropout
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype is None):
            output = product(leaves[0], leaves[1 : 1 + K], leaves[1 + K :], weight)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    def mask(self, path: ModuleType, p: float) -> Tensor:
        """What a path's dropout multiplies x with, float32; the gradient of a sum over x shows what it keeps."""
        if not p:
            return torch.ones_like(self.x, dtype=torch.float32)
        torch.manual_seed(SEED)
        noise = path.draw_noise(self.x, p, 1)
        ones = self.x.new_ones(K, self.x.numel() // self.x.size(-1) // K, 1)
        kept = path.project_back(ones, self.x.new_ones(K, 1, self.x.size(-1)), self.x, noise) != 0
        return kept.view_as(self.x) / (1 - p)

    def one_by_one(self, mask: Tensor) -> Product:
        """PEFT's products, a branch at a time."""

        def product(x: Tensor, a: list[Tensor], b: list[Tensor], weight: Tensor) -> Tensor:
            pairs = zip(x.chunk(K), (x * mask).chunk(K), a, b, strict=True)
            outputs = [
                F.linear(r, weight) + F.linear(F.linear(kept, a_k), b_k) * SCALING for r, kept, a_k, b_k in pairs
            ]
            return torch.cat(outputs)

        return product

    def fused(self, p: float) -> Product:
        """Ours with the frozen product inside."""

        def product(x: Tensor, a: list[Tensor], b: list[Tensor], weight: Tensor) -> Tensor:
            [stacked] = stack_branches([[[m] for m in a]], [[[m] for m in b]], SCALING, x.dtype)
            return branch_linears(x, [weight], [None], stacked.a, stacked.b, p)[0]

        return product

    def delta(self, p: float) -> Product:
        """Ours added to a frozen product made elsewhere."""

        def product(x: Tensor, a: list[Tensor], b: list[Tensor], weight: Tensor) -> Tensor:
            [stacked] = stack_branches([[[m] for m in a]], [[[m] for m in b]], SCALING, x.dtype)
            return branch_delta(x, F.linear(x, weight), stacked.a, *stacked.b, p)

        return product


def _dropout_paths(bench: Bench) -> list[ModuleType]:
    if bench.shape.device.type != "cuda":
        return [torch_path]
    from comlora_trl.branches.kernels import triton_path

    return [torch_path, triton_path]


def _errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative errors, the worst of the K branches'."""
    each = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
    return {"output": each[0], "dx": each[1], "dA": max(each[2 : 2 + K]), "dB": max(each[2 + K :])}

"""Random layers with branches, and what they compute, branch by branch in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

from comlora_trl.branches.kernels import branch_delta, branch_linears, stack_branches
from comlora_trl.branches.kernels.branches import products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def stacked(a: list[Tensor], b: list[Tensor], scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer's weights of all branches."""
    [weights] = stack_branches([[[one] for one in a]], [[[one] for one in b]], scaling, dtype)
    return weights.a, weights.b[0]


def fused_linear(x, weight, bias, a, b, scaling, dropout=0.0) -> Tensor:
    dtype = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else x.dtype
    a, b = stacked(a, b, scaling, dtype)
    [output] = branch_linears(x, [weight], [bias], a, [b], dropout)
    return output


def delta_linear(x, base_output, a, b, scaling, dropout=0.0) -> Tensor:
    return branch_delta(x, base_output, *stacked(a, b, scaling, base_output.dtype), dropout)


def make_case(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, object]:
    k, rows, tokens, d, width, r = shape
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)  # noqa: E731
    master = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(k * rows, tokens, d).to(DEVICE, dtype),
        "weight": (normal(width, d) / d**0.5).to(DEVICE, dtype),
        "bias": normal(width).to(DEVICE, dtype),
        "a": [(normal(r, d) / d**0.5).to(DEVICE, master).requires_grad_() for _ in range(k)],
        "b": [normal(width, r).to(DEVICE, master).requires_grad_() for _ in range(k)],
        "grad": normal(k * rows, tokens, width).to(DEVICE, dtype),
    }


def literal(case: dict, scaling: float, mask: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of x, A_k, B_k, branch by branch in float64."""
    x, a, b = (
        case["x"].detach().double().requires_grad_(),
        [p.detach().double().requires_grad_() for p in case["a"]],
        [p.detach().double().requires_grad_() for p in case["b"]],
    )
    k, outputs = len(a), []
    masks = torch.ones_like(x) if mask is None else mask.double()
    for rows, keep, a_k, b_k in zip(x.chunk(k), masks.chunk(k), a, b, strict=True):
        base = rows @ case["weight"].double().T + case["bias"].double()
        outputs.append(base + scaling * (rows * keep) @ a_k.T @ b_k.T)
    output = torch.cat(outputs) if x.numel() else x.new_zeros(*x.shape[:-1], b[0].size(0)) + 0 * x.sum()
    gradients = torch.autograd.grad(output, [x, *a, *b], case["grad"].double(), allow_unused=True)
    return [output, *(torch.zeros_like(p) if g is None else g for p, g in zip([x, *a, *b], gradients, strict=True))]


def ours(case: dict, scaling: float, dropout: float, fused: bool) -> list[Tensor]:
    x = case["x"].detach().requires_grad_()
    if fused:
        output = fused_linear(x, case["weight"], case["bias"], case["a"], case["b"], scaling, dropout)
    else:
        base = F.linear(x, case["weight"], case["bias"])
        output = delta_linear(x, base, case["a"], case["b"], scaling, dropout)
    return [output, *torch.autograd.grad(output, [x, *case["a"], *case["b"]], case["grad"])]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= tolerance * other.norm()


def drawn_masks(x: Tensor, dtype: torch.dtype, p: float, layers: int = 1) -> list[Tensor]:
    """The layers' masks of the next draw, [*x.shape] each, through the down-projection with identities for A."""
    width, parts = x.size(-1), []
    identity = torch.eye(width, dtype=dtype, device=x.device)
    kernels = products(x, identity[None, :16], p)
    noise = kernels.draw_noise(x, p, layers)
    for columns in identity.split(16):  # the ranks of all layers must fit a tile
        with torch.random.fork_rng():
            down = kernels.project_down(torch.ones_like(x), columns.repeat(layers, 1)[None], noise)
        parts.append(down.view(*x.shape[:-1], layers, columns.size(0)))
    return list(torch.cat(parts, dim=-1).unbind(dim=-2))

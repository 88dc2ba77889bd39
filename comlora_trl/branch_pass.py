"""Running the base model over K branches: all at once, or in chunks with each chunk's backward before the next.

Both give the same losses and gradients. The row weights are known before the language model runs (they come from the
selector, which reads embeddings), so no graph has to be kept across branches.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from comlora_trl.rows import Rows

if TYPE_CHECKING:
    from comlora_trl.model import ComLoRAModel


def branch_nll_batched(
    model: "ComLoRAModel", inputs: dict[str, Any], rows: Rows, weights: Tensor, chunk: int
) -> dict[str, Tensor]:
    """Runs all branches in one forward of the base model.

    Args:
        inputs: the batch, [B, T] tensors and flags for TRL's fused LM head.
        rows: the batch's rows.
        weights: w[k, b], [K, R].
        chunk: unused here; the branches of a chunk are all K.

    Returns:
        the fields of [`BranchOutput`] that the base model decides.
    """
    lines = inputs["input_ids"].size(0)
    output = model.run_branches(0, model.settings.k, inputs, lines)
    weighted, nll = _weigh(output.log_probs, rows, weights)
    return {
        "log_probs": weighted,
        "entropy": output.entropy,
        "is_top1": output.is_top1,
        "label_mask": output.label_mask,
        "aux_loss": output.get("aux_loss"),
        "nll": nll,
    }


def branch_nll_in_chunks(
    model: "ComLoRAModel", inputs: dict[str, Any], rows: Rows, weights: Tensor, chunk: int
) -> dict[str, Tensor]:
    """Runs `chunk` branches at a time, each chunk forward and backward before the next; see [`branch_nll_batched`].

    The log-probabilities come back as one weighted sum, whose backward hands out the gradients found already.
    """
    k = model.settings.k
    pieces: list[dict[str, Tensor]] = []
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    total = weights.new_zeros(())
    for first in range(0, k, chunk):
        last = min(first + chunk, k)
        output = model.run_branches(first, last, inputs, inputs["input_ids"].size(0))
        weighted, nll = _weigh(output.log_probs, rows, weights[first:last])
        if torch.is_grad_enabled():
            own = list(_trainable(model, first, last))
            parameters += own
            found = torch.autograd.grad(weighted.sum(), own, allow_unused=True)
            gradients += [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
        total = total + weighted.detach().sum()
        fields = ("entropy", "is_top1", "label_mask")
        pieces.append({name: getattr(output, name).detach() for name in fields} | {"nll": nll})
        del output, weighted
    result = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    log_probs = _KnownGradients.apply(total, len(parameters), *parameters, *gradients) if parameters else total
    return {"log_probs": log_probs, "aux_loss": None, **result}


def _weigh(log_probs: Tensor, rows: Rows, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [k·B, T−1] times their row's weight [k, R], and the rows' S [k, R] without gradient."""
    branches = weights.size(0)
    by_branch = log_probs.view(branches, -1, log_probs.size(-1))
    nll = -rows.sum(by_branch.detach())
    weight = weights[:, rows.index[:, 1:]].to(log_probs.dtype)
    # Selected, not multiplied: a diverged branch's nan stays out of the sum and of its own gradient
    usable = (weight != 0) & by_branch.detach().isfinite()
    weighted = torch.where(usable, by_branch, torch.zeros_like(by_branch)) * weight
    return weighted.view_as(log_probs), nll


def _trainable(model: "ComLoRAModel", first: int, last: int) -> Iterator[Tensor]:
    for branch in range(first, last):
        yield from (p for p in model.branch_parameters(branch) if p.requires_grad)


class _KnownGradients(torch.autograd.Function):
    """A scalar whose gradients with respect to some parameters are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients = tensors[count:]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * grad_output.to(gradient.dtype) for gradient in ctx.gradients]
        return (None, None, *gradients, *[None] * len(gradients))

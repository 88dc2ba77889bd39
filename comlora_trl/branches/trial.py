"""Where does this architecture's batch widen? Tried once, on made-up tokens, before training.

Two branches with random weights run together and one by one; where the numbers agree the batch widens. No list of
model names could know it: a layer may take tensors whose first dimension is batch times heads, or keep the batch in
its second.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from comlora_trl.branches.expansion import INPUTS, LAYERS, SEPARATELY
from comlora_trl.branches.model import BranchModel
from comlora_trl.branches.rows import Rows

# Errors relative to a row's NLL that are rounding's, in float32 and in half precision
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_ROUNDING = 2e-2


def settle_expansion(model: BranchModel, batches: Sequence[dict[str, Any]]) -> str:
    """Decides where the model's batch widens, and leaves the model, its modes and random states as they were.

    Args:
        batches: made-up batches as training will have them, of different numbers of lines where they are padded.

    Returns:
        one of `expansion.PLACES`, which is set on the model too.

    Raises:
        ValueError: in one line, if the model can't run as branches at all.
    """
    with _undisturbed(model), torch.no_grad():
        try:
            alone = [_nll_alone(model, batch) for batch in batches]
        except Exception as error:
            raise ValueError(
                f"{type(model.get_base_model()).__name__} can't be trained as competing branches: a pass over made-up "
                f"tokens ended in {type(error).__name__} ({_first_line(error)}). A causal language model that takes "
                "input_ids and labels is needed, with adapters on linear layers that see every token."
            ) from error
        if model.k == 1:
            return model.expansion.place
        for place in (LAYERS, INPUTS) if model.expansion.start is not None else (INPUTS,):
            if _agrees(model, batches, alone, place):
                return place
        model.expansion.place = SEPARATELY
        return SEPARATELY


def _nll_alone(model: BranchModel, batch: dict[str, Any]) -> Tensor:
    """S of each branch by itself, [2, R]; the layers' arguments are noted on the way."""
    expansion = model.expansion
    expansion.seen = set()
    nll = _nll(model, batch, chunk=1)
    lines = batch["input_ids"].size(0)
    if lines > 1:
        expansion.batched = frozenset(
            expansion.seen if expansion.batched is None else expansion.seen & expansion.batched
        )
    expansion.seen = None
    if not bool(nll.isfinite().all()):
        raise ArithmeticError("the loss of made-up tokens is not finite")
    return nll


def _agrees(model: BranchModel, batches: Sequence[dict[str, Any]], alone: list[Tensor], place: str) -> bool:
    model.expansion.place = place
    dtype = model.get_base_model().dtype
    for batch, expected in zip(batches, alone, strict=True):
        try:
            together = _nll(model, batch, chunk=2)
        except Exception:  # whatever an architecture raises when its batch does not fit
            model.competing.abandon()
            return False
        error = (together - expected).abs().max()
        if not error <= _ROUNDING.get(dtype, _HALF_ROUNDING) * expected.abs().max():
            return False
    return True


def _nll(model: BranchModel, batch: dict[str, Any], chunk: int) -> Tensor:
    inputs = {**batch, "fused_lm_head": True, "use_cache": False}
    rows = Rows.of(inputs)
    branches = list(range(min(model.k, 2)))
    weights = torch.ones(model.k, rows.count, device=batch["input_ids"].device)
    return model.run_branches(inputs, rows, weights, branches, chunk).nll[branches]


@contextmanager
def _undisturbed(model: BranchModel) -> Iterator[None]:
    """Random weights in two branches, no dropout; everything as it was at the end."""
    parameters = [p for branch in range(min(model.k, 2)) for p in model.branch_parameters(branch)]
    kept = [parameter.detach().clone() for parameter in parameters]
    modes = [(module, module.training) for module in model.modules()]
    device = parameters[0].device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        try:
            model.eval()
            with torch.no_grad():
                for parameter in parameters:
                    # B is zero as yet, and with it the branches would all be the base model
                    parameter += torch.randn_like(parameter) * 0.1
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            for module, mode in modes:
                module.training = mode


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]

"""Finds out before training where a model's batch can be repeated for the K branches ("where the batch widens").

Two branches with random weights run on random tokens, together and one by one. The batch is repeated at the first
place where both give the same numbers. A list of model names is not enough, because a layer may take tensors whose
first dimension is batch times heads, or have the batch in the second dimension.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from comlora_trl.branches.batches import Rows
from comlora_trl.branches.model import BranchModel
from comlora_trl.branches.passes import INPUTS, LAYERS, SEPARATELY, is_padded_right
from comlora_trl.branches.views import ViewPass

# Errors up to this, relative to the largest value, count as rounding; float32 may be TF32 on a GPU
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_ROUNDING = 2e-2


def settle_expansion(model: BranchModel, batches: Sequence[dict[str, Any]]) -> str:
    """Decides where the model's batch is repeated for the K branches, and sets `model.expansion.place`.

    The weights, the training modes and the random states are restored at the end.

    Args:
        model: the model with its branches.
        batches: batches of random tokens in the form that training uses. Padded batches have different numbers of
            lines.

    Returns:
        one of `passes.PLACES`.

    Raises:
        ValueError: if the model can't run with branches.
    """
    with _undisturbed(model), torch.no_grad():
        calls = _Calls(model)
        try:
            alone = [_figures_alone(model, batch, calls) for batch in batches]
        except Exception as error:
            raise ValueError(
                f"{type(model.get_base_model()).__name__} can't be trained here: one branch's pass over made-up "
                f"tokens ended in {type(error).__name__} ({first_line(error)}). A causal language model or, for "
                "rewards, a sequence classifier that takes input_ids is needed."
            ) from error
        finally:
            calls.remove()
        calls.check()
        if model.k > 1:
            model.expansion.place = _first_place(model, batches, alone, calls.routed)
        return model.expansion.place


def ignores_padding(model: BranchModel, batches: Sequence[dict[str, Any]]) -> bool:
    """Whether the model gives the same result without an attention mask if the padding is on the right.

    This is so with causal attention, and not with bidirectional attention. Two things are tested. Without a mask, the
    result must stay exactly the same with other padding tokens. With and without a mask, the results must agree up to
    rounding.

    Args:
        model: the model with its branches.
        batches: batches of random tokens; only those with padding on the right are used.
    """
    padded = [batch for batch in batches if is_padded_right(batch.get("attention_mask"))]
    padded = [batch for batch in padded if not bool(batch["attention_mask"].all())]
    if not padded:
        return False
    before = model.expansion.ignores_padding
    try:
        with _undisturbed(model), torch.no_grad():
            return all(_ignores_padding(model, batch) for batch in padded)
    except Exception:  # some architectures need a mask
        model.competing.abandon()
        return False
    finally:
        model.expansion.ignores_padding = before


def _ignores_padding(model: BranchModel, batch: dict[str, Any]) -> bool:
    rounding = _ROUNDING.get(model.get_base_model().dtype, _HALF_ROUNDING)
    model.expansion.ignores_padding = False
    masked = _log_probs(model, batch)
    model.expansion.ignores_padding = True
    plain = _log_probs(model, batch)
    other = batch["input_ids"].where(batch["attention_mask"].bool(), batch["input_ids"].flip(0, 1))
    same = torch.equal(_log_probs(model, {**batch, "input_ids": other}), plain)
    return same and bool((masked - plain).abs().max() <= rounding * masked.abs().max())


def _log_probs(model: BranchModel, batch: dict[str, Any]) -> Tensor:
    """The log-probability of each token under branch 0, [B, T − 1]."""
    inputs = {**batch, "fused_lm_head": True, "use_cache": False}
    rows = Rows.of(inputs)
    weights = torch.ones(model.k, rows.count, device=batch["input_ids"].device)
    return model.run_branches(inputs, rows, weights, [0]).log_probs


def _first_place(
    model: BranchModel, batches: Sequence[dict[str, Any]], alone: list[tuple[Tensor, ...]], routed: bool
) -> str:
    if not routed:  # a router may by chance send both branches equally many tokens, and the test would pass
        for place in (LAYERS, INPUTS) if model.expansion.start is not None else (INPUTS,):
            if _agrees(model, batches, alone, place):
                return place
    return SEPARATELY


class _Calls:
    """Records which adapted layers run in a pass, and whether one gets only some of the tokens (routed experts)."""

    def __init__(self, model: BranchModel) -> None:
        adapted = set(model.adapted_layers)
        self.names = {layer: name for name, layer in model.get_base_model().named_modules() if layer in adapted}
        self.tokens = 0
        self.called: set[nn.Module] = set()
        self.routed = False
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in self.names]

    def _see(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.called.add(layer)
        lines_of_tokens = args and isinstance(args[0], Tensor) and args[0].dim() == 2
        if lines_of_tokens and args[0].is_floating_point() and args[0].size(0) % self.tokens:
            self.routed = True

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def check(self) -> None:
        """Checks that the model calls every adapted layer. An adapter on another layer would not train.

        Raises:
            ValueError: if the model does not call some of the `target_modules`.
        """
        called = {self.names[layer].rpartition(".")[2] for layer in self.called}
        missed = {name.rpartition(".")[2] for name in self.names.values()} - called
        if missed:
            raise ValueError(
                f"target_modules adapts {', '.join(sorted(missed))}, whose adapters would never train: the model does "
                "not call these layers. Remove them from target_modules."
            )


def _figures_alone(model: BranchModel, batch: dict[str, Any], calls: _Calls) -> tuple[Tensor, ...]:
    """The figures of each branch in its own pass ([`_figures`]). Records which arguments have a batch dimension."""
    expansion, lines = model.expansion, batch["input_ids"].size(0)
    expansion.seen, calls.tokens = set(), batch["input_ids"].numel()
    try:
        figures = _figures(model, batch, chunk=1)
        if lines > 1:
            expansion.batched = frozenset(
                expansion.seen if expansion.batched is None else expansion.seen & expansion.batched
            )
    finally:
        expansion.seen = None
    if not all(bool(figure.isfinite().all()) for figure in figures):
        raise ArithmeticError("the loss of made-up tokens is not finite")
    return figures


def _agrees(
    model: BranchModel, batches: Sequence[dict[str, Any]], alone: list[tuple[Tensor, ...]], place: str
) -> bool:
    model.expansion.place = place
    rounding = _ROUNDING.get(model.get_base_model().dtype, _HALF_ROUNDING)
    for batch, expected in zip(batches, alone, strict=True):
        try:
            together = _figures(model, batch, chunk=2)
        except Exception:  # an architecture may raise any error if the size of the batch does not fit
            model.competing.abandon()
            return False
        for figure, own in zip(together, expected, strict=True):
            if not (figure - own).abs().max() <= rounding * own.abs().max():
                return False
    return True


def _figures(model: BranchModel, batch: dict[str, Any], chunk: int) -> tuple[Tensor, ...]:
    """S of the first two branches, [2, R], and the routers' loss if there is one."""
    branches = list(range(min(model.k, 2)))
    if model.get_base_model().get_output_embeddings() is None:
        return (_scores(model, batch, branches, chunk),)
    inputs = {**batch, "fused_lm_head": True, "use_cache": False}
    rows = Rows.of(inputs)
    weights = torch.ones(model.k, rows.count, device=batch["input_ids"].device)
    output = model.run_branches(inputs, rows, weights, branches, chunk)
    return (output.nll[branches], *([] if output.aux_loss is None else [output.aux_loss]))


def _scores(model: BranchModel, batch: dict[str, Any], branches: list[int], chunk: int) -> Tensor:
    """The logits of a classifier for each of some branches, [n, B·labels]."""
    inputs = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    parts = [branches[first : first + chunk] for first in range(0, len(branches), chunk)]
    dtype, device = model.get_base_model().dtype, batch["input_ids"].device
    # The copies of the head may have another dtype than the hidden states, so a base in half precision needs autocast
    half = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
        logits = [model(view_pass=ViewPass(tuple(part)), **inputs).logits for part in parts]
    return torch.cat(logits).view(len(branches), batch["input_ids"].size(0), -1).flatten(1)


@contextmanager
def _undisturbed(model: BranchModel) -> Iterator[None]:
    """Within the block, the first two branches differ and there is no dropout. Afterwards, everything is restored."""
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
                    # B is still zero, so all branches equal the base model. Much larger weights would make rounding
                    # errors large
                    parameter += torch.randn_like(parameter) * (0.3 / parameter.size(-1) ** 0.5)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, kept, strict=True):
                    parameter.copy_(value)
            for module, mode in modes:
                module.training = mode


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]

"""The competition's part in gradients that are sharded: norms, clipping, what is dropped, and DeepSpeed's step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor import DTensor

from comlora_trl.training.sharding.pieces import gradient_piece, put_gradient_piece


def norms(
    groups: Sequence[Sequence[nn.Parameter]], device: torch.device, accelerator: Accelerator | None = None
) -> Tensor:
    """Norms of the gradients of groups of parameters, [n], 0 for a group without.

    Where gradients lie in pieces every process has to call it, with the accelerator. With DeepSpeed they are at hand
    between backward and step alone (see [`around_step`]).
    """
    pieces = [_pieces(group) for group in groups]
    found = _norms(pieces, device)
    if accelerator is None or not _in_pieces(groups, accelerator):
        return found
    return (accelerator.reduce(found.square(), reduction="sum") / _replicas(groups, accelerator)).sqrt()


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scales a group's gradients to a norm of at most `max_norm`, in place, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        norm: of all gradients of the group.
    """
    parameters = list(parameters)
    pieces, kept = _whole_gradients(parameters), []
    if pieces is None:
        kept = [(parameter, piece) for parameter in parameters if (piece := gradient_piece(parameter)) is not None]
        pieces = [piece for _, piece in kept]
    if pieces:
        # A factor of 1 changes nothing and needs no answer from the device
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(pieces, factor.to(pieces[0].device))
    for parameter, piece in kept:
        put_gradient_piece(parameter, piece)


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leaves parameters without a gradient; where DeepSpeed holds it, with zeros."""
    for parameter in parameters:
        parameter.grad = None
        piece = gradient_piece(parameter)
        if piece is not None:
            put_gradient_piece(parameter, piece.zero_())


def around_step(engine: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Calls functions before and after each step of a DeepSpeed engine, which follows its backward at once.

    Done once for an engine, however often it is called.
    """
    if getattr(engine, "comlora_step", None) is not None:
        return
    step = engine.comlora_step = engine.step

    def run(*args: Any, **kwargs: Any) -> Any:
        before()
        result = step(*args, **kwargs)
        after()
        return result

    engine.step = run


def take_over_clipping(engine: Any) -> float:
    """The norm that a DeepSpeed engine is to clip to, 0 for none; it does not any more, for the caller does."""
    engine.optimizer.clip_grad = 0.0
    return engine.gradient_clipping()


def _in_pieces(groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> bool:
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    return any(hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping") for group in groups for p in group)


def _replicas(groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> float:
    """Processes that hold the same piece (hybrid sharding)."""
    shards, first = accelerator.num_processes, groups[0][0]
    if isinstance(first, DTensor):
        placements = zip(first.placements, first.device_mesh.shape, strict=True)
        shards = 1
        for placement, size in placements:
            shards *= size if placement.is_shard() else 1
    elif accelerator.distributed_type == DistributedType.FSDP:
        wrapped = accelerator._models[-1]
        whole = wrapped.sharding_strategy == ShardingStrategy.NO_SHARD
        shards = 1 if whole else wrapped.process_group.size()
    return accelerator.num_processes / shards


def _whole_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """The gradients of parameters that this process holds whole, None where anything is sharded.

    A model has a thousand of them, each step asks several times, and [`gradient_piece`] costs microseconds for each:
    DeepSpeed marks all its parameters or none, so one is asked; FSDP2's gradients tell by their type.
    """
    if parameters and (hasattr(parameters[0], "_z3_optimizer") or hasattr(parameters[0], "_hp_mapping")):
        return None
    gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    return gradients if all(type(gradient) is Tensor for gradient in gradients) else None


def _pieces(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    whole = _whole_gradients(parameters)
    if whole is not None:
        return whole
    return [piece for parameter in parameters if (piece := gradient_piece(parameter)) is not None]


def _norms(groups: Sequence[list[Tensor]], device: torch.device) -> Tensor:
    """The norm of each group of tensors, [n]: one launch over all tensors and one for each group.

    As `torch.nn.utils.get_total_norm`: the norm of the tensors' norms.
    """
    flat = [piece for own in groups for piece in own]
    if len({(piece.dtype, piece.device) for piece in flat}) > 1:  # a selector of another type, or several devices
        found = torch.stack(
            [torch.nn.utils.get_total_norm(own).to(device) if own else _zero(device) for own in groups]
        )
    elif flat:
        parts = torch.stack(torch._foreach_norm(flat)).split([len(own) for own in groups])
        found = torch.stack([torch.linalg.vector_norm(part) for part in parts]).to(device)
    else:
        found = torch.zeros(len(groups), device=device)
    return found if found.dtype == torch.float64 else found.float()


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), device=device)

"""The competition's part in gradients that are sharded: norms, clipping, what is dropped, and DeepSpeed's step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor import DTensor

from comlora_trl import compat
from comlora_trl.training.sharding.pieces import gradient_piece, put_gradient_piece


def norms(groups: Sequence[Sequence[nn.Parameter]], device: torch.device, accelerator: Accelerator) -> Tensor:
    """Norms of the gradients, in pieces, of groups of parameters, [n], 0 for a group without; called by all processes.

    With DeepSpeed gradients are at hand between backward and step alone (see [`around_step`]).
    """
    pieces = [[piece for parameter in group if (piece := gradient_piece(parameter)) is not None] for group in groups]
    found = torch.stack([_norm(own, device) for own in pieces])
    return (accelerator.reduce(found.square(), reduction="sum") / _replicas(groups, accelerator)).sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies a group's gradients by a factor, in place; each process those that it holds."""
    kept = [(parameter, piece) for parameter in parameters if (piece := gradient_piece(parameter)) is not None]
    if kept:
        compat.foreach_mul_([piece for _, piece in kept], factor.to(kept[0][1].device))
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


def has_sharded_gradients(groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the gradients only, or DeepSpeed holds them."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    return any(compat.trained_by_zero3(p) or compat.zero_mapping(p)[0] for group in groups for p in group)


def _replicas(groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> float:
    """Processes that hold the same piece (hybrid sharding)."""
    shards, first = accelerator.num_processes, groups[0][0]
    if isinstance(first, DTensor):
        placements = zip(first.placements, first.device_mesh.shape, strict=True)
        shards = 1
        for placement, size in placements:
            shards *= size if placement.is_shard() else 1
    elif accelerator.distributed_type == DistributedType.FSDP:
        wrapped = compat.newest_model(accelerator)
        whole = wrapped.sharding_strategy == ShardingStrategy.NO_SHARD
        shards = 1 if whole else wrapped.process_group.size()
    return accelerator.num_processes / shards


def _norm(pieces: list[Tensor], device: torch.device) -> Tensor:
    norm = torch.nn.utils.get_total_norm(pieces) if pieces else torch.zeros((), device=device)
    return norm if norm.dtype == torch.float64 else norm.float()

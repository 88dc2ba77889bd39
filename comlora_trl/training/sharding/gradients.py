"""Work of the competition on sharded gradients: norms, clipping, dropping gradients, and the step of DeepSpeed."""

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
    """The norm of the gradients of each of n groups of parameters. All processes must call this.

    With DeepSpeed, gradients exist only between the backward and the step, see [`around_step`].

    Returns:
        [n]; 0 for a group without gradients.
    """
    pieces = [[piece for parameter in group if (piece := gradient_piece(parameter)) is not None] for group in groups]
    found = torch.stack([_norm(own, device) for own in pieces])
    return (accelerator.reduce(found.square(), reduction="sum") / _replicas(groups, accelerator)).sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies gradients by a factor, in place. Each process does this for the pieces that it holds."""
    kept = [(parameter, piece) for parameter in parameters if (piece := gradient_piece(parameter)) is not None]
    if kept:
        compat.foreach_mul_([piece for _, piece in kept], factor.to(kept[0][1].device))
        for parameter, piece in kept:
            put_gradient_piece(parameter, piece)


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Removes the gradients of parameters. Gradients that DeepSpeed holds are set to zero."""
    for parameter in parameters:
        parameter.grad = None
        piece = gradient_piece(parameter)
        if piece is not None:
            put_gradient_piece(parameter, piece.zero_())


def around_step(engine: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Makes a DeepSpeed engine call functions before and after each of its steps.

    DeepSpeed steps immediately after the backward. Repeated calls for the same engine have no effect.
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
    """Turns off the gradient clipping of a DeepSpeed engine and returns its maximum norm (0 for no clipping)."""
    engine.optimizer.clip_grad = 0.0
    return engine.gradient_clipping()


def has_sharded_gradients(groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the gradients, or DeepSpeed holds them."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    return any(compat.trained_by_zero3(p) or compat.zero_mapping(p)[0] for group in groups for p in group)


def _replicas(groups: Sequence[Sequence[nn.Parameter]], accelerator: Accelerator) -> float:
    """The number of processes that hold the same piece; more than 1 with hybrid sharding."""
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

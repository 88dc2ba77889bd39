"""Where the trained weights and their gradients lie, whoever holds them: the model itself, FSDP, or DeepSpeed.

Adapters and selector are small. So whatever shards the base, their whole values are gathered here for checkpoints and
exports, and loaded from them; and the competition reads and changes gradients here, each process the part it holds.

| | weights | gradients |
|---|---|---|
| one process, DDP | tensors | `.grad`, on every process |
| FSDP2 | DTensors; tensors while gathered | DTensors |
| FSDP1 | pieces of flat vectors, one vector a wrapped module | pieces of flat vectors |
| ZeRO-1, ZeRO-2 | tensors, with float32 masters in pieces | pieces, between backward and step |
| ZeRO-3 | pieces (`ds_tensor`), with float32 masters | pieces, between backward and step |
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, distribute_tensor

# What FSDP1, activation checkpointing and torch.compile put into parameters' names
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def trained_state(
    model: nn.Module, root: nn.Module | None = None, named: Mapping[str, nn.Parameter] | None = None
) -> dict[str, Tensor]:
    """The whole values of all trained parameters, by the names they have in the model, on every process's CPU.

    Every process has to call it.

    Args:
        model: the model with its branches, out of any wrapper.
        root: the wrapped model, which FSDP1 needs before the first forward.
        named: some parameters alone, by their names, which spares a walk through the model; not with FSDP1.
    """
    state: dict[str, Tensor] = {}
    for values in _gathered(model, root, False, named):
        state |= {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
    return state


def state_to_save(model: nn.Module, root: nn.Module | None = None) -> dict[str, Tensor]:
    """[`trained_state`], and the frozen weights where they are whole: PEFT saves embeddings that were resized."""
    state = trained_state(model, root)
    if isinstance(root, FSDP):
        return state
    frozen = {name: p for name, p in model.named_parameters() if not (p.requires_grad or _is_partitioned(p))}
    return {name: value.detach() for name, value in frozen.items()} | state


def reshard(model: nn.Module) -> None:
    """Puts FSDP2's own parameters back, in the place of gathered copies that a forward without a backward leaves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_trained_state(model: nn.Module, values: Mapping[str, Tensor], root: nn.Module | None = None) -> None:
    """Gives parameters the values that [`trained_state`] gathered; every process has to call it, with the same ones.

    Raises:
        ValueError: if a value's shape is another one than its parameter's.
    """
    reshard(model)  # gathered copies would be written in vain
    with torch.no_grad():
        for named in _gathered(model, root, change=True):
            for name in named.keys() & values.keys():
                _write(named[name], values[name], name)


def settle_fsdp(accelerator: Accelerator) -> None:
    """Two settings of accelerate's FSDP that would cost a competition something, changed before the model is wrapped.

    FSDP1 can't load an optimizer's state that it saved in shards; it saves it whole, for it is small. FSDP2 would cast
    what the model puts out to its half precision, the sums among it that the winner is chosen by.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version == 1:
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the new type, then
        plugin.set_state_dict_type("FULL_STATE_DICT")
    elif plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def gathers_by_module(accelerator: Accelerator) -> bool:
    """Whether a weight is at hand only while its own module runs (FSDP1, ZeRO-3), so that no product takes several."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether each process holds a part of the parameters only."""
    return any(_is_partitioned(p) or hasattr(p, "_hp_mapping") or _is_flat(p) for p in parameters)


def norms(
    groups: Sequence[Sequence[nn.Parameter]], device: torch.device, accelerator: Accelerator | None = None
) -> Tensor:
    """Norms of the gradients of groups of parameters, [n], 0 for a group without.

    Where gradients lie in pieces every process has to call it, with the accelerator. With DeepSpeed they are at hand
    between backward and step alone (see [`around_step`]).
    """
    pieces = [[piece for parameter in group if (piece := _piece(parameter)) is not None] for group in groups]
    found = torch.stack([_norm(own, device) for own in pieces])
    if accelerator is None or not _in_pieces(groups, accelerator):
        return found
    return (accelerator.reduce(found.square(), reduction="sum") / _replicas(groups, accelerator)).sqrt()


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scales a group's gradients to a norm of at most `max_norm`, in place, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        norm: of all gradients of the group.
    """
    kept = [(parameter, piece) for parameter in parameters if (piece := _piece(parameter)) is not None]
    if kept:
        # A factor of 1 changes nothing and needs no answer from the device
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([piece for _, piece in kept], factor.to(kept[0][1].device))
        for parameter, piece in kept:
            _put(parameter, piece)


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leaves parameters without a gradient; where DeepSpeed holds it, with zeros."""
    for parameter in parameters:
        parameter.grad = None
        piece = _piece(parameter)
        if piece is not None:
            _put(parameter, piece.zero_())


def zero_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Makes weights zero, and what the optimizer keeps of them; each process those that it holds."""
    with torch.no_grad():
        for parameter in parameters:
            _local(parameter).zero_()
            if hasattr(parameter, "ds_id"):
                parameter.ds_tensor.zero_()
                if hasattr(parameter, "_z3_optimizer"):
                    _deepspeed().safe_set_local_fp32_param(parameter, torch.zeros_like(parameter.ds_tensor))
            elif getattr(parameter, "_hp_mapping", None) is not None:
                parameter._hp_mapping.hp_fragment.zero_()


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


def _gathered(
    model: nn.Module, root: nn.Module | None, change: bool, named: Mapping[str, nn.Parameter] | None = None
) -> Iterator[Mapping[str, Any]]:
    """Trained parameters by name, with their whole values, as many at a time as are gathered together."""
    if isinstance(root, FSDP):
        with FSDP.summon_full_params(root, recurse=False, writeback=False):
            pass  # it becomes the root, which otherwise the first unit asked would
    modules = model.named_modules() if named is None else ()
    units = {name: module for name, module in modules if isinstance(module, FSDP)}
    if isinstance(root, FSDP) or units:
        for prefix, unit in (units | ({"": root} if isinstance(root, FSDP) else {})).items():
            if _trained(unit.module):
                with FSDP.summon_full_params(unit, recurse=False, writeback=change):
                    yield _trained(unit.module, prefix)
        return
    named = _trained(model) if named is None else named
    partitioned = [parameter for parameter in named.values() if hasattr(parameter, "ds_id")]
    with _gathered_zero3(partitioned, change) if partitioned else nullcontext():
        if not change:
            named = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named.items()}
        yield named


def _trained(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """A module's own trained parameters, without those that a wrapper within it holds."""
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and "_fsdp_wrapped_module." not in name:
            name = f"{prefix}.{name}" if prefix else name
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            found[name] = parameter
    return found


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _is_flat(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_fsdp_flattened", False)


def _gathered_zero3(parameters: list[nn.Parameter], change: bool) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if change else None)


def _write(parameter: nn.Parameter, value: Tensor, name: str) -> None:
    if parameter.shape != value.shape:
        raise ValueError(
            f"{name} has the shape {tuple(value.shape)} in the checkpoint and {tuple(parameter.shape)} in the model: "
            "load it with the rank and the base model it was trained with."
        )
    if isinstance(parameter, DTensor):
        # each process cuts its own piece out of the value, which all of them have
        value = value.to(parameter.device, parameter.dtype)
        own = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(own.to_local())
        return
    parameter.copy_(value)
    if hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping"):
        _deepspeed().safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))


def _piece(parameter: nn.Parameter) -> Tensor | None:
    """The part of a parameter's gradient that this process holds, None for none."""
    if hasattr(parameter, "_z3_optimizer"):
        return _deepspeed().safe_get_local_grad(parameter)
    if hasattr(parameter, "_hp_mapping"):
        # safe_get_full_grad would gather each parameter's gradient over all processes
        fragment = parameter._hp_mapping
        return None if fragment is None else fragment.get_lp_grad_fragment(parameter._index_in_param_group)
    return None if parameter.grad is None else _local(parameter.grad)


def _put(parameter: nn.Parameter, piece: Tensor) -> None:
    """Puts back a changed piece, where [`_piece`] may have given a copy."""
    if hasattr(parameter, "_z3_optimizer"):
        _deepspeed().safe_set_local_grad(parameter, piece)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


def _norm(pieces: list[Tensor], device: torch.device) -> Tensor:
    norm = torch.nn.utils.get_total_norm(pieces) if pieces else torch.zeros((), device=device)
    return norm if norm.dtype == torch.float64 else norm.float()


def _deepspeed() -> Any:
    from deepspeed import utils

    return utils

"""The whole values of trained weights, wherever they lie, and weights loaded from them."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, distribute_tensor

from comlora_trl import compat
from comlora_trl.training.sharding.pieces import deepspeed_utils, local

# What FSDP1, activation checkpointing and torch.compile put into parameters' names
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def whole_state(
    model: nn.Module, root: nn.Module | None = None, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The whole values of parameters and buffers, by their names in the model, as copies on every process's CPU.

    Every process has to call it.

    Args:
        model: the model with its branches, out of any wrapper.
        root: the wrapped model, which FSDP1 needs before the first forward.
        names: of the tensors, without any wrapper ([`plain_name`]); None for all trained parameters.
    """
    state: dict[str, Tensor] = {}
    if names is not None:
        buffers = model.named_buffers(remove_duplicate=False)
        state = {own: value for name, value in buffers if (own := plain_name(name)) in names}
        state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    for values in _gathered(model, root, False, names):
        state |= {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
    return state


def plain_name(name: str) -> str:
    """A tensor's name without what FSDP1, activation checkpointing and torch.compile put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def load_trained_state(model: nn.Module, values: Mapping[str, Tensor], root: nn.Module | None = None) -> None:
    """Gives parameters the values that [`whole_state`] gathered; every process has to call it, with the same ones.

    Raises:
        ValueError: if a value's shape is another one than its parameter's, or the model has no such parameter.
    """
    reshard(model)  # gathered copies would be written in vain
    written: set[str] = set()
    with torch.no_grad():
        for named in _gathered(model, root, True, values.keys()):
            for name, parameter in named.items():
                _write(parameter, values[name], name)
            written |= named.keys()
    if missing := values.keys() - written:
        raise ValueError(
            f"the checkpoint has {len(missing)} weights that the model has no parameter for, {min(missing)} say: load "
            "it with the LoRA configuration and the base model it was trained with."
        )


def zero_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Makes weights zero, and what the optimizer keeps of them; each process those that it holds."""
    with torch.no_grad():
        for parameter in parameters:
            local(parameter).zero_()
            if hasattr(parameter, "ds_id"):
                parameter.ds_tensor.zero_()
                if compat.trained_by_zero3(parameter):
                    deepspeed_utils().safe_set_local_fp32_param(parameter, torch.zeros_like(parameter.ds_tensor))
            elif (mapping := compat.zero_mapping(parameter)[1]) is not None:
                mapping.hp_fragment.zero_()


def reshard(model: nn.Module) -> None:
    """Puts FSDP2's own parameters back, in the place of gathered copies that a forward without a backward leaves."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _gathered(
    model: nn.Module, root: nn.Module | None, change: bool, names: Collection[str] | None = None
) -> Iterator[Mapping[str, Any]]:
    """Parameters by name, with their whole values, as many at a time as are gathered together."""
    if isinstance(root, FSDP):
        with FSDP.summon_full_params(root, recurse=False, writeback=False):
            pass  # it becomes the root, which otherwise the first unit asked would
    units = {name: module for name, module in model.named_modules() if isinstance(module, FSDP)}
    if isinstance(root, FSDP) or units:
        for prefix, unit in (units | ({"": root} if isinstance(root, FSDP) else {})).items():
            if _may_hold(unit, names, prefix):
                with FSDP.summon_full_params(unit, recurse=False, writeback=change):
                    yield _wanted(unit.module, names, prefix)
        return
    named = _wanted(model, names)
    partitioned = [parameter for parameter in named.values() if hasattr(parameter, "ds_id")]
    with _gathered_zero3(partitioned, change) if partitioned else nullcontext():
        if not change:
            named = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in named.items()}
        yield named


def _may_hold(unit: FSDP, names: Collection[str] | None, prefix: str) -> bool:
    """Whether an FSDP1 unit is to be gathered; one that keeps a flat parameter alone shows no names until then."""
    place = plain_name(f"{prefix}.") if prefix else ""
    if names is not None and any("_flat_param" in name for name, _ in unit.module.named_parameters()):
        return any(name.startswith(place) for name in names)
    return bool(_wanted(unit.module, names, prefix))


def _wanted(module: nn.Module, names: Collection[str] | None, prefix: str = "") -> dict[str, nn.Parameter]:
    """A module's own parameters of these names, or all trained ones, without those that a wrapper within it holds."""
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=names is None):
        if "_fsdp_wrapped_module." in name:
            continue
        name = plain_name(f"{prefix}.{name}" if prefix else name)
        if parameter.requires_grad if names is None else name in names:
            found[name] = parameter
    return found


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
    if compat.trained_by_zero3(parameter) or compat.zero_mapping(parameter)[0]:
        deepspeed_utils().safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))

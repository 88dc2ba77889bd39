"""Gathers the whole values of trained weights that may be sharded, loads such values, and restores changed weights."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from comlora_trl import compat
from comlora_trl.training.sharding.pieces import deepspeed_utils, local, piece

# The parts that FSDP1, activation checkpointing and torch.compile add to the names of parameters
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def whole_state(
    model: nn.Module, root: nn.Module | None = None, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Gathers the whole values of parameters and buffers. All processes must call this.

    Args:
        model: the model with its branches, without a wrapper.
        root: the wrapped model, which FSDP1 needs before the first forward.
        names: the names of the tensors, see [`plain_name`]; None for all trained parameters.

    Returns:
        copies on the CPU of every process, by their names in the model.
    """
    reshard(model)  # gathered copies may have the lower precision of the forward
    state: dict[str, Tensor] = {}
    if names is not None:
        buffers = model.named_buffers(remove_duplicate=False)
        state = {own: value for name, value in buffers if (own := plain_name(name)) in names}
        state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
    for values in _gathered(model, root, False, names):
        state |= {name: value.detach().to("cpu", copy=True).contiguous() for name, value in values.items()}
    return state


def plain_name(name: str) -> str:
    """A tensor's name without the parts that FSDP1, activation checkpointing and torch.compile add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def load_trained_state(model: nn.Module, values: Mapping[str, Tensor], root: nn.Module | None = None) -> None:
    """Sets parameters to values as [`whole_state`] returns them. All processes must call this with the same values.

    Args:
        model: the model with its branches, without a wrapper.
        values: the values, by their names in the model.
        root: the wrapped model, which FSDP1 needs before the first forward.

    Raises:
        ValueError: if a value has another shape than its parameter, or the model has no such parameter.
    """
    reshard(model)  # values written into gathered copies would be lost
    written: set[str] = set()
    with torch.no_grad():
        for named in _gathered(model, root, True, values.keys()):
            for name, parameter in named.items():
                _write(parameter, values[name], name)
            written |= named.keys()
    if missing := values.keys() - written:
        raise ValueError(
            f"the checkpoint has {len(missing)} weights that the model has no parameter for, such as {min(missing)}: "
            "load it with the LoRA configuration and the base model it was trained with."
        )


def zero_weights(parameters: Iterable[nn.Parameter]) -> None:
    """Sets weights and DeepSpeed's float32 copies of them to zero. Each process does this for its pieces."""
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
    """Replaces gathered copies, which a forward without a backward leaves in FSDP2, by the sharded parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def kept(root: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Within the block, the weights may be changed. Afterwards, they are restored exactly.

    Args:
        root: the model, with or without a wrapper.
        weights: the pieces that this process holds, see [`local`]. Call [`reshard`] before you collect them: they must
            not be gathered copies.

    Yields:
        copies of the weights.
    """
    copies = [weight.clone() for weight in weights]
    try:
        yield copies
    finally:
        reshard(root)  # a forward leaves gathered copies behind, which the next forward would use
        with torch.no_grad():
            for weight, value in zip(weights, copies, strict=True):
                weight.copy_(value)


def _gathered(
    model: nn.Module, root: nn.Module | None, change: bool, names: Collection[str] | None = None
) -> Iterator[Mapping[str, Any]]:
    """Yields parameters by name with their whole values, in groups that are gathered together.

    Args:
        model, root: as for [`whole_state`].
        change: whether the caller changes the values, so that they must be written back.
        names: the names of the parameters; None for all trained ones.
    """
    if isinstance(root, FSDP):
        with FSDP.summon_full_params(root, recurse=False, writeback=False):
            pass  # FSDP1 takes the first unit that is gathered as its root, so this must be the root
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
    """Whether an FSDP1 unit may contain one of the parameters. A flat parameter shows names only when gathered."""
    place = plain_name(f"{prefix}.") if prefix else ""
    if names is not None and any("_flat_param" in name for name, _ in unit.module.named_parameters()):
        return any(name.startswith(place) for name in names)
    return bool(_wanted(unit.module, names, prefix))


def _wanted(module: nn.Module, names: Collection[str] | None, prefix: str = "") -> dict[str, nn.Parameter]:
    """A module's parameters with the given names, or all trained ones, without those in FSDP1 units inside it."""
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
        local(parameter).copy_(piece(value.to(parameter.device, parameter.dtype), parameter))
        return
    parameter.copy_(value)
    if compat.trained_by_zero3(parameter) or compat.zero_mapping(parameter)[0]:
        deepspeed_utils().safe_set_full_fp32_param(parameter, value.to(parameter.device, torch.float32))

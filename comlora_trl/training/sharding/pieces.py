"""What a process holds of a sharded parameter, and how accelerate's sharding is to be set up."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from comlora_trl import compat


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
    return any(is_partitioned(p) or compat.zero_mapping(p)[0] or _is_flat(p) for p in parameters)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether the weight itself lies in pieces that have to be gathered (FSDP2, ZeRO-3)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def gradient_piece(parameter: nn.Parameter) -> Tensor | None:
    """The part of a parameter's gradient that this process holds, None for none."""
    if compat.trained_by_zero3(parameter):
        return deepspeed_utils().safe_get_local_grad(parameter)
    if compat.zero_mapping(parameter)[0]:
        # safe_get_full_grad would gather each parameter's gradient over all processes
        return compat.zero_gradient_piece(parameter)
    return None if parameter.grad is None else local(parameter.grad)


def put_gradient_piece(parameter: nn.Parameter, piece: Tensor) -> None:
    """Puts back a changed piece, where [`gradient_piece`] may have given a copy."""
    if compat.trained_by_zero3(parameter):
        deepspeed_utils().safe_set_local_grad(parameter, piece)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without its history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def deepspeed_utils() -> Any:
    """DeepSpeed's functions on parameters, imported where one of its own is at hand."""
    from deepspeed import utils

    return utils


def _is_flat(parameter: nn.Parameter) -> bool:
    return compat.is_flattened(parameter)

"""The piece of a sharded parameter or gradient that a process holds, and settings of accelerate's FSDP."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from comlora_trl import compat


def settle_fsdp(accelerator: Accelerator) -> None:
    """Changes two settings of accelerate's FSDP, before the model is wrapped.

    FSDP1 can't load an optimizer state that it saved in shards, so the state is saved whole; it is small. FSDP2 would
    cast the model's outputs to half precision, and with them the sums that decide the winner, so this is turned off.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version == 1:
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # set_state_dict_type makes new ones
        plugin.set_state_dict_type("FULL_STATE_DICT")
    elif plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def gathers_by_module(accelerator: Accelerator) -> bool:
    """Whether a weight is whole only while its module runs (FSDP1, ZeRO-3), so that no product can use several."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether each process holds only a part of the parameters or of their float32 copies."""
    return any(is_partitioned(p) or compat.zero_mapping(p)[0] or _is_flat(p) for p in parameters)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether the weight itself is split into pieces that must be gathered (FSDP2, ZeRO-3)."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def gradient_piece(parameter: nn.Parameter) -> Tensor | None:
    """The part of a parameter's gradient that this process holds; None if it holds none."""
    if compat.trained_by_zero3(parameter):
        return deepspeed_utils().safe_get_local_grad(parameter)
    if compat.zero_mapping(parameter)[0]:
        # DeepSpeed's safe_get_full_grad would gather the whole gradient from all processes
        return compat.zero_gradient_piece(parameter)
    return None if parameter.grad is None else local(parameter.grad)


def put_gradient_piece(parameter: nn.Parameter, piece: Tensor) -> None:
    """Writes a changed piece back. It is needed if [`gradient_piece`] has returned a copy (ZeRO-3)."""
    if compat.trained_by_zero3(parameter):
        deepspeed_utils().safe_set_local_grad(parameter, piece)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def piece(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """The part of a parameter's whole value that this process holds. All processes must call this."""
    if not isinstance(parameter, DTensor):
        return value
    # All processes have the whole value, and each of them takes its piece
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def whole(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole value, from the parts that the processes hold as they hold a parameter's. All must call this."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, how = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, how, shape=parameter.shape, stride=parameter.stride()).full_tensor()


def deepspeed_utils() -> Any:
    """DeepSpeed's functions on parameters, imported only if needed, because DeepSpeed may not be installed."""
    from deepspeed import utils

    return utils


def _is_flat(parameter: nn.Parameter) -> bool:
    return compat.is_flattened(parameter)

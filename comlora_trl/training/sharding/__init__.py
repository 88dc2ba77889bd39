"""Access to the trained weights and their gradients under DDP, FSDP and DeepSpeed.

Adapters and selector are small, so their whole values are gathered for checkpoints and exports, and are loaded from
them. The competition reads and changes gradients in pieces: each process handles the part that it holds. This table
shows what a process holds.

| | weights | gradients |
|---|---|---|
| one process, DDP | tensors | `.grad`, on every process |
| FSDP2 | DTensors; tensors while gathered | DTensors |
| FSDP1 | pieces of flat vectors, one vector a wrapped module | pieces of flat vectors |
| ZeRO-1, ZeRO-2 | tensors, with float32 masters in pieces | pieces, between backward and step |
| ZeRO-3 | pieces (`ds_tensor`), with float32 masters | pieces, between backward and step |
"""

from comlora_trl.training.sharding.gradients import (
    around_step,
    drop_gradients,
    has_sharded_gradients,
    norms,
    scale_gradients,
    take_over_clipping,
)
from comlora_trl.training.sharding.pieces import gathers_by_module, is_sharded, local, piece, settle_fsdp, whole
from comlora_trl.training.sharding.weights import (
    kept,
    load_trained_state,
    plain_name,
    reshard,
    whole_state,
    zero_weights,
)

__all__ = [
    "around_step",
    "drop_gradients",
    "gathers_by_module",
    "has_sharded_gradients",
    "is_sharded",
    "kept",
    "load_trained_state",
    "local",
    "norms",
    "piece",
    "plain_name",
    "reshard",
    "scale_gradients",
    "settle_fsdp",
    "take_over_clipping",
    "whole",
    "whole_state",
    "zero_weights",
]

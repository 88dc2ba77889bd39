"""Decides whether a run replays its decoder layers as CUDA graphs, and tells the user what the padding costs."""

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from comlora_trl import compat
from comlora_trl.branches.graphs import CudaGraphs, LayerGraphs
from comlora_trl.branches.model import BranchModel
from comlora_trl.branches.passes import SEPARATELY
from comlora_trl.training.config import packs

_SAMPLE = 2048
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def settle_graphs(model: BranchModel, args: Any, accelerator: Accelerator) -> str | None:
    """Turns on CUDA graphs for a model's decoder layers, if these can be captured.

    When a shape is captured, it is compared with the uncompiled layers, see [`comlora_trl.branches.graphs`].

    Args:
        model: the model with its branches.
        args: the training arguments.
        accelerator: the accelerator.

    Returns:
        a line with the reason why there are no graphs; None if there are, or if the run did not ask for any.
    """
    model.competing.graphs = None
    wanted = args.comlora_graphs
    if wanted is False or (accelerator.device.type != "cuda" and not wanted):
        return None
    reason = why_not(model, args, accelerator)
    if reason is not None:
        return f"comlora_graphs: decoder layers run without CUDA graphs: {reason}."
    model.competing.graphs = LayerGraphs(
        model.competing,
        model.expansion.layers,
        CudaGraphs(accelerator.device),
        lambda line: accelerator.print(line),
        compile_regionally,
    )
    compat.start_compilers()
    return None


def compile_regionally(function: Callable) -> Callable:
    """Compiles a function that runs a decoder layer, once for all layers, lengths and numbers of branches."""
    return torch.compile(function, fullgraph=True)


def why_not(model: BranchModel, args: Any, accelerator: Accelerator) -> str | None:
    """The reason why a run can't capture the decoder layers; None if no reason is known."""
    base, layers = model.get_base_model(), model.expansion.layers
    if accelerator.device.type != "cuda":
        return f"they need an NVIDIA GPU, and the run is on {accelerator.device.type}"
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return f"{accelerator.distributed_type.value} moves the weights"
    if accelerator.num_processes > 1 and args.comlora_graphs is not True:
        return "there are several processes (comlora_graphs=True uses graphs nevertheless)"
    if not layers or model.expansion.place == SEPARATELY:
        return "the branches do not run through one stack of decoder layers together"
    if any(getattr(base.config.get_text_config(), name, None) for name in _EXPERTS):
        return "a router sends tokens to experts"
    if not compat.compiles_whole(base):
        return f"transformers does not declare that {type(base).__name__} compiles without a graph break"
    attention = compat.attention_of(base)
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention!r} is not one of the tested ones (sdpa, eager)"
    if packs(args):
        return "batches without padding differ in length"
    if getattr(args, "activation_offloading", False):
        return "activation_offloading moves tensors that must stay in place for a graph"
    known = {id(layer) for group in model.competing.groups for layer in group.layers if group.is_plain}
    if any(id(layer) not in known for layer in model.adapted_layers):
        return "an adapted layer is quantised, has dropout or is not a plain linear LoRA layer"
    dropout = next((name for layer in layers for name in _dropouts(layer)), None)
    return None if dropout is None else f"{dropout} draws a new dropout mask in each pass"


def _dropouts(layer: nn.Module) -> Any:
    """The names of modules and attributes with dropout in a decoder layer."""
    for name, module in layer.named_modules():
        if compat.is_dropout(module) and module.p > 0:
            yield name
        values = {key: value for key, value in vars(module).items() if "dropout" in key}
        yield from (f"{name}.{key}" for key, value in values.items() if isinstance(value, float) and value > 0)


def padding_line(args: Any, dataset: Any) -> str | None:
    """A line that says what padding to multiples costs, from the lengths in the training set.

    Args:
        args: the training arguments.
        dataset: the prepared training set.

    Returns:
        the line; None without such padding, or if the lengths are not known.
    """
    multiple, sizes = args.pad_to_multiple_of, []
    if not isinstance(multiple, int) or packs(args) or not hasattr(dataset, "column_names"):
        return None
    if not dataset.column_names or "input_ids" not in dataset.column_names or not hasattr(dataset, "__len__"):
        return None
    for example in islice(dataset, _SAMPLE):
        if not isinstance(example, Mapping):
            return None
        sizes.append(min(len(example["input_ids"]), args.max_length or len(example["input_ids"])))
    rows = args.per_device_train_batch_size
    longest = [max(sizes[first : first + rows]) for first in range(0, len(sizes), rows)]
    padded = sum(-(-length // multiple) * multiple for length in longest)
    more = padded / max(sum(longest), 1) - 1
    return (
        f"Batches are padded to multiples of {multiple} tokens (pad_to_multiple_of), so that few CUDA graphs are "
        f"needed: about {100 * more:.0f}% more tokens than with padding to each batch's longest row."
    )

"""Whether a run's decoder layers are replayed as CUDA graphs, and the lengths that batches are padded to for them."""

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
    """Gives the model graphs to replay its decoder layers with, where it is of a kind that can be captured.

    Each shape is compared with the layers as they are when it is captured, see [`comlora_trl.branches.graphs`].

    Returns:
        one line that says why not, None where there are graphs or none were to be expected.
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
    """A function that runs one decoder layer, compiled once for all layers, lengths and numbers of branches."""
    return torch.compile(function, fullgraph=True)


def why_not(model: BranchModel, args: Any, accelerator: Accelerator) -> str | None:
    """Why a model's decoder layers can't be captured in a run, None if they can be tried."""
    base, layers = model.get_base_model(), model.expansion.layers
    if accelerator.device.type != "cuda":
        return f"they need an NVIDIA GPU, and the run is on {accelerator.device.type}"
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return f"{accelerator.distributed_type.value} moves the weights"
    if accelerator.num_processes > 1 and args.comlora_graphs is not True:
        return "several processes (comlora_graphs=True asks for them nevertheless)"
    if not layers or model.expansion.place == SEPARATELY:
        return "the branches do not run through one stack of decoder layers together"
    if any(getattr(base.config.get_text_config(), name, None) for name in _EXPERTS):
        return "a router sends tokens to experts"
    if not compat.compiles_whole(base):
        return f"transformers does not hold {type(base).__name__} for compilable as a whole"
    attention = compat.attention_of(base)
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention!r} is not among those that were tried (sdpa, eager)"
    if packs(args):
        return "batches without padding differ in length"
    if getattr(args, "activation_offloading", False):
        return "activation_offloading moves what a graph has to keep in place"
    known = {id(layer) for group in model.competing.groups for layer in group.layers if group.is_plain}
    if any(id(layer) not in known for layer in model.adapted_layers):
        return "an adapted layer is quantised, has dropout or is no plain linear LoRA"
    dropout = next((name for layer in layers for name in _dropouts(layer)), None)
    return None if dropout is None else f"{dropout} draws new numbers in each pass"


def _dropouts(layer: nn.Module) -> Any:
    """Names of what draws dropout in a decoder layer."""
    for name, module in layer.named_modules():
        if compat.is_dropout(module) and module.p > 0:
            yield name
        values = {key: value for key, value in vars(module).items() if "dropout" in key}
        yield from (f"{name}.{key}" for key, value in values.items() if isinstance(value, float) and value > 0)


def padding_line(args: Any, dataset: Any) -> str | None:
    """A line on what padding to multiples costs, from lengths in the training set; None without such padding."""
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
        f"Batches are padded to multiples of {multiple} tokens (pad_to_multiple_of), so that lengths and CUDA graphs "
        f"are few: about {100 * more:.0f}% more tokens than padding to each batch's longest row."
    )

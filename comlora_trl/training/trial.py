"""A trial before training: tiny passes over random tokens find out where the batch can be repeated for K branches."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, send_to_device
from torch.nn.utils.rnn import pad_sequence

from comlora_trl.branches.passes import SEPARATELY
from comlora_trl.branches.trial import first_line, ignores_padding, settle_expansion
from comlora_trl.training.competition import ROWS_PER_LINE
from comlora_trl.training.model import ComLoRAModel

logger = get_logger(__name__)

# The lengths of the lines in the trial's batches. There are two numbers of lines, because a dimension that equals one
# of them by chance will not equal the other
_LENGTHS = ((7, 4), (5, 8, 6))
_TOKENS = 64  # token ids are drawn below this number, or below the size of a smaller vocabulary

_UNTRIED = "no tiny pass was made before training, so the batch is assumed to widen {}."


def try_branches(
    model: ComLoRAModel, collator: Callable, accelerator: Accelerator, packed: bool, router_loss: bool
) -> str:
    """Decides where the model's batch is repeated for the K branches, see [`settle_expansion`].

    The trial runs on the main process, and all processes get the result.

    Args:
        model: the model with its branches.
        collator: the run's collator. If it does not accept token ids and labels, plain padded batches are used.
        accelerator: the accelerator.
        packed: whether the run's batches are padding-free.
        router_loss: whether the run adds the load-balancing loss of a mixture of experts.

    Returns:
        one of `passes.PLACES`.

    Raises:
        ValueError: if the model can't run with branches, or not with this kind of distributed training.
    """
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        logger.warning(f"ZeRO-3 partitions the weights: {_UNTRIED.format(model.expansion.place)}")
        return model.expansion.place
    found: list[Any] = [model.expansion.place, None, None]
    # Only a single process on a GPU leaves the mask out
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cuda" and not router_loss
    if accelerator.is_main_process:
        if any(parameter.is_meta for parameter in model.parameters()):
            logger.warning(f"the weights are not loaded yet: {_UNTRIED.format(model.expansion.place)}")
        else:
            batches = _made_up_batches(model, collator, packed, router_loss)
            try:
                found[0] = settle_expansion(model, batches)
                found[1] = model.expansion.batched
                model.expansion.ignores_padding = alone and ignores_padding(model, batches)
            except ValueError as error:
                found[2] = _with_its_cause(error, model, batches) if router_loss else error
    if accelerator.num_processes > 1:
        found = broadcast_object_list(found)
    place, batched, error = found
    if error is not None:
        raise error
    model.expansion.place, model.expansion.batched = place, batched
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if place == SEPARATELY and sharded and model.k > 1:
        raise ValueError(
            f"the branches of {type(model.get_base_model()).__name__} can only run one after the other, each with its "
            f"own backward pass, which {accelerator.distributed_type.value} does not go with: use a single process or "
            "DDP, or other target_modules."
        )
    return place


def _with_its_cause(error: ValueError, model: ComLoRAModel, batches: list[dict[str, Any]]) -> ValueError:
    """The error itself or, if the model runs without its routers' loss, one that says how to turn this loss off."""
    try:
        settle_expansion(model, [batch | {"output_router_logits": False} for batch in batches])
    except ValueError:
        return error
    name, cause = type(model.get_base_model()).__name__, error.__cause__
    found = f"{type(cause).__name__} ({first_line(cause)})"
    return ValueError(
        f"the routers' loss of {name} ends in {found}, in TRL's own trainer too: set router_aux_loss_coef=0.0 to "
        "train without it."
    )


def _made_up_batches(model: ComLoRAModel, collator: Callable, packed: bool, router_loss: bool) -> list[dict[str, Any]]:
    """Two padded batches of random tokens, and a packed one if the run packs."""
    embeddings = model.get_base_model().get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    batches = []
    for lengths in _LENGTHS:
        lines = [torch.randint(min(_TOKENS, len(embeddings)), (length,), generator=draw) for length in lengths]
        examples = [{"input_ids": line.tolist(), "labels": line.tolist()} for line in lines]
        own = _collated(collator, examples)
        if packed or own is None:
            batches.append(_padded(lines))
        if own is not None:
            batches.append(own)
    if router_loss:
        batches = [batch | {"output_router_logits": True} for batch in batches]
    return [send_to_device(batch, embeddings.device) for batch in batches]


def _collated(collator: Callable, examples: list[dict[str, list[int]]]) -> dict[str, Any] | None:
    try:
        batch = dict(collator(examples))
    except Exception:  # a user's collator may need other columns
        return None
    batch.pop(ROWS_PER_LINE, None)
    return batch if {"input_ids", "labels"} <= batch.keys() else None


def _padded(lines: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    mask = pad_sequence([torch.ones_like(line) for line in lines], batch_first=True)
    return {
        "input_ids": pad_sequence(lines, batch_first=True),
        "attention_mask": mask,
        "labels": pad_sequence(lines, batch_first=True, padding_value=-100),
    }

"""A mixture of experts' load-balancing loss, branch by branch.

The loss is a product of means over a batch's tokens, so that of K branches' tokens together is not theirs. Each branch
is given its own, on its own tokens, as if it ran alone.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from comlora_trl.branches.passes import Pass


def keep_router_logits(output: Any, one: Pass) -> None:
    """The pass keeps the routers' logits of all branches, from the backbone's output.

    Where the batch widened inside the backbone the first branch's alone go on to the LM head, whose own loss would not
    fit them to the attention mask of one.
    """
    logits = getattr(output, "router_logits", None)
    if not logits:
        return
    one.router_logits = tuple(logits)
    if one.copies > 1 and not one.inputs_are_wide:
        tokens = max(layer.size(0) for layer in logits) // one.copies
        output.router_logits = tuple(layer[:tokens] for layer in logits)


def router_losses(model: PreTrainedModel, one: Pass, inputs: dict[str, Any]) -> Tensor | None:
    """The load-balancing loss of each of the pass's n branches, [n], or None for a model without routers.

    Args:
        inputs: the batch before it was widened.
    """
    logits, one.router_logits = one.router_logits, None
    if logits is None:
        return None
    config, branches = model.config.get_text_config(), len(one.names)
    masks = [inputs.get("attention_mask")] * branches
    if one.copies < branches and masks[0] is not None:
        masks = masks[0].chunk(branches)  # rows dealt out among the branches
    wide = max(layer.size(0) for layer in logits)
    # Layers below the first adapter run once for all branches
    by_branch = [layer.chunk(branches) if layer.size(0) == wide else [layer] * branches for layer in logits]
    losses = [
        load_balancing_loss_func(tuple(own), config.num_experts, config.num_experts_per_tok, mask)
        for *own, mask in zip(*by_branch, masks, strict=True)
    ]
    return torch.stack(losses)

"""Gradients branch by branch: norms, clipping as of K independent LoRAs, and what happens to one that diverges."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft.tuners.lora import LoraLayer
from torch import Tensor

from comlora_trl.branches.model import branch_name
from comlora_trl.training import sharding
from comlora_trl.training.model import ComLoRAModel

logger = get_logger(__name__)


def gradient_norms(model: ComLoRAModel, accelerator: Accelerator | None = None) -> Tensor:
    """The norm of each branch's gradient and, last, the selector's, [K + 1]; 0 without a gradient.

    All of them cost what one norm of everything costs. Where gradients are sharded every process has to call it, with
    the accelerator.
    """
    groups = [model.branch_parameters(branch) for branch in range(model.settings.k)]
    groups.append([] if model.selector is None else list(model.selector.parameters()))
    return sharding.norms(groups, model.device, accelerator)


def clip_gradients(model: ComLoRAModel, norms: Tensor, max_norm: float) -> Tensor:
    """Scales each branch's gradient, and the selector's, to a norm of at most `max_norm`, each by itself.

    So a branch trains as it would alone, and a huge finite gradient of one leaves the others as they are.

    Args:
        norms: of [`gradient_norms`].

    Returns:
        the norm of the branches' gradients together, before clipping.
    """
    for branch in range(model.settings.k):
        sharding.clip(model.branch_parameters(branch), norms[branch], max_norm)
    if model.selector is not None:
        sharding.clip(model.selector.parameters(), norms[-1], max_norm)
    return norms[:-1].norm()


def disqualify(model: ComLoRAModel, branch: int, step: int) -> None:
    """Takes a branch out of the competition for good, at the step that is being made.

    From here on it does not run, and its adapter is the base model.
    """
    model.competition_state.disqualified[branch] = step
    logger.warning(f"branch_{branch} has diverged at step {step} and is disqualified: the others go on without it.")
    make_base(model, branch)


def revive(model: ComLoRAModel, branches: Iterable[int]) -> None:
    """Draws new adapters for branches that were disqualified: a new competition begins."""
    for branch in branches:
        if sharding.is_sharded(model.branch_parameters(branch)):
            raise ValueError(
                f"branch_{branch} has diverged in this trainer's last training, and its weights are sharded: make a "
                "new trainer for a new competition."
            )
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters(branch_name(branch), init_lora_weights=True)


@torch.no_grad()
def make_base(model: ComLoRAModel, branch: int) -> None:
    """Makes a branch's adapter the base model itself, with nothing non-finite left in it."""
    name = branch_name(branch)
    sharding.zero_weights(model.branch_parameters(branch))
    if sharding.is_sharded(model.branch_parameters(branch)):
        return  # the base's norms would have to be gathered, for a branch that never runs again
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_magnitude_vector:
            # DoRA scales each output by its magnitude over the weight's norm: with B = 0 that is the base's own norm
            magnitude, base = layer.lora_magnitude_vector[name], layer.get_base_layer()
            parameter = magnitude.weight
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            magnitude.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[name])
            parameter.copy_(magnitude.weight)
            magnitude.weight = parameter  # the optimizer's


def drop_selector_gradient(model: ComLoRAModel, step: int) -> None:
    """Leaves the selector as it is for one step, its gradient not being finite; the branches do not depend on it."""
    logger.warning(f"the selector's gradient is not finite at step {step}: it is left out of this step.")
    sharding.drop_gradients(model.selector.parameters())

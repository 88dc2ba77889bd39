"""What happens to a branch that diverges: it is seen by its gradients, and then computes what the base model does."""

import torch
from accelerate.logging import get_logger
from torch import Tensor

from comlora_trl.training.model import ComLoRAModel

logger = get_logger(__name__)


def non_finite_gradients(model: ComLoRAModel) -> Tensor:
    """bool [K]: branches with a gradient that is not finite."""
    flags = []
    for branch in range(model.settings.k):
        parameters = model.branch_parameters(branch)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else parameters[0].new_zeros(())
        flags.append(~norm.isfinite())
    return torch.stack(flags)


def disqualify(model: ComLoRAModel, branch: int, step: int) -> None:
    """Takes a branch out of the competition for good, at the step that is being made.

    Its parameters become zero: from here on it computes what the base model does, and nothing non-finite is left.
    """
    model.competition_state.disqualified[branch] = step
    logger.warning(f"branch_{branch} has diverged at step {step} and is disqualified: the others go on without it.")
    with torch.no_grad():
        for parameter in model.branch_parameters(branch):
            parameter.zero_()

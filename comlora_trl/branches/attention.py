"""What attention costs besides its arithmetic: plans for each length, and masks that say nothing new."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Batches are padded to multiples of this length on a GPU, so that lengths, and with them graphs and plans, are few
LENGTHS = 64
# Up to this length another kernel than cuDNN's computes attention: cuDNN builds a plan for each new shape, which takes
# seconds, and attention over short rows is a small part of a step
_LONGEST_WITHOUT_PLANS = 1024


@contextmanager
def without_plans(tokens: Tensor) -> Iterator[None]:
    """Inside, PyTorch's attention leaves cuDNN out where its plans cost more than they gain.

    Args:
        tokens: the batch, [B, T].
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    if not (enabled and tokens.is_cuda and tokens.size(1) <= _LONGEST_WITHOUT_PLANS):
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def is_padded_right(mask: Tensor | None) -> bool:
    """Whether a mask [B, T] has its padding behind each row's tokens, if it has any."""
    if mask is None or mask.dim() != 2:
        return False
    return bool((mask[:, 1:] <= mask[:, :-1]).all())

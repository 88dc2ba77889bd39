"""Support for several branches in LoRA-FA's optimizer (PEFT's `create_lorafa_optimizer`), which freezes all A."""

import re
from typing import Any

from peft.optimizers.lorafa import LoraFAOptimizer


def pair_branches(optimizer: Any, rungs: str | None = None) -> None:
    """Reorders the parameters of a LoRA-FA optimizer, so that A and B of a branch follow each other in each layer.

    The optimizer assumes that two consecutive adapter parameters are A and B of one layer, and it stores their moments
    by the layer's name. In a model with branches, all A of a layer come before all B, and each layer has several
    adapters. Other optimizers are not changed.

    Args:
        optimizer: the optimizer, possibly in accelerate's wrapper.
        rungs: the run's `comlora_rungs`.

    Raises:
        ValueError: if there are rungs. The optimizer finds layers by position, so no parameter may be removed.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(optimizer, LoraFAOptimizer):
        return
    if rungs:
        raise ValueError(
            f"comlora_rungs={rungs!r} does not go with LoRA-FA's optimizer, which also needs the gradients of retired "
            "branches: leave one of them out."
        )
    for group in optimizer.param_groups:
        entries = list(zip(group["names"], group["params"], group["scaling_factors"], strict=True))
        others = [entry for entry in entries if "lora" not in entry[0]]
        adapters = sorted((entry for entry in entries if "lora" in entry[0]), key=lambda entry: _layer(entry[0]))
        renamed = [(_with_branch_first(name), *rest) for name, *rest in adapters]
        group["names"], group["params"], group["scaling_factors"] = map(list, zip(*renamed, *others, strict=True))


def _layer(name: str) -> tuple[str, str]:
    """The branch and the layer of an adapter parameter, from its name."""
    branch = re.search(r"branch_\d+", name)
    return (branch.group() if branch else "", name.partition("lora")[0])


def _with_branch_first(name: str) -> str:
    branch, _ = _layer(name)
    return name if name.startswith(branch) else f"{branch}.{name}"

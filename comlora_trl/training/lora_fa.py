"""LoRA-FA's optimizer (PEFT's `create_lorafa_optimizer`, every A frozen) over several branches."""

import re
from typing import Any

from peft.optimizers.lorafa import LoraFAOptimizer


def pair_branches(optimizer: Any, rungs: str | None = None) -> None:
    """Puts each branch's A and B beside each other in a LoRA-FA optimizer; any other one is left alone.

    It takes two adapter parameters in a row for a layer's A and B, and keeps their moments under the layer's name. A
    model with branches has all A of a layer before all B, and every layer once for each branch.

    Raises:
        ValueError: if rungs retire branches: the optimizer knows a layer by its place among all of them.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(optimizer, LoraFAOptimizer):
        return
    if rungs:
        raise ValueError(
            f"comlora_rungs={rungs!r} does not go with LoRA-FA's optimizer, which can't do without a retired branch's "
            "gradients: leave one of them out."
        )
    for group in optimizer.param_groups:
        entries = list(zip(group["names"], group["params"], group["scaling_factors"], strict=True))
        others = [entry for entry in entries if "lora" not in entry[0]]
        adapters = sorted((entry for entry in entries if "lora" in entry[0]), key=lambda entry: _layer(entry[0]))
        renamed = [(_with_branch_first(name), *rest) for name, *rest in adapters]
        group["names"], group["params"], group["scaling_factors"] = map(list, zip(*renamed, *others, strict=True))


def _layer(name: str) -> tuple[str, str]:
    """The branch and the layer of an adapter's parameter."""
    branch = re.search(r"branch_\d+", name)
    return (branch.group() if branch else "", name.partition("lora")[0])


def _with_branch_first(name: str) -> str:
    branch, _ = _layer(name)
    return name if name.startswith(branch) else f"{branch}.{name}"

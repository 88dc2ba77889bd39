"""What a competition asks of an optimizer: its evaluation weights, and the learning rate of each branch.

The optimizer may be the Trainer's or the user's, and wrapped by accelerate. Its parameter groups are the only source
of the rates that a run reports.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from comlora_trl.training.sharding import is_sharded, reshard
from comlora_trl.training.sharding.pieces import local

# The key of a parameter group that names the branch, or the selector, that all of its parameters belong to
OWNER = "comlora_owner"
SELECTOR = "selector"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, out of accelerate's wrapper, which has every method that any optimizer has."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


# ---- Evaluation weights ----


def has_evaluation_weights(optimizer: Any) -> bool:
    """Whether an optimizer evaluates other weights than those it trains, as schedule-free ones do."""
    own = unwrapped(optimizer)
    return any(
        callable(getattr(one, "train", None)) and callable(getattr(one, "eval", None))
        for one in (own, getattr(own, "optimizer", None))  # DeepSpeed's holds the one that it was given
    )


def enter_evaluation_weights(optimizer: Any, model: nn.Module) -> None:
    """Gives the model the optimizer's evaluation weights, until the Trainer's next training step.

    The Trainer does the same before it evaluates. A checkpoint that is saved now resumes bit by bit: the next training
    step turns these weights into the training iterate, in the run that goes on and in the one that resumes.
    """
    if has_evaluation_weights(optimizer):
        reshard(model)  # FSDP2's gathered copies would keep the old values
        optimizer.eval()


@contextmanager
def evaluation_weights(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """The optimizer's evaluation weights within the block, and afterwards the training iterate, bit by bit.

    An optimizer that is in evaluation mode stays in it. One without evaluation weights is left alone.

    Args:
        optimizer: may be None, before training.
        model: the model that the optimizer trains, wrapped or not.
    """
    if not has_evaluation_weights(optimizer):
        yield
        return
    reshard(model)
    groups = unwrapped(optimizer).param_groups
    weights = [local(parameter) for group in groups for parameter in group["params"]]
    iterate = [weight.clone() for weight in weights]
    trains = any(group.get("train_mode") for group in groups)
    optimizer.eval()
    trains |= not all(map(torch.equal, weights, iterate))  # an optimizer may keep its mode elsewhere
    try:
        yield
    finally:
        reshard(model)  # a forward leaves copies behind, which the next one would take for the weights
        if trains:
            optimizer.train()
            with torch.no_grad():
                for weight, value in zip(weights, iterate, strict=True):
                    weight.copy_(value)  # the way there and back rounds


def forget_state(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Removes what an optimizer with evaluation weights keeps of parameters that another hand has set.

    Otherwise its next change between training and evaluation moves them towards what it remembers.
    """
    if not has_evaluation_weights(optimizer):
        return
    state = unwrapped(optimizer).state
    for parameter in parameters:
        if is_sharded([parameter]):  # its entries are part of a sharded checkpoint
            for value in state.get(parameter, {}).values():
                if torch.is_tensor(value):
                    local(value).zero_()
        else:
            state.pop(parameter, None)


# ---- Learning rates ----


def group_by_owner(
    optimizer: torch.optim.Optimizer,
    owners: Mapping[int, str],
    rates: Mapping[str, float | None],
    learning_rate: float,
) -> None:
    """Splits an optimizer's groups, so that each holds parameters of one branch or of the selector, at its rate.

    Groups of one branch keep the ratio of their rates, as LoRA+ has it for A and B.

    Args:
        owners: the branch's name, or "selector", by the parameter's id.
        rates: by owner; None for the rates that the groups have.
        learning_rate: the one in the groups that `rates` stand for, where the groups have several.

    Raises:
        ValueError: if the groups have several rates and none of them is `learning_rate`.
    """
    found = [float(group["lr"]) for group in optimizer.param_groups]
    base = learning_rate if learning_rate in found else found[0]
    if any(rate is not None for rate in rates.values()) and base != learning_rate and len(set(found)) > 1:
        raise ValueError(
            f"the optimizer's groups have the rates {_listed(sorted(set(found)))}, none of them "
            f"learning_rate={learning_rate:g}: rates of branches are relative to it; set learning_rate to one of them."
        )
    split = []
    for group in optimizer.param_groups:
        own = {owner: [p for p in group["params"] if owners.get(id(p)) == owner] for owner in rates}
        branches = any(own[owner] for owner in rates if owner != SELECTOR)
        for owner, rate in rates.items():
            # A retired branch's group stays, empty, where the others have theirs: the schedule counts groups. One
            # that never had a parameter would be lost in a sharded checkpoint, which names groups by parameters
            if not own[owner] and (owner == SELECTOR or not branches):
                continue
            lr = group["lr"] if rate is None else rate * (float(group["lr"]) / base)
            split.append({**group, "params": own[owner], "lr": lr, OWNER: owner})
        if others := [p for p in group["params"] if p.requires_grad and id(p) not in owners]:
            split.append({**group, "params": others})
    optimizer.param_groups.clear()
    for group in split:
        optimizer.add_param_group(group)


def steps_by_itself(optimizer: Any) -> bool:
    """Whether an optimizer steps within the backward, so that its groups do not say how (LOMO, layer-wise ones)."""
    own = unwrapped(optimizer)
    return hasattr(own, "optimizer_dict") or type(own).__module__.split(".")[0] == "lomo_optim"


def groups_of_owners(optimizer: Any, owners: Mapping[int, str]) -> dict[str, list[dict[str, Any]]]:
    """The parameter groups that train each branch, and the selector; several where a branch is spread over them.

    Args:
        owners: the branch's name, or "selector", by the parameter's id.
    """
    own = unwrapped(optimizer)
    layers = getattr(own, "optimizer_dict", None)  # one optimizer for each parameter
    groups = own.param_groups if layers is None else [group for one in layers.values() for group in one.param_groups]
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        names = {group[OWNER]} if OWNER in group else {owners[id(p)] for p in group["params"] if id(p) in owners}
        for name in names:
            found.setdefault(name, []).append(group)
    return found


def peak_rate(group: Mapping[str, Any]) -> float:
    """The rate that a group's schedule is a share of; without a schedule the rate itself."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))  # OneCycleLR has the first


def same_rate(first: float | None, second: float | None) -> bool:
    """Whether two rates are equal, up to rounding."""
    if first is None or second is None:
        return first is second
    return abs(first - second) <= 1e-6 * max(abs(first), abs(second))


def untrained(optimizer: Any, parameters: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, int]:
    """How many parameters of each owner no group of the optimizer holds; owners that miss none are left out."""
    own = unwrapped(optimizer)
    known = {id(p) for group in own.param_groups for p in group["params"]}
    known |= {id(p) for p in getattr(own, "optimizer_dict", None) or ()}
    missed = {name: sum(p.requires_grad and id(p) not in known for p in ps) for name, ps in parameters.items()}
    return {name: count for name, count in missed.items() if count}


def told_settings(optimizer: Any) -> dict[str, Any]:
    """What a run's record tells of an optimizer that the user made, in the place of the arguments' settings."""
    own = unwrapped(optimizer)
    decays = {group.get("weight_decay") for group in own.param_groups}
    settings: dict[str, Any] = {"optim": f"{type(own).__module__}.{type(own).__qualname__}"}
    return settings | {"weight_decay": decays.pop() if len(decays) == 1 else None}


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)

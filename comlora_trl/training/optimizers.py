"""The optimizer's part in a competition: its evaluation weights, and the learning rate of each branch.

The optimizer may be made by the Trainer or by the user, and may be in accelerate's wrapper. The rates that a run
reports are always read from the optimizer's parameter groups.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from comlora_trl.branches.model import branch_name
from comlora_trl.training.config import CompetitionConfig
from comlora_trl.training.lora_fa import pair_branches
from comlora_trl.training.model import ComLoRAModel
from comlora_trl.training.sharding import is_sharded, kept, local, reshard

# The key of a parameter group for its owner: the name of the branch that all its parameters belong to, or SELECTOR
OWNER = "comlora_owner"
SELECTOR = "selector"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper. The wrapper always has the methods `train` and `eval`."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


# ---- Evaluation weights ----


def has_evaluation_weights(optimizer: Any) -> bool:
    """Whether an optimizer has separate weights for evaluation, as schedule-free optimizers do."""
    own = unwrapped(optimizer)
    return any(
        callable(getattr(one, "train", None)) and callable(getattr(one, "eval", None))
        for one in (own, getattr(own, "optimizer", None))  # DeepSpeed's optimizer contains the given one
    )


def enter_evaluation_weights(optimizer: Any, model: nn.Module) -> None:
    """Switches the model to the optimizer's evaluation weights, until the Trainer's next training step.

    The Trainer does the same before an evaluation. A run that resumes from a checkpoint saved now gives exactly the
    same numbers as the run that continues, because both convert these weights back into the training weights at their
    next step.
    """
    if has_evaluation_weights(optimizer):
        reshard(model)  # otherwise the gathered copies of FSDP2 would keep the old values
        optimizer.eval()


@contextmanager
def evaluation_weights(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """Within the block, the model has the optimizer's evaluation weights. Afterwards, the training weights are
    restored exactly.

    An optimizer that is already in evaluation mode stays in it. Optimizers without evaluation weights are not changed.

    Args:
        optimizer: the optimizer; None before training.
        model: the model that the optimizer trains, with or without a wrapper.
    """
    if not has_evaluation_weights(optimizer):
        yield
        return
    reshard(model)
    groups = unwrapped(optimizer).param_groups
    weights = [local(parameter) for group in groups for parameter in group["params"]]
    trains = any(group.get("train_mode") for group in groups)
    with kept(model, weights) as iterate:  # optimizer.train() alone would leave rounding errors
        optimizer.eval()
        trains |= not all(map(torch.equal, weights, iterate))  # not all optimizers store their mode in the groups
        try:
            yield
        finally:
            if trains:
                optimizer.train()


def forget_state(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Removes the state of parameters that were set from outside, in an optimizer with evaluation weights.

    Otherwise the next switch between training and evaluation would move these parameters towards the old state.
    """
    if not has_evaluation_weights(optimizer):
        return
    state = unwrapped(optimizer).state
    for parameter in parameters:
        if is_sharded([parameter]):  # the entries must exist, because they are part of a sharded checkpoint
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
    """Splits an optimizer's groups, so that each group has parameters of one owner only, and sets the owners' rates.

    The groups of one branch keep the ratio of their rates. LoRA+, for example, has different rates for A and B.

    Args:
        optimizer: the optimizer.
        owners: the owner of each parameter by the parameter's id: the name of a branch, or "selector".
        rates: the learning rate of each owner; None to keep the rates of the groups.
        learning_rate: the rate in the groups that `rates` replace. Groups with another rate keep their ratio to it.

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
            # The group of a retired branch is kept without parameters, because the schedule has one entry for each
            # group. Groups that no branch has parameters in are left out: a sharded checkpoint would lose them
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
    """Whether an optimizer takes its steps during the backward pass, as LOMO and layer-wise optimizers do.

    The groups of such an optimizer do not determine its learning rates.
    """
    own = unwrapped(optimizer)
    return hasattr(own, "optimizer_dict") or type(own).__module__.split(".")[0] == "lomo_optim"


def groups_of_owners(optimizer: Any, owners: Mapping[int, str]) -> dict[str, list[dict[str, Any]]]:
    """The parameter groups of each owner. A branch may have several groups.

    Args:
        optimizer: the optimizer.
        owners: the owner of each parameter by the parameter's id: the name of a branch, or "selector".
    """
    own = unwrapped(optimizer)
    layers = getattr(own, "optimizer_dict", None)  # layer-wise: one optimizer for each parameter
    groups = own.param_groups if layers is None else [group for one in layers.values() for group in one.param_groups]
    found: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        names = {group[OWNER]} if OWNER in group else {owners[id(p)] for p in group["params"] if id(p) in owners}
        for name in names:
            found.setdefault(name, []).append(group)
    return found


def peak_rate(group: Mapping[str, Any]) -> float:
    """The peak learning rate of a group's schedule; without a schedule, the group's rate."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))  # OneCycleLR sets max_lr


def same_rate(first: float | None, second: float | None) -> bool:
    """Whether two rates are equal up to rounding, or both None."""
    if first is None or second is None:
        return first is second
    return abs(first - second) <= 1e-6 * max(abs(first), abs(second))


def untrained(optimizer: Any, parameters: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, int]:
    """For each owner, how many of its trained parameters are in no group of the optimizer; owners with 0 are left out.

    Args:
        optimizer: the optimizer.
        parameters: the parameters of each owner.
    """
    own = unwrapped(optimizer)
    known = {id(p) for group in own.param_groups for p in group["params"]}
    known |= {id(p) for p in getattr(own, "optimizer_dict", None) or ()}
    missed = {name: sum(p.requires_grad and id(p) not in known for p in ps) for name, ps in parameters.items()}
    return {name: count for name, count in missed.items() if count}


def told_settings(optimizer: Any) -> dict[str, Any]:
    """The settings of an optimizer that the user made. They replace those of the arguments in a run's record."""
    own = unwrapped(optimizer)
    decays = {group.get("weight_decay") for group in own.param_groups}
    settings: dict[str, Any] = {"optim": f"{type(own).__module__}.{type(own).__qualname__}"}
    return settings | {"weight_decay": decays.pop() if len(decays) == 1 else None}


class BranchRates:
    """The learning rates of the branches: those that the options ask for, and those that the optimizer has.

    Args:
        model: the branches and the selector.
        args: the run's configuration.

    Attributes:
        made: whether the Trainer made an optimizer.
        given: whether the user gave an optimizer.
        peaks: peak rate of each branch, from the first of its groups; None if it is not known.
        texts: peak rates of all groups of each branch, as text.
        used: rate of each branch in the newest optimizer step.
    """

    def __init__(self, model: ComLoRAModel, args: CompetitionConfig) -> None:
        self.model, self.args = model, args
        self.made = self.given = False
        self.peaks: list[float | None] = []
        self.texts: list[str] = []
        self.used: dict[int, float] = {}
        self._groups: dict[int, dict[str, Any]] = {}

    # ---- The optimizer's groups ----

    def take(self, optimizer: Any, existed: bool) -> None:
        """Takes the result of `create_optimizer`, and splits its groups by branch if the options ask for rates.

        Args:
            optimizer: the optimizer.
            existed: whether the optimizer existed before `create_optimizer` was called.

        Raises:
            ValueError: if the optimizer does not work with the options.
        """
        pair_branches(optimizer, self.args.comlora_rungs)
        if existed:
            self.given |= not self.made
            return
        self.made = True
        asked = self.asked()
        if any(rate is not None for rate in asked.values()) and not steps_by_itself(optimizer):
            group_by_owner(optimizer, self._parameter_owners(), asked, self.args.learning_rate)

    def forget(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        """Removes deleted parameters and their state from an optimizer."""
        gone = {id(parameter): parameter for parameter in parameters}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in gone.values():
            optimizer.state.pop(parameter, None)

    def asked(self) -> dict[str, float | None]:
        """The rates that the options ask for, by owner; None for an owner without an option."""
        rates = self.args.comlora_branch_learning_rates or [None] * self.model.k
        selector = {} if self.model.selector is None else {SELECTOR: self.args.comlora_selector_learning_rate}
        return dict(zip(self.model.branch_names, rates, strict=True)) | selector

    def _owned_parameters(self) -> dict[str, list[nn.Parameter]]:
        owned = {name: self.model.branch_parameters(branch) for branch, name in enumerate(self.model.branch_names)}
        return owned | ({} if self.model.selector is None else {SELECTOR: self.model.selector_parameters()})

    def _parameter_owners(self) -> dict[int, str]:
        return {id(p): name for name, parameters in self._owned_parameters().items() for p in parameters}

    # ---- The rates of the run ----

    def settle(
        self,
        optimizer: Any,
        living: Sequence[int],
        resumed: Sequence[float] | None = None,
        goes_on: bool = False,
        deepspeed: Mapping[str, Any] | None = None,
        fsdp: bool = False,
    ) -> list[float] | None:
        """Reads the rates of the branches from the optimizer's groups, at the start of training.

        Args:
            optimizer: the optimizer.
            living: the branches that train.
            resumed: the rates in the checkpoint's state; None for a new run.
            goes_on: whether the run continues from a checkpoint.
            deepspeed: DeepSpeed's configuration; None without DeepSpeed.
            fsdp: whether FSDP is in use.

        Returns:
            the peak rate of each branch. None if all branches have the same rate and the options don't ask for rates,
            or if a rate is not known.

        Raises:
            ValueError: if the optimizer does not train a living branch or the selector, or has other rates than the
                options ask for.
        """
        if deepspeed is None:  # DeepSpeed's groups hold flat copies of the parameters
            self._check_trained(optimizer, living, fsdp)
        groups = groups_of_owners(optimizer, self._parameter_owners())
        everywhere = {peak_rate(group) for group in unwrapped(optimizer).param_groups}
        if not groups and len(everywhere) == 1:  # DeepSpeed's optimizers and layer-wise ones hold other tensors
            groups = dict.fromkeys(self.asked(), unwrapped(optimizer).param_groups[:1])
        peaks, names = (
            {name: [peak_rate(group) for group in own] for name, own in groups.items()},
            self.model.branch_names,
        )
        for branch, name in enumerate(names):
            scheduled = all("initial_lr" in group for group in groups.get(name, []))
            if resumed and (name not in peaks or not scheduled):
                peaks[name] = [resumed[branch]]  # the branch was retired, or its groups only have the present rate
        self._check_rates(optimizer, peaks, goes_on, deepspeed or {})
        self.peaks = [peaks[name][0] if name in peaks else None for name in names]
        self.texts = [_rates_text(peaks.get(name, [])) for name in names]
        self._groups = {branch: groups[name][0] for branch, name in enumerate(names) if groups.get(name)}
        asked = self.args.comlora_branch_learning_rates is not None
        one = all(same_rate(rate, self.peaks[0]) for rate in self.peaks)
        return self.peaks if None not in self.peaks and (asked or not one) else None

    def note(self) -> None:
        """Stores the rate of each branch in the last optimizer step, before the schedule changes it."""
        self.used = {branch: float(group["lr"]) for branch, group in self._groups.items()}

    def settings(self, optimizer: Any, own: bool) -> dict[str, Any]:
        """The optimizer's settings that differ from the arguments, for the run's record.

        Args:
            optimizer: the optimizer, or None.
            own: whether the user chose the optimizer's class.
        """
        settings = told_settings(optimizer) if (own or not self.made) and optimizer is not None else {}
        rates = [rate for rate in self.peaks if rate is not None]
        if not rates:
            return settings
        if not all(same_rate(rate, rates[0]) for rate in rates):
            return settings | {"comlora_branch_learning_rates": self.peaks}
        same = self.args.comlora_branch_learning_rates or same_rate(rates[0], self.args.learning_rate)
        return settings | ({} if same else {"learning_rate": rates[0]})

    def _check_trained(self, optimizer: Any, living: Sequence[int], fsdp: bool) -> None:
        names = {*map(branch_name, living), SELECTOR}
        owned = {name: own for name, own in self._owned_parameters().items() if name in names and own}
        missed = untrained(optimizer, owned)
        if fsdp and all(missed.get(name) == len(own) for name, own in owned.items()):
            return  # FSDP has replaced all parameters, so nothing can be checked
        counts = {missed.get(name, 0) for name in owned if name != SELECTOR}
        whole = [name for name, count in missed.items() if count == sum(p.requires_grad for p in owned[name])]
        if whole or len(counts) > 1:
            raise ValueError(
                f"the optimizer {type(unwrapped(optimizer)).__name__} does not train {', '.join(whole or missed)}: "
                "its groups lack their parameters; make it from trainer.model.parameters() in an overridden "
                "create_optimizer, or let the trainer do it."
            )

    def _check_rates(
        self, optimizer: Any, peaks: dict[str, list[float]], goes_on: bool, deepspeed: Mapping[str, Any]
    ) -> None:
        asked = {name: rate for name, rate in self.asked().items() if rate is not None}
        own = steps_by_itself(optimizer) or "scheduler" in deepspeed
        wrong = [
            name
            for name, rate in asked.items()
            if name not in peaks
            or not same_rate(peaks[name][0], rate)
            or not (self.made or len(set(peaks[name])) == 1)
        ]
        if not asked or not (wrong or own and len({*asked.values()}) > 1):
            return
        option = "comlora_selector_learning_rate"
        if wrong != [SELECTOR] and self.args.comlora_branch_learning_rates is not None:
            option = f"comlora_branch_learning_rates={self.args.comlora_branch_learning_rates}"
            option += " (of comlora_tournament)" if self.args.comlora_tournament else ""
        found = "; ".join(f"{name} {_rates_text(peaks.get(name, [])) or 'unknown'}" for name in asked)
        if goes_on and self.made and not own:
            why = f"the checkpoint's optimizer goes on at its own rates ({found}): give those, or start a new run."
        elif "scheduler" in deepspeed or "optimizer" in deepspeed:
            why = "the DeepSpeed config has an optimizer or scheduler of its own: leave both out of it."
        else:
            why = f"the groups of the optimizer {type(unwrapped(optimizer)).__name__} have others ({found}): "
            why += "leave the option out, or let the trainer make the optimizer, with an optim that steps by groups."
        raise ValueError(f"{option} is not possible: {why}")


def _rates_text(rates: Iterable[float]) -> str:
    """The different rates in their order, as text such as "0.001/0.016"."""
    return "/".join(dict.fromkeys(f"{rate:g}" for rate in rates))


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)

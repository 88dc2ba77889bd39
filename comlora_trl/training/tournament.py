"""Branches of different learning rates, and a field that shrinks at the rungs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comlora_trl.branches.model import branch_name
from comlora_trl.competition.rungs import Rung, parse_rungs, retired_at, rung_record, rung_steps
from comlora_trl.training.export import RETIRED, Background, write_snapshots
from comlora_trl.training.gradients import revive
from comlora_trl.training.lora_fa import pair_branches
from comlora_trl.training.optimizers import (
    SELECTOR,
    evaluation_weights,
    group_by_owner,
    groups_of_owners,
    peak_rate,
    same_rate,
    steps_by_itself,
    told_settings,
    untrained,
    unwrapped,
)
from comlora_trl.training.report import print_rung


class Tournament:
    """Mixin before TRL's trainer: one rate a branch, and rungs at which the worse ones are retired.

    Attributes:
        retired_files: writes the retired branches' folders.
        branch_rates: each branch's peak rate, that of the optimizer's first group of the branch; None for unknown.
        branch_rate_texts: the peak rates of all groups of each branch.
    """

    retired_files: Background
    branch_rates: list[float | None] = []
    branch_rate_texts: list[str] = []
    _optimizer_given = _optimizer_made = False
    _rate_groups: dict[int, dict[str, Any]]
    _step_rates: dict[int, float] | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups for each branch and the selector where their rates differ."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        pair_branches(optimizer, self.args.comlora_rungs)
        if existed:
            self._optimizer_given |= not self._optimizer_made
            return optimizer
        self._optimizer_made = True
        asked = self._asked_rates()
        if any(rate is not None for rate in asked.values()) and not steps_by_itself(optimizer):
            group_by_owner(optimizer, self._parameter_owners(), asked, self.args.learning_rate)
        return optimizer

    def _asked_rates(self) -> dict[str, float | None]:
        """The rates that the options ask for, by owner; None where an option is left out."""
        model, args = self.comlora_model, self.args
        rates = args.comlora_branch_learning_rates or [None] * self._settings.k
        selector = {} if model.selector is None else {SELECTOR: args.comlora_selector_learning_rate}
        return dict(zip(model.branch_names, rates, strict=True)) | selector

    def _owned_parameters(self) -> dict[str, list[nn.Parameter]]:
        model = self.comlora_model
        owned = {name: model.branch_parameters(branch) for branch, name in enumerate(model.branch_names)}
        return owned | ({} if model.selector is None else {SELECTOR: list(model.selector.parameters())})

    def _parameter_owners(self) -> dict[int, str]:
        return {id(p): name for name, parameters in self._owned_parameters().items() for p in parameters}

    def settle_rates(self) -> None:
        """Reads the rates of the branches from the optimizer's groups, once it is ready to train.

        Raises:
            ValueError: if the optimizer misses a branch or the selector, or has other rates than the options ask for.
        """
        self._check_trained()
        groups = groups_of_owners(self.optimizer, self._parameter_owners())
        everywhere = {peak_rate(group) for group in unwrapped(self.optimizer).param_groups}
        if not groups and len(everywhere) == 1:  # DeepSpeed's and layer-wise optimizers hold other tensors
            groups = dict.fromkeys(self._asked_rates(), unwrapped(self.optimizer).param_groups[:1])
        peaks = {name: [peak_rate(group) for group in own] for name, own in groups.items()}
        names, known = self.comlora_model.branch_names, self._resumed and self._resumed.rates
        for branch, name in enumerate(names):
            scheduled = all("initial_lr" in group for group in groups.get(name, []))
            if known and (name not in peaks or not scheduled):
                peaks[name] = [known[branch]]  # retired before the checkpoint, or its rate was lowered on the way
        self._check_rates(peaks)
        self.branch_rates = [peaks[name][0] if name in peaks else None for name in names]
        self.branch_rate_texts = [_rates_text(peaks.get(name, [])) for name in names]
        self._rate_groups = {branch: groups[name][0] for branch, name in enumerate(names) if groups.get(name)}
        asked = self.args.comlora_branch_learning_rates is not None
        one = all(same_rate(rate, self.branch_rates[0]) for rate in self.branch_rates)
        complete = None not in self.branch_rates
        self.comlora_model.competition_state.rates = self.branch_rates if complete and (asked or not one) else None

    def _check_trained(self) -> None:
        if self.is_deepspeed_enabled:
            return  # its groups hold flat copies
        living = {branch_name(branch) for branch in self.comlora_model.competition_state.living} | {SELECTOR}
        owned = {name: own for name, own in self._owned_parameters().items() if name in living and own}
        missed = untrained(self.optimizer, owned)
        if self.is_fsdp_enabled and all(missed.get(name) == len(own) for name, own in owned.items()):
            return  # nothing is known of what it holds
        counts = {missed.get(name, 0) for name in owned if name != SELECTOR}
        whole = [name for name, count in missed.items() if count == sum(p.requires_grad for p in owned[name])]
        if whole or len(counts) > 1:
            name = type(unwrapped(self.optimizer)).__name__
            raise ValueError(
                f"the optimizer {name} does not train {', '.join(whole or missed)}: its groups lack their parameters; "
                "make it from trainer.model.parameters() in an overridden create_optimizer, or let the trainer do it."
            )

    def _check_rates(self, peaks: dict[str, list[float]]) -> None:
        config = self.args.hf_deepspeed_config.config if self.is_deepspeed_enabled else {}
        asked = {name: rate for name, rate in self._asked_rates().items() if rate is not None}
        own = steps_by_itself(self.optimizer) or "scheduler" in config
        wrong = [
            name
            for name, rate in asked.items()
            if name not in peaks
            or not same_rate(peaks[name][0], rate)
            or not (self._optimizer_made or len(set(peaks[name])) == 1)
        ]
        if not asked or not (wrong or own and len({*asked.values()}) > 1):
            return
        option = "comlora_selector_learning_rate"
        if wrong != [SELECTOR] and self.args.comlora_branch_learning_rates is not None:
            option = f"comlora_branch_learning_rates={self.args.comlora_branch_learning_rates}"
            option += " (of comlora_tournament)" if self.args.comlora_tournament else ""
        found = "; ".join(f"{name} {_rates_text(peaks.get(name, [])) or 'unknown'}" for name in asked)
        if self._resumed is not None and self._optimizer_made and not own:
            why = f"the checkpoint's optimizer goes on at its own rates ({found}): give those, or start a new run."
        elif "scheduler" in config or "optimizer" in config:
            why = "the DeepSpeed config has an optimizer or scheduler of its own: leave both out of it."
        else:
            why = f"the groups of the optimizer {type(unwrapped(self.optimizer)).__name__} have others ({found}): "
            why += "leave the option out, or let the trainer make the optimizer, with an optim that steps by groups."
        raise ValueError(f"{option} is not possible: {why}")

    @property
    def rungs(self) -> dict[int, Rung]:
        """The rungs of this run, by optimizer step; known once training has begun."""
        return rung_steps(parse_rungs(self.args.comlora_rungs, self._settings.k), self.state.max_steps)

    def reach_rung(self) -> None:
        """Shrinks the field if a rung lies after the step that has just ended."""
        rung = self.rungs.get(self.state.global_step)
        state = self.comlora_model.competition_state
        if rung is None or any(past["step"] == self.state.global_step for past in state.rungs):
            return
        selection = self.select()
        column, highest = {
            "selector": ("scores", True),
            "validation_loss": ("validation_nll", False),
            "validation_accuracy": ("validation_accuracy", True),
        }[self.args.winner_by]
        losers = retired_at(rung, selection[column], highest)
        state.rungs.append(rung_record(rung, self.state.global_step, selection, losers))
        if self.is_world_process_zero():
            print_rung(state.rungs[-1], self.branch_rates, self.state.max_steps)
        self._retire(losers)

    def _retire(self, branches: list[int]) -> None:
        """Keeps branches as they are, as plain adapters, and frees their optimizer state, gradients and weights.

        They are written in the background, which ends before a checkpoint relies on it, and before training does.
        """
        self.retired_files.wait()
        model = self.comlora_model
        with evaluation_weights(self.optimizer, self.model):
            snapshots = {branch: model.snapshot(branch, self.model_wrapped) for branch in branches}
        model.competition_state.retired |= dict.fromkeys(branches, self.state.global_step)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / RETIRED
            summary, record = self.competition_summary(), self.training_record()
            self.retired_files.start(write_snapshots, snapshots, folder, summary, record)
        parameters = [parameter for branch in branches for parameter in model.branch_parameters(branch)]
        self._forget_optimizer_state(parameters)
        for parameter in parameters:
            parameter.grad = None
        self.drop_retired()

    def drop_retired(self) -> None:
        """Frees the weights of retired branches, where no wrapper holds them."""
        model = self.comlora_model
        if self.model_wrapped is not model or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # DDP, FSDP and DeepSpeed know every parameter for good; theirs get no gradient any more
        for branch in model.competition_state.retired:
            if branch_name(branch) in model.peft_config:
                model.drop_branch(branch)

    def restore_retired(self) -> None:
        """Gives branches that an earlier training retired or disqualified new adapters: a new competition begins."""
        model, state = self.comlora_model, self.comlora_model.competition_state
        dropped = [branch for branch in state.retired if branch_name(branch) not in model.peft_config]
        if dropped and self._optimizer_given:
            raise ValueError(
                "the optimizer that was given knows nothing of new adapters for the branches that the last training "
                "retired: make a new trainer, or a subclass with create_optimizer."
            )
        for branch in dropped:
            model.restore_branch(branch)
        revive(model, [*state.disqualified, *state.retired])
        if dropped:
            self.optimizer = self.lr_scheduler = None  # they know nothing of the new parameters

    def _forget_optimizer_state(self, parameters: list[nn.Parameter]) -> None:
        if self.optimizer is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        gone = {id(parameter) for parameter in parameters}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in parameters:
            self.optimizer.state.pop(parameter, None)

    def trained_settings(self) -> dict[str, Any]:
        """The settings of the optimizer that are other ones than the arguments', for the run's record."""
        rates = [rate for rate in self.branch_rates if rate is not None]
        own = self.optimizer_cls_and_kwargs is not None or not self._optimizer_made
        settings = told_settings(self.optimizer) if own and self.optimizer is not None else {}
        if self.lr_scheduler is not None and not self._created_lr_scheduler:
            settings |= {"lr_scheduler_type": type(self.lr_scheduler).__name__, "warmup_steps": None}
        if not rates:
            return settings
        if not all(same_rate(rate, rates[0]) for rate in rates):
            return settings | {"comlora_branch_learning_rates": self.branch_rates}
        same = self.args.comlora_branch_learning_rates or same_rate(rates[0], self.args.learning_rate)
        return settings | ({} if same else {"learning_rate": rates[0]})

    def note_rates(self) -> None:
        """Keeps each branch's rate of the optimizer step that was just taken, before the schedule goes on."""
        if self.comlora_model.competition_state.rates is not None:
            self._step_rates = {branch: float(group["lr"]) for branch, group in self._rate_groups.items()}

    def tournament_logs(self) -> dict[str, float]:
        """Entries of the Trainer's log: living branches, cost so far, each branch's rate.

        The Trainer's own `learning_rate` would be the first branch's; it becomes the leader's, as `eval_loss` is.
        """
        state = self.comlora_model.competition_state
        logs: dict[str, float] = {"comlora/row_passes": state.row_passes}
        if self.args.comlora_rungs:
            logs["comlora/living"] = len(state.living)
        rates = self._step_rates or {}
        logs |= {f"comlora/learning_rate_{branch}": rates[branch] for branch in state.living if branch in rates}
        return logs | ({"learning_rate": rates[state.leader]} if state.leader in rates else {})


def _rates_text(rates: Iterable[float]) -> str:
    """Different rates as text, in their order; more than one where a branch's groups have several."""
    return "/".join(dict.fromkeys(f"{rate:g}" for rate in rates))

"""Branches of different learning rates, and a field that shrinks at the rungs."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from comlora_trl.branches.model import branch_name
from comlora_trl.competition.rungs import Rung, parse_rungs, retired_at, rung_record, rung_steps
from comlora_trl.training.export import RETIRED, Background, write_snapshots
from comlora_trl.training.gradients import revive
from comlora_trl.training.lora_fa import pair_branches
from comlora_trl.training.report import print_rung

_OWNER = "comlora_owner"


class Tournament:
    """Mixin before TRL's trainer: one rate a branch, and rungs at which the worse ones are retired.

    Attributes:
        retired_files: writes the retired branches' folders.
    """

    retired_files: Background
    _step_rates: dict[int, float] | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups for each branch and the selector where their rates differ."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        pair_branches(optimizer, self.args.comlora_rungs)
        if existed or not self._rates_differ:
            return optimizer
        owners = self._parameter_owners()
        for group in list(optimizer.param_groups):
            parameters, group["params"] = group["params"], []
            kinds = {owners.get(id(p)) for p in parameters}
            for owner, rate in self._owner_rates().items():
                own = [p for p in parameters if owners.get(id(p)) == owner]
                # A retired branch's group stays, empty, where the others have theirs: the schedule counts groups. One
                # that never had a parameter would be lost in a sharded checkpoint, which names groups by parameters
                if owner == "selector" and not own or owner != "selector" and not kinds - {"selector"}:
                    continue
                optimizer.add_param_group({**group, "params": own, "lr": rate, _OWNER: owner})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if _OWNER in group]
        return optimizer

    @property
    def _rates_differ(self) -> bool:
        own = self.args.comlora_selector_learning_rate is not None and self.comlora_model.selector is not None
        return own or self.args.comlora_branch_learning_rates is not None

    def _owner_rates(self) -> dict[str, float]:
        rates = dict(zip(self.comlora_model.branch_names, self.args.branch_learning_rates, strict=True))
        if self.comlora_model.selector is not None:
            own = self.args.comlora_selector_learning_rate
            rates["selector"] = self.args.learning_rate if own is None else own
        return rates

    def _parameter_owners(self) -> dict[int, str]:
        model = self.comlora_model
        owners = {
            id(p): name for branch, name in enumerate(model.branch_names) for p in model.branch_parameters(branch)
        }
        selector = () if model.selector is None else model.selector.parameters()
        return owners | {id(p): "selector" for p in selector}

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
            print_rung(state.rungs[-1], self.args.branch_learning_rates, self.state.max_steps)
        self._retire(losers)

    def _retire(self, branches: list[int]) -> None:
        """Keeps branches as they are, as plain adapters, and frees their optimizer state, gradients and weights.

        They are written in the background, which ends before a checkpoint relies on it, and before training does.
        """
        self.retired_files.wait()
        model = self.comlora_model
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

    def note_rates(self) -> None:
        """Keeps each branch's rate of the optimizer step that was just taken, before the schedule goes on."""
        if self.args.comlora_branch_learning_rates is None:
            return
        owners = {branch_name(branch): branch for branch in range(self._settings.k)}
        groups = [group for group in self.optimizer.param_groups if group.get(_OWNER) in owners]
        self._step_rates = {owners[group[_OWNER]]: float(group["lr"]) for group in groups}

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

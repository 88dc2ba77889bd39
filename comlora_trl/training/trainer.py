"""[`CompetingTrainer`]: the code that every TRL trainer needs for competing LoRA branches.

TRL builds the model, the data and the optimizer. Then the branches are attached to TRL's model. In each optimizer
step, the Trainer makes these calls in this order:

1. `get_batch_samples` plans the step.
2. `compute_loss` runs the branches and combines their losses, once for each micro-batch. The subclass defines it.
3. `on_pre_optimizer_step` ends the competition's step: disqualification, wins, norm and clipping of each branch.
4. `on_optimizer_step` stores the learning rates of the step.
5. `on_step_end` averages the weights for the rungs, retires branches if a rung is due, and selects the leader if the
   Trainer will evaluate.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import save_fsdp_optimizer
from huggingface_hub import CommitInfo
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, get_last_checkpoint
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.utils import get_config_model_id

from comlora_trl.branches import kernels
from comlora_trl.branches.model import branch_name
from comlora_trl.competition import ValidationTally
from comlora_trl.training import sharding
from comlora_trl.training.arguments import check_parallelism
from comlora_trl.training.attach import Attachment
from comlora_trl.training.averages import WeightAverages, saved_averages, saved_horizon
from comlora_trl.training.checkpoints import check_checkpoint, load_state, save_state
from comlora_trl.training.competition import Competition, Counted, LineCollator, supervised_tokens
from comlora_trl.training.config import CompetitionConfig
from comlora_trl.training.evaluation import Measured, selection_metrics, validate
from comlora_trl.training.export import (
    RETIRED,
    Background,
    check_target,
    new_folder,
    push_winner,
    save_branch,
    write_snapshots,
)
from comlora_trl.training.graphing import padding_line, settle_graphs
from comlora_trl.training.model import BranchPass, ComLoRAModel
from comlora_trl.training.optimizers import (
    BranchRates,
    enter_evaluation_weights,
    evaluation_weights,
    forget_state,
    has_evaluation_weights,
)
from comlora_trl.training.own_loss import OwnLosses, refuse_lone_gradients
from comlora_trl.training.report import competition_summary, print_rung, print_table, start_line, tournament_line
from comlora_trl.training.trial import try_branches
from comlora_trl.winner.card import CARD_FILE, card
from comlora_trl.winner.files import settings_of, training_record, write_training_record, write_winner_files
from comlora_trl.winner.folder import Adapter

logger = get_logger(__name__)


class CompetingTrainer:
    """The first base class of a competing trainer, before TRL's: `class Mine(CompetingTrainer, SFTTrainer)`.

    The subclass calls TRL's `__init__` within [`Attachment.building`], calls [`compete`] at the end of its own
    `__init__`, and defines `compute_loss`.

    Attributes:
        competition: the competition. Checkpoints store its `state`.
        rates: the learning rates of the branches in the optimizer.
        averages: averages of the branches' weights, which rungs measure; None without, and after the last rung.
        own_losses: computes the loss of each branch on its view, if the loss is not a sum over rows.
        retired_files: writes the folders of retired branches in the background.
        data_name: name of the training data (a preset, a hub id or a path) for the winner's record and card. Set it
            before [`train`], because a data set does not know its name.
    """

    args: CompetitionConfig
    competition: Competition
    rates: BranchRates
    averages: WeightAverages | None = None
    own_losses: OwnLosses
    data_name: str | None = None
    _losses_kind = OwnLosses
    _in_step = False
    _own_evaluation = False
    current_gradient_accumulation_steps = 1  # an attribute of the Trainer, which sets it only in its training loop

    def compete(self, attachment: Attachment) -> None:
        """Adds the branches to the model that TRL built, tries them on random tokens, and creates the competition."""
        args, router_loss = self.args, getattr(self, "aux_loss_enabled", False)
        model = self.model = self.model_wrapped = self.callback_handler.model = attachment.branches(self.model)
        if args.activation_offloading:  # TRL's context refers to the model without branches
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(model=model)
        check_parallelism(self.accelerator, args)
        sharding.settle_fsdp(self.accelerator)
        packed = getattr(self, "padding_free", False)
        try_branches(model, self.data_collator, self.accelerator, packed, router_loss)
        if args.comlora_rows == "shared" and packed:
            self.data_collator = LineCollator(self.data_collator)
        self._without_graphs = settle_graphs(model, args, self.accelerator)
        # The loss is normalised over the whole step, even if the base model does not support this for its own loss
        self.model_accepts_loss_kwargs = True
        self.competition = Competition(
            model,
            args.competition_settings,
            self.accelerator,
            chunk=args.comlora_branch_chunk,
            average_tokens=args.average_tokens_across_devices,
            router_loss=router_loss,
            count=self.count,
        )
        self.rates = BranchRates(model, args)
        self.own_losses = self._losses_kind(self, self.competition)
        self.retired_files = Background()
        self._exported: set[Path] = set()
        self._decided = self._unlogged = False
        self._flos_per_token: float | None = None
        # The first callback is the Trainer's flow control, and this one must come directly after it
        self.callback_handler.callbacks.insert(1, CompetitionCallback(self))

    @staticmethod
    def count(batch: dict[str, Any]) -> Counted:
        """Counts the items of a batch that the loss is a mean over."""
        return supervised_tokens(batch)

    @property
    def comlora_model(self) -> ComLoRAModel:
        """The model with its branches and selector, without any DDP, FSDP or DeepSpeed wrapper."""
        if isinstance(self.model, ComLoRAModel):  # faster, because unwrapping visits every module
            return self.model
        return self.accelerator.unwrap_model(self.model)

    # ---- A training run, from the start to the winner ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, selects the winner, prints the table of the branches and exports the winner.

        Each call is a new competition. A call with `resume_from_checkpoint` continues the checkpoint's competition.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest one in `output_dir`.
            args, kwargs: as for the Trainer.

        Raises:
            FileExistsError: if the winner's folder is not empty and may not be replaced.
            ValueError: if the checkpoint does not fit.
        """
        if self.args.should_save:
            check_target(self.args.winner_dir, self._may_overwrite(Path(self.args.winner_dir)))
        self._reset()
        self._checkpoint: str | None = None
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            folder = get_last_checkpoint(self.args.output_dir) if folder is True else folder
            if folder is not None:
                check_checkpoint(folder, self.comlora_model.k, self.args.comlora_selector)
                self.competition.resume(load_state(folder))
                self._drop_retired()
                self._checkpoint = folder
        model = self.comlora_model
        path = kernels.selected_kernels(self.args.device, model.peft_config[model.active_adapter].lora_dropout)
        by_module = sharding.gathers_by_module(self.accelerator)
        self.accelerator.print(start_line(model, path, self.args.comlora_branch_chunk, by_module))
        for line in (self._without_graphs, padding_line(self.args, self.train_dataset)):
            if line is not None:
                self.accelerator.print(line)
        watched = model.register_forward_hook(_Watch(self.competition), with_kwargs=True)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            watched.remove()
            self.retired_files.wait()
            self.averages = None

    def _reset(self) -> None:
        """Begins a new competition: branches that an earlier run retired or disqualified get new weights."""
        gone = [b for b in self.competition.state.retired if branch_name(b) not in self.comlora_model.peft_config]
        if gone and self.rates.given:
            raise ValueError(
                "the optimizer that was given knows nothing of new adapters for the branches that the last training "
                "retired: make a new trainer, or a subclass with create_optimizer."
            )
        self.competition.reset()
        if gone:
            self.optimizer = self.lr_scheduler = None  # the Trainer makes new ones, with the new parameters

    def begin_competition(self) -> None:
        """Begins a competition, or continues that of the checkpoint.

        The Trainer calls this again if it tries a smaller batch size (`auto_find_batch_size`).
        """
        graphs = self.comlora_model.competing.graphs
        if graphs is not None:
            graphs.forget_more_than(0)  # frees the memory of all graphs, in case it was out of memory before
        competition = self.competition
        competition.begin(self.state.max_steps, self.state.global_step)
        self._decided = self._unlogged = False
        self._drop_retired()
        resumed = competition.resumed
        competition.state.rates = self.rates.settle(
            self.optimizer,
            competition.state.living,
            resumed=None if resumed is None else resumed.rates,
            goes_on=resumed is not None,
            deepspeed=self._deepspeed_settings(),
            fsdp=self.is_fsdp_enabled,
        )
        if self.is_deepspeed_enabled and has_evaluation_weights(self.optimizer):
            logger.warning(
                f"optim={self.args.optim} has separate weights for evaluation, which are not available under "
                "DeepSpeed: the training weights are measured and exported; use DDP or FSDP for the others."
            )
        rates = None if competition.state.rates is None else self.rates.texts
        self.averages = self._rung_averages()
        averaged = self.averages is not None
        if line := tournament_line(self.args, rates, competition.rungs, self.state.max_steps, averaged):
            self.accelerator.print(line)

    def _rung_averages(self) -> WeightAverages | None:
        """The averages that rungs measure, from a checkpoint if it has any; None if they measure trained weights."""
        args, horizon = self.args, self.args.comlora_rung_average
        by_scores = args.winner_by == "selector"  # scores do not depend on the branches' weights
        # Such an optimizer has averages of its own, which are measured
        if not horizon or not self.competition.rungs_left or by_scores or has_evaluation_weights(self.optimizer):
            return None
        if sharding.gathers_by_module(self.accelerator):
            logger.warning(
                f"comlora_rung_average={horizon:g} is not used under FSDP1 and DeepSpeed ZeRO-3: the rungs compare "
                "the trained weights; use DDP, FSDP2 or ZeRO-2 for averages."
            )
            return None
        saved = saved_averages(self._checkpoint)
        if saved is None and self._checkpoint is not None and self.state.global_step > 0:
            logger.warning(
                f"checkpoint {self._checkpoint} has no averages of the weights: they begin at step "
                f"{self.state.global_step}, and the next rung may choose otherwise than in an uninterrupted run."
            )
        before = saved_horizon(self._checkpoint)
        if before not in (None, horizon):
            logger.warning(
                f"checkpoint {self._checkpoint} has averages of the weights with comlora_rung_average={before}, and "
                f"this run has {horizon}: they go on with {horizon} from step {self.state.global_step}, and the next "
                f"rung may choose otherwise than in an uninterrupted run; resume with {before} to avoid this."
            )
        return WeightAverages(self.comlora_model, horizon, saved)

    def _deepspeed_settings(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration, from the argument `deepspeed` or from `accelerate launch`; None without it."""
        return self.accelerator.state.deepspeed_plugin.hf_ds_config.config if self.is_deepspeed_enabled else None

    def finish_competition(self) -> None:
        """Selects and exports the winner, and prints the table, at the end of training and before other callbacks."""
        enter_evaluation_weights(self.optimizer, self.model)  # after training, the model equals the exported one
        if self.can_select and not self._decided:
            self.select()
        folder = self.export_winner()
        self.retired_files.wait()
        if self.is_world_process_zero():
            print_table(self.competition_summary())
        line = f"winner: {branch_name(self.determine_winner())} in {folder}"
        if self.competition.state.retired:
            line += f"; the retired branches are in {Path(self.args.output_dir) / RETIRED}"
        self.accelerator.print(line)

    # ---- One optimizer step ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetches the micro-batches of an optimizer step and plans the step."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self.competition.normaliser(self.competition.plan_step(batches))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the forward and backward of a micro-batch.

        Returns:
            the loss for the Trainer's log. Independent branches train by the sum of their losses, and their mean is
            returned.
        """
        if self.is_deepspeed_enabled:
            # DeepSpeed steps directly after the backward, before the Trainer's callback
            sharding.around_step(self.deepspeed, self.end_step, self.competition.keep_disqualified)
        living = len(self.competition.state.living)  # DeepSpeed's step may disqualify branches
        self._in_step = True
        try:
            own = getattr(self.compute_loss, "__func__", None) is type(self)._competing_loss
            with nullcontext() if own else self.own_losses.in_place():
                loss = super().training_step(*args, **kwargs)
        finally:
            self._in_step = False
            self.comlora_model.competing.abandon()  # a backward that failed, e.g. out of memory, does not end its pass
        return loss / living if self.competition.settings.independent else loss

    def end_step(self) -> None:
        """Ends the competition's step after the last backward and before the optimizer's step."""
        scaled, max_norm = self._has_loss_scaler, self.args.max_grad_norm
        if self.is_deepspeed_enabled:
            max_norm = 0.0 if scaled else sharding.take_over_clipping(self.deepspeed)
        elif scaled:
            self.accelerator.unscale_gradients()
        known = set(self.competition.state.disqualified)
        self.competition.end_step(max_norm, loss_scaled=scaled)
        for branch in self.competition.state.disqualified.keys() - known:
            forget_state(self.optimizer, self.comlora_model.branch_parameters(branch))

    @property
    def _has_loss_scaler(self) -> bool:
        if self.is_deepspeed_enabled:
            return self.deepspeed.fp16_enabled()
        return self.accelerator.scaler is not None

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips nothing, because [`Competition.end_step`] clips each branch. DeepSpeed with fp16 is the exception."""
        return super()._clip_grad_norm(model) if self.is_deepspeed_enabled and self._has_loss_scaler else None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Computes nothing. The norm in the log is that of the competition, see [`log`]."""
        return grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate, for the rows of all branches. The parameters are counted only in the first step."""
        tokens, plan = inputs["input_ids"].numel(), self.competition.plan
        if self._flos_per_token is None:
            self._flos_per_token = super().floating_point_ops(inputs) / max(tokens, 1)
        shared = plan is not None and plan.owners is not None
        return int(self._flos_per_token * tokens * (1 if shared else len(self.competition.state.living)))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Creates the Trainer's optimizer, with groups for each branch and the selector if the options set rates."""
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        self.rates.take(optimizer, existed)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and adds the competition's figures since the last log to the Trainer's training logs."""
        if self._unlogged and "loss" not in logs:
            self.log_selection()
        if self.model.training:
            logs.update(self.competition.window_figures())
            if "loss" in logs:
                logs.update(self._step_figures())
        super().log(logs, start_time)
        if self._unlogged:
            self.log_selection()

    def _step_figures(self) -> dict[str, float]:
        """More log entries: gradient norm, number of living branches, cost so far, and the rate of each branch.

        `learning_rate` is that of the leader, as `eval_loss` is. The Trainer would log that of the first branch.
        """
        state = self.competition.state
        logs: dict[str, float] = {"comlora/row_passes": state.row_passes}
        if self.competition.grad_norm is not None:
            logs["grad_norm"] = self.competition.grad_norm.item()
        if self.args.comlora_rungs:
            logs["comlora/living"] = len(state.living)
        rates = {} if state.rates is None else self.rates.used
        logs |= {f"comlora/learning_rate_{branch}": rates[branch] for branch in state.living if branch in rates}
        return logs | ({"learning_rate": rates[state.leader]} if state.leader in rates else {})

    # ---- Rungs and the winner ----

    def reach_rung(self) -> None:
        """Averages the weights for the rungs, and retires the worse branches if a rung is due after the last step."""
        averages, competition = self.averages, self.competition
        if averages is not None:
            averages.update(competition.state.living, competition.step)
        horizon = None if averages is None else averages.horizon
        record = competition.reach_rung(partial(self._measure, averages), horizon)
        if record is None:
            return
        if averages is not None:
            averages.drop(record["retired"])
            self.averages = averages if competition.rungs_left else None
        if self.is_world_process_zero():
            print_rung(record, self.rates.peaks, self.state.max_steps, self.competition.state)
        self._keep_retired(record["retired"])
        self._drop_retired()

    def _keep_retired(self, branches: list[int]) -> None:
        """Saves retired branches as PEFT adapters, and frees their optimizer state and gradients.

        The files are written in the background. The trainer waits for them before a checkpoint and before training
        ends.
        """
        self.retired_files.wait()
        model = self.comlora_model
        with evaluation_weights(self.optimizer, self.model):
            snapshots = {branch: model.snapshot(branch, self.model_wrapped) for branch in branches}
        if self.args.should_save:
            folder = Path(self.args.output_dir) / RETIRED
            summary, record = self.competition_summary(), self.training_record()
            self.retired_files.start(write_snapshots, snapshots, folder, summary, record)
        parameters = [parameter for branch in branches for parameter in model.branch_parameters(branch)]
        if self.optimizer is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.rates.forget(self.optimizer, parameters)
        for parameter in parameters:
            parameter.grad = None

    def _drop_retired(self) -> None:
        """Frees the weights of retired branches, if the model has no wrapper."""
        if self.model_wrapped is not self.comlora_model or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # DDP, FSDP and DeepSpeed can't remove parameters; those of retired branches get no gradient
        self.competition.drop_retired()

    @property
    def can_select(self) -> bool:
        """Whether there is a validation set, which a selection needs."""
        return self.eval_dataset is not None

    def select(self) -> dict[str, Any]:
        """Measures every living branch on the validation set and selects the best one as the leader (eq. 11-12).

        Each example counts once. Several validation sets are added up. Only this method selects a leader:
        `evaluate()`, `predict()` and callbacks do not.

        Returns:
            the selection, see [`ValidationTally.result`].

        Raises:
            RuntimeError: if there is no example, or every branch is disqualified.
        """
        return self.competition.select(self._measure)

    def _measure(self, averages: WeightAverages | None = None) -> ValidationTally:
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        # A loss that TRL computes needs the logits of all tokens, which are larger than what a layer needs
        own = type(self).measure_batch is CompetingTrainer.measure_batch
        layers = len(self.comlora_model.expansion.layers) if own else 0
        place = nullcontext() if averages is None else averages.in_place(self.model_wrapped)
        with evaluation_weights(self.optimizer, self.model), place:
            return validate(self.model_wrapped, self.competition, sets, self, self.measure_batch, layers)

    def measure_batch(self, model: Any, inputs: dict[str, Any], rows: BranchPass, count: int) -> Measured:
        """Measures the living branches on a batch. All processes must call this.

        Args:
            model: the model in the accelerator's wrapper, in evaluation mode.
            inputs: the batch.
            rows: a pass over all living branches.
            count: number of examples that count; 0 for a batch that only runs because other processes need it.
        """
        output = model(branch_pass=rows, fused_lm_head=True, use_cache=False, **inputs)
        return Measured(output.nll, output.correct, output.tokens, output.scores)

    def determine_winner(self) -> int:
        """Determines the winner (eq. 11-12) by the newest selection, or by a selection made now if there is none.

        Returns:
            the index of the branch, which becomes the model's active adapter.

        Raises:
            RuntimeError: if every branch is disqualified.
        """
        if self.competition.state.selection is None and self.can_select:
            self.select()
        self.competition.follow_leader()
        return self.competition.state.leader

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Runs the Trainer's evaluation. An evaluation in the training loop makes a selection first."""
        # The training loop passes no data set, or the key of one if eval_dataset is a dict
        self._own_evaluation = self.is_in_train and (eval_dataset is None or isinstance(eval_dataset, str))
        if self._own_evaluation and self.control.should_evaluate and self.can_select:
            self.select()
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._own_evaluation = False

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Runs the Trainer's evaluation loop with the leader, and adds the figures of a selection made for it."""
        enter_evaluation_weights(self.optimizer, self.model)  # before the Trainer casts the model to half precision
        parameters = self.comlora_model.trainable_parameters()
        values = [parameter.data for parameter in parameters]
        try:
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        finally:
            if has_evaluation_weights(self.optimizer):
                sharding.reshard(self.model)  # otherwise the next step would use gathered copies of FSDP2
            if self.args.bf16_full_eval or self.args.fp16_full_eval:
                # The Trainer's cast is permanent, but trained and exported weights must keep their precision
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.data = value
        if self._own_evaluation and self.competition.selected:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update(selection_metrics(self.competition.state.selection, prefix))
        return output

    def log_selection_next(self) -> None:
        """Makes the next log also log the newest selection, after the figures of the step."""
        self._unlogged = True

    def log_selection(self) -> None:
        """Logs the newest selection. It is needed if no evaluation of the Trainer logs it."""
        self._unlogged = False
        training = self.model.training
        # A log in training mode would include and reset the training figures. TRL and this class only read the flag of
        # the model itself, so the flags of its thousands of modules need not change
        self.model.training = False
        try:
            self.log(selection_metrics(self.competition.state.selection, "eval"))
        finally:
            self.model.training = training

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported, because a search makes a new model for each trial.

        Raises:
            NotImplementedError: always; the message names the tournament as the alternative.
        """
        raise NotImplementedError(
            "hyperparameter_search needs a model_init, which no TRL trainer takes: set comlora_tournament=True, which "
            "compares learning rates in one run (comlora_branch_learning_rates)."
        )

    # ---- Checkpoints: the whole weights of K branches and the selector, with any kind of sharding ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Saves optimizer and schedule. Under FSDP, the Trainer's method would also gather and save the base model."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        sharding.reshard(self.model)  # the optimizer refers to the sharded parameters
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads optimizer and schedule.

        Raises:
            ValueError: under FSDP with an optimizer that has evaluation weights, whose state is not restored
                correctly.
        """
        if checkpoint is not None and self.is_fsdp_enabled and has_evaluation_weights(self.optimizer):
            raise ValueError(
                f"resuming with optim={self.args.optim} is not possible under FSDP: a resumed run has given other "
                "weights than an uninterrupted one; resume with DDP or in one process, or start a new run."
            )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_checkpoint(resume_from_checkpoint, self.comlora_model.k, self.comlora_model.selector is not None)
        self.comlora_model.load_branches(resume_from_checkpoint, self.model_wrapped)

    def load_checkpoint_branches(self, folder: str) -> None:
        """Loads the branches of a checkpoint, including those that a rung has retired since then."""
        for branch in load_state(folder).living:
            if branch_name(branch) not in self.comlora_model.peft_config:
                self.comlora_model.restore_branch(branch)
        self._load_from_checkpoint(folder)

    def _load_best_model(self) -> None:
        enter_evaluation_weights(self.optimizer, self.model)  # checkpoints contain evaluation weights
        best, state = self.state.best_model_checkpoint, self.competition.state
        self.load_checkpoint_branches(best)
        # The leader of the best checkpoint wins; wins, rungs and disqualifications stay those of the whole run
        state.selection = load_state(best).selection
        # A branch that has been disqualified since then can't win, so a new selection is needed in that case
        self._decided = state.selection is not None and state.selection["winner"] not in state.disqualified
        self.competition.follow_leader()

    # ---- The Trainer's methods that save or push "the model" save the winner as an ordinary adapter ----

    def export_winner(self, path: str | Path | None = None) -> Path:
        """Exports the winner as an ordinary PEFT adapter, atomically. If there is no selection yet, one is made.

        Args:
            path: the folder; None for `comlora_winner_dir`.

        Returns:
            the folder.

        Raises:
            FileExistsError: if the folder is not empty, `comlora_overwrite_winner` is False, and the folder is not an
                earlier export of this trainer.
        """
        path = Path(path or self.args.winner_dir)
        self.export_branch(self.determine_winner(), path, self._may_overwrite(path))
        self._exported.add(path.absolute())
        return path

    def export_branch(self, branch: int, path: Path, overwrite: bool) -> None:
        """Exports a branch as an ordinary PEFT adapter with all files of a winner. All processes must call this.

        Args:
            branch: the branch.
            path: the folder.
            overwrite: whether to replace the folder if it is not empty.

        Raises:
            FileExistsError: if the folder is not empty and `overwrite` is False.
        """
        self._export(branch, path, lambda: new_folder(path, overwrite))

    def _export(self, branch: int, target: Path, folder: Callable[[], Any]) -> None:
        with evaluation_weights(self.optimizer, self.model):
            snapshot = self.comlora_model.snapshot(branch, self.model_wrapped)
        if self.args.should_save:
            target.parent.mkdir(parents=True, exist_ok=True)
            with folder() as written:
                save_branch(
                    snapshot, written, self.competition_summary() | {"exported_branch": branch}, self.processing_class
                )
                write_winner_files(written, target=target, record=self.training_record())
        self.accelerator.wait_for_everyone()

    def _may_overwrite(self, path: Path) -> bool:
        return self.args.comlora_overwrite_winner or path.absolute() in self._exported

    def competition_summary(self) -> dict[str, Any]:
        """The content of `competition.json`: the figures of the branches and the history."""
        return competition_summary(self.competition.state, self.state.log_history)

    def training_record(self) -> dict[str, Any]:
        """The content of `training.json`: base, prompt template, data, settings, seed, versions."""
        model = self.comlora_model
        return training_record(
            base=get_config_model_id(model.config),
            base_revision=model.peft_config[model.active_adapter].revision,
            prompt_template=self.args.comlora_prompt,
            data=self.data_name,
            settings=settings_of(self.args) | self._trained_settings(),
            seed=self.args.seed,
            tags=self._tag_names,
        )

    def _trained_settings(self) -> dict[str, Any]:
        """The settings of optimizer and schedule that differ from the arguments."""
        settings = self.rates.settings(self.optimizer, own=self.optimizer_cls_and_kwargs is not None)
        if self.lr_scheduler is not None and not self._created_lr_scheduler:
            settings |= {"lr_scheduler_type": type(self.lr_scheduler).__name__, "warmup_steps": None}
        return settings

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the winner as an ordinary adapter. For a checkpoint of the Trainer, saves every branch."""
        if _internal_call and output_dir is not None:
            self.retired_files.wait()
            enter_evaluation_weights(self.optimizer, self.model)
            self.competition.follow_leader()
            self._save(output_dir, state_dict=self.comlora_model.state_to_save(self.model_wrapped))
            if self.args.should_save:
                save_state(self.competition.state, output_dir)
                write_training_record(output_dir, self.training_record())
            if self.averages is not None:
                self.averages.save(output_dir, self.args.should_save)
            return
        self._save_winner(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_winner(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._export(self.determine_winner(), folder, lambda: nullcontext(folder))
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Pushes the winner and its model card to the root of the hub repository.

        Args:
            commit_message, token, revision, private: as for the Trainer.
            blocking: whether to wait for the upload.
            kwargs: as for [`create_model_card`].

        Returns:
            the commit, or its future if not `blocking`; None on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self._save_winner(Path(self.args.output_dir))
        if not self.is_world_process_zero():
            return None
        name = kwargs.pop("model_name", None) or self.hub_model_id.split("/")[-1]
        self.create_model_card(model_name=name, **kwargs)
        self._finish_current_push()
        return push_winner(
            self.args,
            repo_id=self.hub_model_id,
            commit_message=commit_message,
            token=token,
            run_as_future=not blocking,
            revision=revision or self.args.hub_revision,
        )

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the leader's model card and record into `output_dir`, which the Trainer pushes.

        Args:
            model_name: title of the card; None for the method's name.
            dataset_name: name of the training data, which replaces [`data_name`].
            tags: additional tags for the hub.
        """
        self.data_name = dataset_name or self.data_name
        if not self.is_world_process_zero():
            return
        config = self.comlora_model.config_to_save(self.competition.state.leader).to_dict()
        chats = getattr(self.processing_class, "chat_template", None) is not None
        leader = Adapter(config, self.training_record(), self.competition_summary(), chats)
        folder = Path(self.args.output_dir)
        place = self.hub_model_id or folder.absolute().name
        tags = {tags} if isinstance(tags, str) else tags or ()
        (folder / CARD_FILE).write_text(card(leader, place, title=model_name, tags=tags), encoding="utf-8")
        write_training_record(folder, leader.record)


class _Watch:
    """A forward hook during training, which refuses losses that would train the active branch only.

    In copies and pickles of the model it does nothing, because they have no competition.
    """

    def __init__(self, competition: Competition | None = None) -> None:
        self.competition = competition

    def __reduce__(self) -> tuple[type, tuple]:
        return _Watch, ()

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        one_branch = self.competition is not None and "branch_pass" not in kwargs and "view_pass" not in kwargs
        if one_branch and torch.is_grad_enabled() and len(self.competition.state.living) > 1:
            refuse_lone_gradients(self.competition, output)


class CompetitionCallback(TrainerCallback):
    """Calls the competition's methods at the Trainer's events.

    This callback comes directly after the Trainer's flow control. So a selection comes before the evaluation and the
    checkpoint of the same step, and the winner is exported before another callback ends the run or fails.
    """

    def __init__(self, trainer: CompetingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.begin_competition()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:
            self.trainer.end_step()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.competition.state.rates is not None:
            self.trainer.rates.note()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        selection = self.trainer.competition.state.selection
        self.trainer.reach_rung()
        new = self.trainer.competition.state.selection
        if new is not selection and new["average"] is not None and control.should_evaluate:
            self.trainer.log_selection()  # the evaluation makes a selection by the trained weights
            selection = new
        self._select(state, control, selection)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._select(state, control, self.trainer.competition.state.selection)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.finish_competition()

    def _select(self, state: TrainerState, control: TrainerControl, known: Any) -> None:
        last = state.global_step >= state.max_steps or control.should_training_stop
        if self.trainer.can_select and (control.should_evaluate or last):
            self.trainer.select()
        new = self.trainer.competition.state.selection is not known
        if new and not control.should_evaluate:
            # If the Trainer does not log now, the selection is logged here, because a later log has a later step
            # number
            (self.trainer.log_selection_next if control.should_log else self.trainer.log_selection)()

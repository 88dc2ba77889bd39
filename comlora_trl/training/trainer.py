"""[`ComLoRASFTTrainer`]: TRL's SFT trainer, with K branches in competition instead of one LoRA adapter."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from comlora_trl.branches import kernels
from comlora_trl.branches.model import branch_name
from comlora_trl.competition import CompetitionState
from comlora_trl.training import sharding
from comlora_trl.training.checkpoints import check_checkpoint, load_state
from comlora_trl.training.config import ComLoRAConfig
from comlora_trl.training.data_checks import check_columns, check_prepared
from comlora_trl.training.export import Background, check_target, check_writable
from comlora_trl.training.flow import CompetitionFlow
from comlora_trl.training.gradients import revive
from comlora_trl.training.hold_out import hold_out
from comlora_trl.training.loss import CompetitionLoss
from comlora_trl.training.model import ComLoRAModel
from comlora_trl.training.own_loss import OwnLosses
from comlora_trl.training.preparation import (
    check_parallelism,
    check_trainer_arguments,
    is_quantized,
    prepare_model,
    use_plain_checkpointing,
    warn_of_newer_trl,
    without,
)
from comlora_trl.training.publishing import WinnerPublishing
from comlora_trl.training.report import field_line, start_line
from comlora_trl.training.selection import WinnerSelection
from comlora_trl.training.statistics import LogWindow, StepSums
from comlora_trl.training.step_plan import LineCollator, StepPlan
from comlora_trl.training.tournament import Tournament
from comlora_trl.training.trying import try_branches


class ComLoRASFTTrainer(CompetitionLoss, Tournament, WinnerSelection, WinnerPublishing, SFTTrainer):
    """
    Trainer for ComLoRA: K LoRA branches compete, and the winner leaves as an ordinary PEFT adapter.

    Takes the arguments of TRL's [`~trl.SFTTrainer`]. `peft_config` describes each branch (default: rank 8 on q, k, v,
    up and down); the competition's settings are in [`ComLoRAConfig`]. Without an `eval_dataset`,
    `comlora_validation_size` examples are taken out of the training set to choose the winner. [`train`] ends with a
    table of the branches and exports the winner to `comlora_winner_dir`, with a card that tells what it was trained on
    if you set `trainer.data_name`.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

    >>> trainer = ComLoRASFTTrainer(
    ...     model="Qwen/Qwen2.5-0.5B",
    ...     args=ComLoRAConfig("output", comlora_k=2),
    ...     train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    ...     peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"]),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "comlora"]
    _name = "ComLoRA"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ComLoRAConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-ComLoRA")
        elif not isinstance(args, ComLoRAConfig):
            args = ComLoRAConfig.from_arguments(args)
        warn_of_newer_trl()
        check_trainer_arguments(args, compute_loss_func, optimizers[0])
        use_plain_checkpointing(args)
        if args.should_save:
            check_writable(args.output_dir, "output_dir")
            check_target(args.winner_dir, args.comlora_overwrite_winner)
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a Dataset or an IterableDataset to train on.")
        check_columns(train_dataset, "training", formatting_func, args.dataset_text_field, args.comlora_prompt)
        train_dataset, eval_dataset = hold_out(train_dataset, eval_dataset, args)

        # The branches draw their A from the seed, as SFTTrainer's adapter does
        set_seed(args.seed)
        quantized = None if isinstance(model, str) else quantization_config  # TRL says that it comes too late
        model, processing_class, done = prepare_model(model, args, processing_class, quantization_config, peft_config)
        with without(args, *done):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantized,
                formatting_func=formatting_func,
            )
        check_prepared(self.train_dataset, self.eval_dataset, args.max_length)
        check_parallelism(self.accelerator, args)
        sharding.settle_fsdp(self.accelerator)
        try_branches(model, self.data_collator, self.accelerator, self.padding_free, self.aux_loss_enabled)
        if args.comlora_rows == "shared" and self.padding_free:
            self.data_collator = LineCollator(self.data_collator)
        zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        if is_quantized(model.get_base_model()) and model.selector is not None and not zero3:
            model.selector.float()  # TRL makes all that trains over a quantised base bfloat16, as QLoRA's adapters are
        # The loss is normalised over the whole step, whatever the base model says about its own
        self.model_accepts_loss_kwargs = True
        self._settings = model.settings
        self._own_losses = OwnLosses(self)
        self._exported: set[Path] = set()
        self.retired_files = Background()
        self._unlogged = self._decided = False
        self._resumed: CompetitionState | None = None
        self._plan: StepPlan | None = None
        self._sums = StepSums(model.settings.k, self.args.device)
        self._window = LogWindow(model.settings.k)
        self._norms: Tensor | None = None
        self._flos_per_token: float | None = None
        # Right after the Trainer's own flow control, which the callback list begins with
        self.callback_handler.callbacks.insert(1, CompetitionFlow(self))

    @property
    def comlora_model(self) -> ComLoRAModel:
        """The model with its branches and selector, out of any DDP, FSDP or DeepSpeed wrapper."""
        if isinstance(self.model, ComLoRAModel):  # unwrapping would walk through every module, at every step
            return self.model
        return self.accelerator.unwrap_model(self.model)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; at its end the winner is chosen, the table of the branches printed and the winner exported.

        Each call is a competition of its own; one that resumes goes on with its checkpoint's.
        """
        if self.args.should_save:
            check_target(self.args.winner_dir, self._may_overwrite(Path(self.args.winner_dir)))
        self._resumed = None
        self.restore_retired()
        self.comlora_model.competition_state = CompetitionState.new(self._settings.k)
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            folder = get_last_checkpoint(self.args.output_dir) if folder is True else folder
            if folder is not None:
                check_checkpoint(folder, self._settings.k, self.args.comlora_selector)
                self._resumed = load_state(folder)
                self.comlora_model.competition_state = deepcopy(self._resumed)
                self.drop_retired()
        model = self.comlora_model
        path = kernels.selected_kernels(self.args.device, model.peft_config[model.active_adapter].lora_dropout)
        by_module = sharding.gathers_by_module(self.accelerator)
        self.accelerator.print(start_line(model, path, self.args.comlora_branch_chunk, by_module))
        model.competing_in_training = True
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            model.competing_in_training = False
            self.retired_files.wait()

    def begin_competition(self) -> None:
        """Begins a competition, or goes on with that of the checkpoint; again when a smaller batch is tried."""
        model = self.comlora_model
        if self._resumed is not None:
            model.competition_state = deepcopy(self._resumed)
        else:
            revive(model, model.competition_state.disqualified)
            model.competition_state = CompetitionState.new(self._settings.k)
        model.competition_state.rates = self.args.comlora_branch_learning_rates
        self._plan, self._decided, self._unlogged = None, False, False
        self.drop_retired()
        if line := field_line(self.args, self.rungs, self.state.max_steps):  # rungs that fall on one step end here
            self.accelerator.print(line)
        self._sums = StepSums(self._settings.k, self.args.device)
        self._window = LogWindow(self._settings.k)
        self._follow_the_leader()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's competition figures to the Trainer's training logs."""
        if self._unlogged and "loss" not in logs:
            self.log_selection()
        if self.model.training:
            logs.update(self._window.flush())
            if "loss" in logs:
                logs.update(self.tournament_logs())
        super().log(logs, start_time)
        if self._unlogged:
            self.log_selection()

    # ---- Checkpoints: K branches and a selector, whole, whatever the base is sharded by ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's; under FSDP without its copy of the weights, which gathers the base to save one branch."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        sharding.reshard(self.model)  # the optimizer knows these parameters
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.comlora_model.load_branches(resume_from_checkpoint, self.model_wrapped)

    def load_checkpoint_branches(self, folder: str) -> None:
        """Loads a checkpoint's branches, those among them that a rung has retired since."""
        for branch in load_state(folder).living:
            if branch_name(branch) not in self.comlora_model.peft_config:
                self.comlora_model.restore_branch(branch)
        self.comlora_model.load_branches(folder, self.model_wrapped)

    def _load_best_model(self) -> None:
        self.load_checkpoint_branches(self.state.best_model_checkpoint)
        # The winner is the best checkpoint's leader; wins, rungs and disqualifications are the whole run's
        state = self.comlora_model.competition_state
        state.selection = load_state(self.state.best_model_checkpoint).selection
        # A branch that has diverged since can't win: another one of that checkpoint is chosen
        self._decided = state.selection is not None and state.selection["winner"] not in state.disqualified
        self._follow_the_leader()

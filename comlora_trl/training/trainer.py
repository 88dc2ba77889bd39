"""[`ComLoRASFTTrainer`]: TRL's SFT trainer, with K branches in competition instead of one LoRA adapter."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from comlora_trl.branches import kernels
from comlora_trl.competition import CompetitionState, annealing, mean_nll, pairwise_loss
from comlora_trl.training.checkpoints import check_checkpoint, load_state
from comlora_trl.training.config import ComLoRAConfig
from comlora_trl.training.export import check_target, check_writable
from comlora_trl.training.flow import CompetitionFlow
from comlora_trl.training.gradients import (
    clip_gradients,
    disqualify,
    drop_selector_gradient,
    gradient_norms,
    revive,
)
from comlora_trl.training.hold_out import hold_out
from comlora_trl.training.model import BranchPass, ComLoRAModel, CompetitionOutput
from comlora_trl.training.preparation import (
    build_comlora_model,
    check_columns,
    check_parallelism,
    check_trainer_arguments,
    load_base_model,
)
from comlora_trl.training.report import start_line
from comlora_trl.training.selection import WinnerSelection
from comlora_trl.training.statistics import LogWindow, StepSums
from comlora_trl.training.step_plan import StepPlan
from comlora_trl.training.trying import try_branches


class ComLoRASFTTrainer(WinnerSelection, SFTTrainer):
    """
    Trainer for ComLoRA: K LoRA branches compete, and the winner leaves as an ordinary PEFT adapter.

    Takes the arguments of TRL's [`~trl.SFTTrainer`]. `peft_config` describes each branch (default: rank 8 on q, k, v,
    up and down); the competition's settings are in [`ComLoRAConfig`]. Without an `eval_dataset`,
    `comlora_validation_size` examples are taken out of the training set to choose the winner. [`train`] ends with a
    table of the branches and exports the winner to `comlora_winner_dir`.

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
    _paper = {
        "title": "ComLoRA: A Competitive Learning Approach for Enhancing LoRA",
        "id": None,
        "citation": (
            "@inproceedings{comlora2025,\n"
            "    title        = {{ComLoRA: A Competitive Learning Approach for Enhancing LoRA}},\n"
            "    booktitle    = {The Thirteenth International Conference on Learning Representations},\n"
            "    year         = 2025,\n"
            "}"
        ),
    }

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
        check_trainer_arguments(args, compute_loss_func, optimizers[0])
        if args.should_save:
            check_writable(args.output_dir, "output_dir")
            check_target(args.winner_dir, args.comlora_overwrite_winner)
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a Dataset or an IterableDataset to train on.")
        check_columns(train_dataset, "training", formatting_func)
        train_dataset, eval_dataset = hold_out(train_dataset, eval_dataset, args)

        # The branches draw their A from the seed, as SFTTrainer's adapter does
        set_seed(args.seed)
        if isinstance(model, str):
            model = load_base_model(model, args, quantization_config)
            quantization_config, args.model_init_kwargs = None, None
        model = build_comlora_model(model, peft_config, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            formatting_func=formatting_func,
        )
        check_parallelism(self.accelerator, args)
        try_branches(model, self.data_collator, self.accelerator, self.padding_free, self.aux_loss_enabled)
        # The loss below is normalised over the whole step, whatever the base model says about its own
        self.model_accepts_loss_kwargs = True
        self._settings = model.settings
        self._exported: set[Path] = set()
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
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            folder = get_last_checkpoint(self.args.output_dir) if folder is True else folder
            if folder is not None:
                check_checkpoint(folder, self._settings.k, self.args.comlora_selector)
                self._resumed = load_state(folder)
        model = self.comlora_model
        path = kernels.selected_kernels(self.args.device, model.peft_config[model.active_adapter].lora_dropout)
        self.accelerator.print(start_line(model, path, self.args.comlora_branch_chunk))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin_competition(self) -> None:
        """Begins a competition, or goes on with that of the checkpoint; again when a smaller batch is tried."""
        model, before = self.comlora_model, self.comlora_model.competition_state
        if self._resumed is not None:
            model.competition_state = deepcopy(self._resumed)
        else:
            revive(model, before.disqualified)
            model.competition_state = CompetitionState.new(self._settings.k)
        self._plan, self._decided = None, False
        self._sums = StepSums(self._settings.k, self.args.device)
        self._window = LogWindow(self._settings.k)
        self._follow_the_leader()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetches an optimizer step's micro-batches, counts M and plans their rows' places in the step's noise."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._plan = StepPlan.of(batches, self.accelerator)
        return batches, self._normaliser(self._plan)

    def _normaliser(self, plan: StepPlan | None) -> Tensor | None:
        if plan is None:
            return None
        return plan.tokens if self.args.average_tokens_across_devices else plan.own_tokens

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch's forward and backward; the last one of a step also ends the step for the competition."""
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self.comlora_model.competing.abandon()  # a backward that ran out of memory leaves its pass open
        if self.accelerator.sync_gradients:
            self._finish_step()
        return loss

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        """TRL's loss over the weighted rows of all branches, L_LM + L_align, plus the pairwise loss.

        In evaluation mode it is TRL's own, of the leader. Called outside the training loop it takes the batch for a
        whole optimizer step.
        """
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._plan is None or self._plan.exhausted:
            self._plan = StepPlan.of([inputs], self.accelerator)
            num_items_in_batch = self._normaliser(self._plan)
        competed: list[CompetitionOutput] = []

        def run(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)  # TRL's extra forward for `return_outputs`, by the active branch
            chunk = self.args.comlora_branch_chunk
            competed.append(model(branch_pass=BranchPass(eta=self._eta(), chunk=chunk), **kwargs))
            return competed[0]

        result = super().compute_loss(run, inputs, return_outputs, num_items_in_batch)
        pairwise = self._pairwise_loss(competed[0])
        if pairwise is None:
            return result
        return (result[0] + pairwise, result[1]) if return_outputs else result + pairwise

    def _eta(self) -> float:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return annealing(progress, self._settings.annealing, self._settings.annealing_rate)

    def _pairwise_loss(self, output: CompetitionOutput) -> Tensor | None:
        """This micro-batch's pairwise loss, scaled for DDP's mean over processes; adds its figures to the step's."""
        scores, tokens, settings = output.scores, output.tokens, self._settings
        noise, num_rows = self._plan.next(self.args.seed, self.state.global_step, settings.k, tokens.device)
        alive = self.comlora_model.alive(tokens.device)
        if scores is None:
            self._sums.add(output.nll, tokens, alive, None, None)
            return None
        in_race = alive & output.nll.isfinite().all(dim=1)
        loss = pairwise_loss(scores, mean_nll(output.nll, tokens), noise, tokens > 0, num_rows, settings, in_race)
        loss = loss * settings.pairwise_weight
        self._sums.add(output.nll, tokens, alive, output.probabilities, loss)
        return loss * self.accelerator.num_processes

    def _finish_step(self) -> None:
        """Ends an optimizer step: disqualifies diverged branches, counts the win, keeps the step's figures."""
        k, model, step = self._settings.k, self.comlora_model, self.state.global_step + 1
        self._norms = gradient_norms(model)
        finite = self._norms.isfinite()
        self._norms = self._norms.where(finite, torch.zeros_like(self._norms))  # those gradients are dropped below
        # With fp16's loss scaler an overflow is no divergence; DeepSpeed keeps the gradients to itself
        seen = self.accelerator.scaler is None and not self.is_deepspeed_enabled
        if seen:
            self._sums.vector[2 * k : 3 * k] += (~finite[:k]).to(self._sums.vector)
            self._sums.vector[-5] += (~finite[k]).to(self._sums.vector)
        sums = self.accelerator.reduce(self._sums.vector, reduction="sum").tolist()
        self._sums = StepSums(k, self.args.device)
        state = model.competition_state
        for branch in range(k):
            if sums[2 * k + branch] and branch not in state.disqualified:
                disqualify(model, branch, step)
        for branch in state.disqualified:
            for parameter in model.branch_parameters(branch):
                parameter.grad = None
        if sums[-5]:
            drop_selector_gradient(model, step)
        if not any(state.alive):
            raise RuntimeError(
                f"all {k} branches have diverged by step {step}: lower learning_rate={self.args.learning_rate}, or "
                "set max_grad_norm, and train again."
            )
        best = self._window.add_step(sums, self._eta(), state.alive, self._settings)
        if best is not None:
            state.wins[best] += 1

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips each branch and the selector by itself. A private seam of transformers: without it they are clipped
        together, by a norm that one of them can dominate."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
            self._norms = gradient_norms(self.comlora_model)
        return clip_gradients(self.comlora_model, self._norms, self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate for the rows of all branches; it counts the parameters once, not at every step."""
        tokens = inputs["input_ids"].numel()
        if self._flos_per_token is None:
            self._flos_per_token = super().floating_point_ops(inputs) / max(tokens, 1)
        return int(self._flos_per_token * tokens * sum(self.comlora_model.competition_state.alive))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the selector in parameter groups of its own if it has its own rate."""
        rate = self.args.comlora_selector_learning_rate
        existed = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if rate is None or self.comlora_model.selector is None or existed:
            return optimizer
        own = {id(parameter) for parameter in self.comlora_model.selector.parameters()}
        for group in list(optimizer.param_groups):
            selector = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            if selector:
                optimizer.add_param_group({**group, "params": selector, "lr": rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's competition figures to the Trainer's training logs."""
        if self._unlogged and "loss" not in logs:
            self.log_selection()
        if self.model.training:
            logs.update(self._window.flush())
        super().log(logs, start_time)
        if self._unlogged:
            self.log_selection()

    # ---- Checkpoints: the Trainer's loading knows one adapter per folder; K branches and a selector load here ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.comlora_model.load_branches(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.comlora_model.load_branches(self.state.best_model_checkpoint)
        # The winner is the best checkpoint's leader; wins and disqualifications are the whole run's
        state = self.comlora_model.competition_state
        state.selection = load_state(self.state.best_model_checkpoint).selection
        self._decided = state.selection is not None
        self._follow_the_leader()

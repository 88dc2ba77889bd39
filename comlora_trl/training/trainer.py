"""[`ComLoRASFTTrainer`]: TRL's SFT trainer, with K branches in competition instead of one LoRA adapter."""

from collections.abc import Callable
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
from comlora_trl.competition import annealing, mean_nll, pairwise_loss
from comlora_trl.training.checkpoints import check_checkpoint
from comlora_trl.training.config import ComLoRAConfig
from comlora_trl.training.divergence import disqualify, non_finite_gradients
from comlora_trl.training.export import check_target, check_writable
from comlora_trl.training.micro_batches import MicroBatches, PackedRowsCollator
from comlora_trl.training.model import BranchPass, ComLoRAModel, CompetitionOutput
from comlora_trl.training.preparation import (
    build_comlora_model,
    check_columns,
    check_not_empty,
    check_parallelism,
    check_trainer_arguments,
    hold_out,
    load_base_model,
)
from comlora_trl.training.report import print_table, start_line
from comlora_trl.training.selection import WinnerSelection
from comlora_trl.training.statistics import LogWindow, StepSums
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
        if eval_dataset is None:
            train_dataset, eval_dataset = hold_out(train_dataset, args.comlora_validation_size, args.seed)
        check_not_empty(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])

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
        if self.padding_free:
            self.data_collator = PackedRowsCollator(self.data_collator)
        check_parallelism(self.accelerator, args)
        try_branches(model, self.data_collator, self.accelerator, self.padding_free, self.aux_loss_enabled)
        self._settings = model.settings
        self._micro_batches: MicroBatches | None = None
        self._sums = StepSums(model.settings.k, self.args.device)
        self._window = LogWindow(model.settings.k)
        self._flos_per_token: float | None = None

    @property
    def comlora_model(self) -> ComLoRAModel:
        """The model with its branches and selector, out of any DDP, FSDP or DeepSpeed wrapper."""
        if isinstance(self.model, ComLoRAModel):  # unwrapping would walk through every module, at every step
            return self.model
        return self.accelerator.unwrap_model(self.model)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, then chooses the winner, prints the table of the branches and exports the winner."""
        if resume_from_checkpoint:
            folder = resume_from_checkpoint
            folder = get_last_checkpoint(self.args.output_dir) if folder is True else folder
            if folder is not None:
                check_checkpoint(folder, self._settings.k, self.args.comlora_selector)
        model = self.comlora_model
        path = kernels.selected_kernels(self.args.device, model.peft_config[model.active_adapter].lora_dropout)
        self.accelerator.print(start_line(model, path, self.args.comlora_branch_chunk))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.determine_winner()
        folder = self.export_winner(self.args.winner_dir)
        if self.is_world_process_zero():
            print_table(self._summary())
        self.accelerator.print(f"winner: branch_{self._winner} in {folder}")
        return output

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Fetches an optimizer step's micro-batches, and plans their rows' places in the step's noise."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_batches = MicroBatches.plan(batches, self.accelerator)
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch's forward and backward; the last one of a step also ends the step for the competition."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._finish_step()
        return loss

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        """TRL's loss over the K·B weighted rows, L_LM + L_align, plus the pairwise loss."""
        rows_per_example = inputs.pop("rows_per_example", None)
        examples = inputs["input_ids"].size(0) if rows_per_example is None else rows_per_example.numel()
        competed: list[CompetitionOutput] = []

        def run(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)  # TRL's extra forward for `compute_metrics`, by the active branch
            chunk = self.args.comlora_branch_chunk
            competed.append(model(branch_pass=BranchPass(eta=self._eta(), chunk=chunk), **kwargs))
            return competed[0]

        training = self.model.training
        result = super().compute_loss(run, inputs, return_outputs, num_items_in_batch)
        if training:
            pairwise = self._pairwise_loss(competed[0])
            return result if pairwise is None else result + pairwise
        self._add_to_tally(competed[0], rows_per_example, examples)
        return result

    def _eta(self) -> float:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return annealing(progress, self._settings.annealing, self._settings.annealing_rate)

    def _pairwise_loss(self, output: CompetitionOutput) -> Tensor | None:
        """This micro-batch's pairwise loss, scaled for DDP's mean over processes; adds its figures to the step's."""
        scores, tokens, settings = output.scores, output.tokens, self._settings
        noise, num_rows = self._micro_batches.next(self.args.seed, self.state.global_step, settings.k, tokens.device)
        alive = self.comlora_model.alive(tokens.device)
        if scores is None:
            self._sums.add(output.nll, tokens, None, None)
            return None
        in_race = alive & output.nll.isfinite().all(dim=1)
        loss = pairwise_loss(scores, mean_nll(output.nll, tokens), noise, tokens > 0, num_rows, settings, in_race)
        loss = loss * settings.pairwise_weight
        self._sums.add(output.nll, tokens, output.probabilities, loss)
        return loss * self.accelerator.num_processes

    def _finish_step(self) -> None:
        """Ends an optimizer step: disqualifies diverged branches, counts the win, keeps the step's figures."""
        k, model = self._settings.k, self.comlora_model
        # With fp16's loss scaler an overflow is no divergence; DeepSpeed keeps the gradients to itself
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            self._sums.vector[2 * k : 3 * k] += non_finite_gradients(model).to(self._sums.vector)
        sums = self.accelerator.reduce(self._sums.vector, reduction="sum").tolist()
        self._sums = StepSums(k, self.args.device)
        state = model.competition_state
        for branch in range(k):
            if sums[2 * k + branch] and branch not in state.disqualified:
                disqualify(model, branch, self.state.global_step + 1)
        for branch in state.disqualified:
            for parameter in model.branch_parameters(branch):
                parameter.grad = None
        alive = [branch not in state.disqualified for branch in range(k)]
        if not any(alive):
            raise RuntimeError(
                f"all {k} branches have diverged by step {self.state.global_step + 1}: lower learning_rate="
                f"{self.args.learning_rate}, or set max_grad_norm, and train again."
            )
        best = self._window.add_step(sums, self._eta(), alive, self._settings)
        if best is not None:
            state.wins[best] += 1

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips what is trained. The Trainer's own walks through all modules of the model twice, at every step.

        A private seam of transformers; without it training is the same, and slower.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self.comlora_model.trainable_parameters(), self.args.max_grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate for the K·B rows; it counts the model's parameters once, not at every step."""
        tokens = inputs["input_ids"].numel()
        if self._flos_per_token is None:
            self._flos_per_token = super().floating_point_ops(inputs) / max(tokens, 1)
        return int(self._flos_per_token * tokens * self._settings.k)

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
        if self.model.training:
            logs.update(self._window.flush())
        super().log(logs, start_time)

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

"""[`ComLoRASFTTrainer`]: TRL's SFT trainer with K competing LoRA branches instead of one adapter."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer

from comlora_trl.branches.views import BranchView
from comlora_trl.training.arguments import settle_arguments
from comlora_trl.training.attach import Attachment
from comlora_trl.training.competition import ROWS_PER_LINE
from comlora_trl.training.config import ComLoRAConfig
from comlora_trl.training.data_checks import check_columns, check_prepared
from comlora_trl.training.hold_out import hold_out
from comlora_trl.training.model import CompetitionOutput
from comlora_trl.training.own_loss import UndecidedView
from comlora_trl.training.trainer import CompetingTrainer


class ComLoRASFTTrainer(CompetingTrainer, SFTTrainer):
    """
    Trainer for K LoRA branches that compete in supervised fine-tuning. The winner is exported as an ordinary PEFT
    adapter.

    Takes the arguments of TRL's [`~trl.SFTTrainer`]. `peft_config` describes each branch (default: rank 8 on q, k, v,
    up and down). The settings of the competition are in [`ComLoRAConfig`]. Without an `eval_dataset`,
    `comlora_validation_size` examples are taken out of the training set to choose the winner. [`train`] prints a table
    of the branches at its end, and exports the winner with a model card to `comlora_winner_dir`. Set
    `trainer.data_name` to name the training data on the card.

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
        args = settle_arguments(
            args, ComLoRAConfig, model, self._name, train_dataset, optimizers[0], compute_loss_func
        )
        check_columns(train_dataset, "training", formatting_func, args.dataset_text_field, args.comlora_prompt)
        train_dataset, eval_dataset = hold_out(train_dataset, eval_dataset, args)

        attachment = Attachment(model, peft_config, args, processing_class, quantization_config)
        with attachment.building() as given:
            super().__init__(
                args=args,
                data_collator=data_collator,
                compute_loss_func=compute_loss_func,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                formatting_func=formatting_func,
                **given,
            )
        check_prepared(self.train_dataset, self.eval_dataset, args.max_length)
        self.compete(attachment)

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        """The loss L_LM + L_align + L_pair (eq. 10): TRL's loss over the weighted rows, plus the pairwise loss.

        In evaluation mode, the result is TRL's loss of the leader. With a branch's view as the model, it is TRL's loss
        of that branch. Outside a training step, the batch counts as a whole optimizer step, and the run's figures do
        not change.
        """
        if type(model) is UndecidedView:
            model = model.views.wrapped
        if not self.model.training or isinstance(model, BranchView):
            inputs.pop(ROWS_PER_LINE, None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._in_step:
            with self._own_step(inputs) as tokens:
                return self._branches_loss(model, inputs, return_outputs, tokens)
        return self._branches_loss(model, inputs, return_outputs, num_items_in_batch)

    _competing_loss = compute_loss

    @property
    def _loss_is_per_branch(self) -> bool:
        """Whether TRL's loss is not a sum over rows and must be computed from each branch's outputs."""
        smoothed = self.args.loss_type == "nll" and self.label_smoother is not None
        return self.compute_loss_func is not None or self.args.loss_type == "dft" or smoothed

    def _branches_loss(self, model: Any, inputs: dict, return_outputs: bool, tokens: Any) -> Any:
        if self._loss_is_per_branch:
            return self.own_losses.per_view(super().compute_loss, model, inputs, return_outputs, tokens)
        rows = self.competition.rows_of(inputs)
        outputs: list[CompetitionOutput] = []

        def run_branches(**kwargs: Any) -> Any:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)  # TRL runs an extra forward for `return_outputs`, which uses the active branch
            outputs.append(model(branch_pass=rows, **kwargs))
            return outputs[0]

        result = super().compute_loss(run_branches, inputs, return_outputs, tokens)
        loss = result[0] if return_outputs else result
        if self.aux_loss_enabled and self.competition.settings.independent:
            # TRL adds the mean of the branches' router losses, but independent branches need the sum
            others = len(self.competition.state.living) - 1
            steps = self.current_gradient_accumulation_steps
            loss = loss + others * self.router_aux_loss_coef * outputs[0].aux_loss / steps
        loss = self.competition.combine(loss, outputs[0])
        return (loss, result[1]) if return_outputs else loss

    @contextmanager
    def _own_step(self, inputs: dict) -> Any:
        """Within the block, a batch counts as a whole optimizer step; afterwards everything is restored.

        It is used for losses that are computed outside the training loop or by a callback.
        """
        kept = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = 1  # TRL divides the routers' loss by this number
        try:
            with self.competition.own_step(inputs) as tokens:
                yield tokens
        finally:
            self.current_gradient_accumulation_steps = kept

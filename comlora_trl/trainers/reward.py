"""[`ComLoRARewardTrainer`]: TRL's reward trainer with K competing LoRA branches instead of one adapter."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from trl import RewardTrainer

from comlora_trl.training.config import ComLoRARewardConfig
from comlora_trl.training.preferences import CompetingPreferences


class ComLoRARewardTrainer(CompetingPreferences, RewardTrainer):
    """
    Trainer for K LoRA branches that compete as reward models. The winner is exported as an ordinary PEFT adapter.

    Takes the arguments of TRL's [`~trl.RewardTrainer`]. Each branch trains its adapter and its copy of the score head
    (`modules_to_save`) by TRL's loss, as it would in a run with one branch. The saved adapter includes the score head.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from comlora_trl import ComLoRARewardConfig, ComLoRARewardTrainer

    >>> trainer = ComLoRARewardTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=ComLoRARewardConfig("output", comlora_tournament=True),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ...     peft_config=LoraConfig(r=16, task_type="SEQ_CLS"),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "reward-trainer", "comlora"]
    _name = "ComLoRA Reward"

    classifier = True
    has_reference = False
    branch_metric = ("reward_accuracy", "accuracy")
    columns = (("chosen", "rejected"), ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"))

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        with self.preparing(
            model,
            args,
            ComLoRARewardConfig,
            train_dataset,
            eval_dataset,
            optimizers,
            peft_config=peft_config,
            processing_class=processing_class,
            quantization_config=quantization_config,
        ) as given:
            super().__init__(
                data_collator=data_collator,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                **given,
            )

    def made_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors that TRL's loss derives from a batch and passes to the model: none."""
        return {}

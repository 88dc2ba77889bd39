"""[`ComLoRADPOTrainer`]: TRL's DPO trainer with K competing LoRA branches instead of one adapter."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from trl import DPOTrainer

from comlora_trl.training.config import ComLoRADPOConfig
from comlora_trl.training.preferences import ReferenceOnce


class ComLoRADPOTrainer(ReferenceOnce, DPOTrainer):
    """
    Trainer for K LoRA branches that compete in DPO. The winner is exported as an ordinary PEFT adapter.

    Takes the arguments of TRL's [`~trl.DPOTrainer`]. Each branch trains by TRL's loss, with any `loss_type`, as it
    would in a run with one branch. Branches differ in learning rate, β or initialisation. The reference's
    log-probabilities are computed once for all branches.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from comlora_trl import ComLoRADPOConfig, ComLoRADPOTrainer

    >>> trainer = ComLoRADPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=ComLoRADPOConfig("output", comlora_tournament=True),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "dpo", "comlora"]
    _name = "ComLoRA DPO"

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        with self.preparing(
            model,
            args,
            ComLoRADPOConfig,
            train_dataset,
            eval_dataset,
            optimizers,
            peft_config=peft_config,
            processing_class=processing_class,
            quantization_config=quantization_config,
            ref_model=ref_model,
        ) as given:
            super().__init__(
                ref_model=ref_model,
                data_collator=data_collator,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                **given,
            )

    def reference_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The reference's log-probabilities of a batch, by TRL's names for them in a batch."""
        chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

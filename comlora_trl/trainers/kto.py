"""[`ComLoRAKTOTrainer`]: TRL's KTO trainer with K competing LoRA branches instead of one adapter."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from trl import KTOTrainer

from comlora_trl.branches.views import BranchView
from comlora_trl.competition import ValidationTally
from comlora_trl.training.averages import WeightAverages
from comlora_trl.training.config import ComLoRAKTOConfig
from comlora_trl.training.evaluation import Measured
from comlora_trl.training.model import BranchPass
from comlora_trl.training.preferences import ReferenceOnce

logger = get_logger(__name__)


class _Recording(BranchView):
    """A view that stores the output of its newest call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        object.__setattr__(self, "newest", output)
        return output

    forward = __call__


class ComLoRAKTOTrainer(ReferenceOnce, KTOTrainer):
    """
    Trainer for K LoRA branches that compete in KTO. The winner is exported as an ordinary PEFT adapter.

    Takes the arguments of TRL's [`~trl.KTOTrainer`]. Each branch trains by TRL's loss, as it would in a run with one
    branch. The KL term of a branch is estimated from the branch's rows of a micro-batch, as TRL estimates it from all
    rows.

    The branch with the highest reward accuracy wins. KTO's data is not paired, so this is defined over all pairs of a
    desirable and an undesirable validation example: the share of pairs in which the desirable example has the higher
    implied reward. This figure does not need the KL term, whose estimate from one batch is noisy. It does not depend
    on the scale of β, so branches with different β can be compared.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from peft import LoraConfig
    >>> from comlora_trl import ComLoRAKTOConfig, ComLoRAKTOTrainer

    >>> trainer = ComLoRAKTOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=ComLoRAKTOConfig("output", comlora_tournament=True),
    ...     train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
    ...     peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "kto", "comlora"]
    _name = "ComLoRA KTO"

    stacked = 1
    gathers_lines = False
    branch_metric = ("reward_margin", "rewards/margins")
    columns = (("prompt", "completion", "label"), ("chosen", "rejected"))

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
            ComLoRAKTOConfig,
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
        self._rewards: list[tuple[list[list[float]], list[bool]]] = []
        self._check_labels()

    def _check_labels(self) -> None:
        """Checks that the validation examples have both labels. With one label there is no reward accuracy.

        Then a warning says that the loss decides, or, if losses can't be compared, an error is raised.

        Raises:
            ValueError: if nothing can decide.
        """
        if self.args.comlora_k == 1 or self.args.winner_by != "validation_accuracy" or self.eval_dataset is None:
            return
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        if any(isinstance(one, IterableDataset) for one in sets):
            return
        labels = {bool(label) for one in sets for label in one["label"]}
        if len(labels) > 1:
            return
        line = f"every validation example has label={labels.pop()}, so that no reward accuracy can be measured"
        if self.competition.settings.comparable:
            logger.warning(f"{line}: the validation loss chooses the winner; give an eval_dataset with both labels.")
            return
        raise ValueError(f"{line}, and losses of different beta can't be compared: give an eval_dataset with both.")

    def reference_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The reference's log-probabilities of a batch, by TRL's names for them in a batch."""
        own, kl = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return {"ref_logps": own} | ({"ref_KL_logps": kl} if self.calculate_KL else {})

    def made_of(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors that TRL's loss derives from a batch and passes to the model."""
        names = ("", "KL_") if self.calculate_KL else ("",)
        return {
            f"{name}labels": inputs[f"{name}input_ids"].masked_fill(inputs[f"{name}completion_mask"] == 0, -100)
            for name in names
        }

    # ---- Validation: the reward accuracy is over all pairs of examples of the validation set, not of a batch ----

    def _measure(self, averages: WeightAverages | None = None) -> ValidationTally:
        self._rewards = []
        tally = super()._measure(averages)
        gathered, self._rewards = gather_object(self._rewards), []
        labels = torch.tensor([label for _, some in gathered for label in some], dtype=torch.bool)
        rewards = torch.tensor([row for some, _ in gathered for row in some], dtype=torch.float64)
        if labels.numel():
            k = tally.k
            tally.sums[2 * k : 3 * k] = tally.sums[-2] * reward_accuracy(rewards, labels).to(tally.sums)
        return tally

    def measure_batch(self, model: Any, inputs: dict[str, Any], rows: BranchPass, count: int) -> Measured:
        """TRL's loss of every living branch, times the number of rows in the batch. The implied rewards are stored."""
        rewards: dict[int, Tensor] = {}

        def loss_of(view: BranchView) -> Tensor:
            recording = _Recording(view.views, view.place)
            loss = self.trls_loss(recording, view.inputs)
            rewards[view.branch] = recording.newest.log_probs.sum(-1) - view.inputs["ref_logps"]
            return loss

        measured = self.measure_branches(model, inputs, rows, loss_of)
        if count:
            nowhere = torch.full_like(next(iter(rewards.values())), float("nan"))
            own = torch.stack([rewards.get(branch, nowhere) for branch in range(self.args.comlora_k)], dim=1)
            self._rewards.append((own.tolist(), inputs["label"].bool().tolist()))
        return measured


def reward_accuracy(rewards: Tensor, labels: Tensor) -> Tensor:
    """The share of pairs of a desirable and an undesirable example in which the desirable one has the higher reward.

    This is the area under the ROC curve. Pairs with equal rewards count half.

    Args:
        rewards: implied rewards on any scale, [N, K].
        labels: bool [N], True for desirable examples.

    Returns:
        the share for each branch, [K]; nan if there is no pair or a reward is nan.
    """
    good, bad = rewards[labels], rewards[~labels]
    shares = []
    for branch in range(rewards.size(1)):
        gaps = good[:, branch, None] - bad[None, :, branch]
        right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
        shares.append(torch.where(gaps.isnan().any(), torch.nan, right.mean()))
    return torch.stack(shares)

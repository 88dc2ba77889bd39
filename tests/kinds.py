"""TRL's trainers and ours beside them: data, models and runs that the tests share."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer
from datasets import Dataset
from torch import nn
from transformers import LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from comlora_trl import (
    ComLoRAConfig,
    ComLoRADPOConfig,
    ComLoRADPOTrainer,
    ComLoRAKTOConfig,
    ComLoRAKTOTrainer,
    ComLoRARewardConfig,
    ComLoRARewardTrainer,
    ComLoRASFTTrainer,
)


def make_pairs(rows: int = 64, seed: int = 0) -> Dataset:
    """A reversed word is preferred to the word itself, once or twice; lengths are ragged."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 9))) for _ in range(rows)]
    return Dataset.from_list(
        [
            {"prompt": f"reverse {word}:", "chosen": f" {word[::-1]}", "rejected": f" {word}" * draw.randint(1, 2)}
            for word in words
        ]
    )


def make_labelled(rows: int = 64, seed: int = 0) -> Dataset:
    """The completions of `make_pairs`, desirable or not, in no order."""
    draw = random.Random(seed + 1)
    examples = []
    for pair in make_pairs(rows, seed):
        label = draw.random() < 0.6
        completion = pair["chosen"] if label else pair["rejected"]
        examples.append({"prompt": pair["prompt"], "completion": completion, "label": label})
    return Dataset.from_list(examples)


def make_classifier(seed: int = 0) -> nn.Module:
    """A reward model of the size of `make_model`."""
    config = make_model(seed).config
    config.num_labels = 1
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config)


@dataclass(frozen=True)
class Kind:
    """A trainer of ours and TRL's.

    Attributes:
        losses: options, each of which asks for another loss.
        model: a model whose runs can be compared over ten steps, in float64 where float32 goes apart.
        single: one in float32.
        of_any_cut: options with which TRL's loss is a mean over rows, whatever the micro-batches.
    """

    name: str
    ours: type
    config: type
    trls: type
    trls_config: type
    losses: list[dict[str, Any]]
    data: Callable[..., Dataset] = make_pairs
    model: Callable[[], nn.Module] = make_model
    single: Callable[[], nn.Module] = make_model
    lora: dict[str, Any] = field(default_factory=dict)
    of_any_cut: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def run(self, folder: Path, trl: bool = False, given: dict | None = None, **options: Any) -> Any:
        """One of our trainers, or one of TRL's, which has not trained yet."""
        kind, config = (self.trls, self.trls_config) if trl else (self.ours, self.config)
        defaults = {"max_steps": 10, "per_device_train_batch_size": 6, "seed": 3}
        defaults |= {"train_sampling_strategy": "sequential"}
        data = {"train_dataset": self.data(), "eval_dataset": self.data(13, seed=1), "model": self.model()}
        data |= {"processing_class": make_tokenizer(), "peft_config": make_lora(**self.lora)}
        return kind(**data | (given or {}), args=config(**make_arguments(folder, **defaults | options)))


SFT = Kind("sft", ComLoRASFTTrainer, ComLoRAConfig, SFTTrainer, SFTConfig, losses=[{}], data=make_dataset)
DPO = Kind(
    "dpo",
    ComLoRADPOTrainer,
    ComLoRADPOConfig,
    DPOTrainer,
    DPOConfig,
    losses=[
        {},
        {"loss_type": "hinge"},
        {"loss_type": "ipo", "beta": 0.5},
        {"loss_type": "exo_pair", "label_smoothing": 0.05},
        {"loss_type": "nca_pair"},
        {"loss_type": "robust", "label_smoothing": 0.1},
        {"loss_type": "bco_pair"},
        {"loss_type": "sppo_hard", "beta": 0.5},
        {"loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": "apo_zero"},
        {"loss_type": "apo_down"},
        {"loss_type": "discopop"},
        {"loss_type": "sft"},
        {"loss_type": "sigmoid_norm"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
        {"f_divergence_type": "js_divergence"},
        {"use_weighting": True},
        {"ld_alpha": 0.4},
        {"precompute_ref_log_probs": True},
    ],
)
REWARD = Kind(
    "reward",
    ComLoRARewardTrainer,
    ComLoRARewardConfig,
    RewardTrainer,
    RewardConfig,
    losses=[{}, {"center_rewards_coefficient": 0.1}],
    model=lambda: make_classifier().double(),
    single=make_classifier,
    lora={"task_type": "SEQ_CLS"},
)
KTO = Kind(
    "kto",
    ComLoRAKTOTrainer,
    ComLoRAKTOConfig,
    KTOTrainer,
    KTOConfig,
    losses=[
        {},
        {"loss_type": "apo_zero_unpaired"},
        {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.5},
        {"precompute_ref_log_probs": True},
        {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True},
    ],
    data=make_labelled,
    # TRL's KL term is of a micro-batch, and its rows are made for the size of that
    of_any_cut={"loss_type": "apo_zero_unpaired"},
)
KINDS = [DPO, REWARD, KTO]  # the preference trainers


def name_of(options: dict[str, Any]) -> str:
    """A test's name, of its options."""
    return "-".join(f"{value}" for value in options.values()) or "plain"


def perturb(trainer: Any) -> None:
    """Moves every branch off its start, the same way in each trainer: a loss has a gradient in A from then on."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.comlora_model.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def start_from(trl: Any, ours: Any, branch: int) -> None:
    """Gives one of TRL's trainers the weights of a branch."""
    start = {name.replace(f"branch_{branch}", "default"): p for name, p in ours.comlora_model.named_parameters()}
    with torch.no_grad():
        for name, parameter in trl.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])


def difference(ours: Any, branch: int, trl: Any) -> float:
    """The largest difference between a branch's weights and those of one of TRL's trainers."""
    own = {name.replace(f"branch_{branch}", "default"): p for name, p in ours.comlora_model.named_parameters()}
    trained = {name: p for name, p in trl.model.named_parameters() if p.requires_grad}
    assert trained
    return max((own[name] - parameter).abs().max().item() for name, parameter in trained.items())


def logged(trainer: Any, name: str) -> list[float]:
    """A figure's values over a run."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]

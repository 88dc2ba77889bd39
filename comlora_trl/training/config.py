"""[`ComLoRAConfig`]: TRL's `SFTConfig` with the competition's settings, each checked where it arrives."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from comlora_trl.competition import ANNEALING_SCHEDULES, EQUATION_SIGNS, CompetitionSettings
from comlora_trl.competition.selector import SELECTOR_INPUTS, SelectorSettings

WINNER_CRITERIA = ("selector", "validation_loss", "validation_accuracy")


@dataclass
class ComLoRAConfig(SFTConfig):
    """
    Configuration of the [`ComLoRASFTTrainer`]: every field of TRL's `SFTConfig`, and those of the competition, whose
    names begin with `comlora_`. Each field's help text is its documentation (`scripts/sft.py --help` prints them).

    > [!NOTE]
    > `learning_rate` defaults to `1e-4` instead of TRL's `2e-5`, as LoRA and the paper use it.

    Raises:
        ValueError: if a value is out of its range; the message names the value, what is allowed and what to do.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})

    comlora_k: int = field(
        default=2, metadata={"help": "Number of LoRA branches that compete (K). 1 without a selector is plain LoRA."}
    )
    comlora_top_n: int | None = field(
        default=None,
        metadata={"help": "Branches per row that share the alignment loss (N), 1..K. None means all K."},
    )
    comlora_annealing: str = field(
        default="exponential",
        metadata={
            "help": "Schedule of the alignment loss's weight over training (eta, eq. 13-14): 'exponential', "
            "'constant', 'cosine' or 'linear'.",
            "choices": sorted(ANNEALING_SCHEDULES),
        },
    )
    comlora_annealing_rate: float = field(
        default=5.0, metadata={"help": "Rate of the exponential schedule (gamma), 1 - exp(-gamma * t/T); above 0."}
    )
    comlora_noise: float = field(
        default=0.1,
        metadata={
            "help": "Intensity of the noise on the losses that train the selector (alpha, eq. 6), in nats; >= 0."
        },
    )
    comlora_lm_weight: float = field(
        default=1.0, metadata={"help": "Weight of the language-modelling loss (eq. 4); 0 removes it."}
    )
    comlora_alignment_weight: float = field(
        default=1.0, metadata={"help": "Weight of the alignment loss (eq. 5); 0 removes it."}
    )
    comlora_pairwise_weight: float = field(
        default=1.0, metadata={"help": "Weight of the pairwise loss that trains the selector (eq. 9); 0 removes it."}
    )
    comlora_selector: bool = field(
        default=True,
        metadata={
            "help": "Whether to train a selector. Without it the branches train by eq. 4 alone and the winner is the "
            "branch with the lowest validation NLL."
        },
    )
    comlora_selector_dim: int | None = field(
        default=None,
        metadata={"help": "Width of the selector (d_sel). None means the base model's embedding width; 512 is small."},
    )
    comlora_selector_ffn_dim: int | None = field(
        default=None, metadata={"help": "Width of the selector's feed-forward layer. None means 1.5 times its width."}
    )
    comlora_selector_heads: int = field(
        default=8, metadata={"help": "Attention heads of the selector; must divide its width."}
    )
    comlora_selector_input: str = field(
        default="sequence",
        metadata={
            "help": "What the selector reads (X): 'sequence' (prompt and completion) or 'prompt' (the tokens before "
            "the first supervised one).",
            "choices": list(SELECTOR_INPUTS),
        },
    )
    comlora_selector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the selector. None means `learning_rate`."}
    )
    comlora_winner_by: str = field(
        default="selector",
        metadata={
            "help": "How the winner is chosen: 'selector' (highest accumulated score on the validation set, eq. "
            "11-12; without a selector the validation loss), 'validation_loss' (lowest NLL) or "
            "'validation_accuracy' (tokens predicted right).",
            "choices": list(WINNER_CRITERIA),
        },
    )
    comlora_validation_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples taken out of the training set, by the seed, to choose the winner when no eval_dataset "
            "is given. None means 120 or a tenth of the examples, whichever is less."
        },
    )
    comlora_branch_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Branches that run at a time, 1..K. None means all K in one forward; 1 needs a single LoRA's "
            "memory, more time, and gives the same gradients."
        },
    )
    comlora_equation_signs: str = field(
        default="as_described",
        metadata={
            "help": "'as_described' follows the paper's text: the preferred branch's loss goes down and scores follow "
            "performance. 'as_printed' follows the letter of eq. 5 and 7, which raises it; for study.",
            "choices": list(EQUATION_SIGNS),
        },
    )
    comlora_winner_dir: str | None = field(
        default=None,
        metadata={"help": "Folder the winning adapter is exported to. None means `{output_dir}/winner`."},
    )
    comlora_overwrite_winner: bool = field(
        default=False, metadata={"help": "Whether to replace a winner folder that exists and is not empty."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_ranges()
        self._check_choices()

    def _check_ranges(self) -> None:
        k = self.comlora_k
        _require(k >= 1, "comlora_k", k, "1 or more", "1 is plain LoRA, 2 the paper's best setting")
        for name, meaning in (("comlora_top_n", "all K branches"), ("comlora_branch_chunk", "all K at once")):
            value = getattr(self, name)
            _require(
                value is None or 1 <= value <= k, name, value, f"1 to comlora_k={k}", f"leave it out for {meaning}"
            )
        above_zero = ("comlora_annealing_rate", "comlora_selector_heads", "comlora_selector_dim")
        for name in (*above_zero, "comlora_selector_ffn_dim", "comlora_selector_learning_rate"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0", "leave it out for the default")
        for name in ("noise", "lm_weight", "alignment_weight", "pairwise_weight"):
            value = getattr(self, f"comlora_{name}")
            _require(value >= 0, f"comlora_{name}", value, "0 or more", "0 turns it off")
        size = self.comlora_validation_size
        _require(size is None or size > 0, "comlora_validation_size", size, "1 or more", "the paper uses 120")
        if self.comlora_lm_weight == 0 and (self.comlora_alignment_weight == 0 or not self.comlora_selector):
            raise ValueError(
                "comlora_lm_weight=0 without an alignment loss leaves the branches nothing to learn from: raise "
                "comlora_lm_weight, or set comlora_alignment_weight above 0 with comlora_selector=True."
            )

    def _check_choices(self) -> None:
        choices = {
            "comlora_annealing": ANNEALING_SCHEDULES,
            "comlora_selector_input": SELECTOR_INPUTS,
            "comlora_winner_by": WINNER_CRITERIA,
            "comlora_equation_signs": EQUATION_SIGNS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, name, repr(value), f"one of {', '.join(allowed)}", "choose one of these")

    @property
    def competition_settings(self) -> CompetitionSettings:
        """The settings that the pure functions of [`comlora_trl.competition`] take."""
        return CompetitionSettings(**{f.name: getattr(self, f"comlora_{f.name}") for f in fields(CompetitionSettings)})

    @property
    def selector_settings(self) -> SelectorSettings | None:
        """The selector's settings, None without a selector."""
        if not self.comlora_selector:
            return None
        names = [f.name for f in fields(SelectorSettings)]
        return SelectorSettings(**{name: getattr(self, f"comlora_selector_{name}") for name in names})

    @property
    def winner_by(self) -> str:
        """How the winner is chosen in this run."""
        without = self.comlora_winner_by == "selector" and not self.comlora_selector
        return "validation_loss" if without else self.comlora_winner_by

    @property
    def winner_dir(self) -> str:
        """Folder the winner is exported to."""
        return self.comlora_winner_dir or f"{self.output_dir}/winner"

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "ComLoRAConfig":
        """A plain `SFTConfig` or `TrainingArguments` as a ComLoRA configuration, with the competition's defaults."""
        known: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        return cls(**known)


def _require(condition: bool, name: str, value: Any, allowed: str, advice: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} is not possible: it must be {allowed} ({advice}).")

"""The configurations of the trainers: TRL's configurations with the settings of the competition.

[`CompetitionConfig`] has the fields and checks of the competition. [`IndependentConfig`] is for trainers whose
branches each train by their own loss, and [`BetaConfig`] for those of them whose loss has a β.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainingArguments
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from comlora_trl.branches.passes import LENGTHS
from comlora_trl.competition import ANNEALING_SCHEDULES, EQUATION_SIGNS, CompetitionSettings
from comlora_trl.competition.rungs import ROWS, default_rates, default_rungs, parse_rungs
from comlora_trl.competition.selector import SELECTOR_INPUTS, SelectorSettings
from comlora_trl.data.prompts import PROMPT_TEMPLATES

WINNER_CRITERIA = ("selector", "validation_loss", "validation_accuracy")
# Settings that have an effect only in a run with a selector
_OF_THE_SELECTOR = ("top_n", "annealing", "annealing_rate", "noise", "alignment_weight", "pairwise_weight")
_OF_THE_SELECTOR += ("selector_dim", "selector_ffn_dim", "selector_heads", "selector_input", "selector_learning_rate")
_OF_THE_SELECTOR += ("equation_signs",)

logger = get_logger(__name__)


@dataclass
class CompetitionConfig:
    """The competition's settings, as the first base class of a configuration: `class Mine(CompetitionConfig,
    SFTConfig)`.

    Each field is documented by its help text.

    Raises:
        ValueError: if a value is not allowed; the message names the value, what is allowed and what to do.
    """

    comlora_k: int | None = field(
        default=None,
        metadata={
            "help": "Number of LoRA branches that compete (K). 1 without a selector is plain LoRA. None means 2, or 4 "
            "in a tournament."
        },
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
    comlora_selector: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to train a selector. Without it the branches train by eq. 4 only, and the branch with "
            "the lowest validation NLL wins. None means yes, but no in a tournament or with comlora_rows='shared'."
        },
    )
    comlora_selector_dim: int | None = field(
        default=None,
        metadata={"help": "Width of the selector (d_sel), e.g. 512. None means the base model's embedding width."},
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
    comlora_winner_by: str | None = field(
        default=None,
        metadata={
            "help": "How the winner is chosen: 'selector' (highest accumulated score on the validation set, eq. "
            "11-12; the validation loss if there is no selector), 'validation_loss' (lowest loss) or "
            "'validation_accuracy' (most tokens predicted right; with preferences, the reward accuracy). None means "
            "'selector', or 'validation_loss' in a tournament, or 'validation_accuracy' with preferences.",
            "choices": list(WINNER_CRITERIA),
        },
    )
    comlora_validation_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of examples that are taken out of the training set (chosen by the seed) to select the "
            "winner, if there is no eval_dataset. None means 120 or a tenth of the examples, whichever is less."
        },
    )
    comlora_branch_chunk: int | None = field(
        default=None,
        metadata={
            "help": "Number of branches that run at a time, 1..K. None means all K in one forward. With 1, a step "
            "needs the memory of a single LoRA and more time, and gives the same gradients."
        },
    )
    comlora_graphs: bool | None = field(
        default=None,
        metadata={
            "help": "Whether decoder layers are compiled, captured as CUDA graphs and replayed. Loss and gradients "
            "are the same up to rounding, and a step of a small model is several times as fast. None means yes on one "
            "GPU, if the model allows it. Each shape is compared with the uncompiled layers before it is used. "
            "Batches are padded to multiples of 64 tokens, unless pad_to_multiple_of is given. torch_compile=True "
            "means the same. True also uses graphs with several processes. False turns graphs off."
        },
    )
    comlora_equation_signs: str = field(
        default="as_described",
        metadata={
            "help": "'as_described' follows the paper's text: the loss of the preferred branch goes down, and better "
            "branches get higher scores. 'as_printed' follows eq. 5 and 7 exactly as printed, which raises that loss; "
            "it is for studies only.",
            "choices": list(EQUATION_SIGNS),
        },
    )
    comlora_tournament: bool = field(
        default=False,
        metadata={
            "help": "Tournament of learning rates, at the cost of one LoRA run. 4 branches train at half, one, two "
            "and four times `learning_rate`, and each row goes to one branch. Half of the branches are retired after "
            "a tenth of training, and all but one after a quarter. Settings that are given explicitly override these."
        },
    )
    comlora_branch_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Peak learning rate of each branch, K values. None means `learning_rate`."}
    )
    comlora_rungs: str | None = field(
        default=None,
        metadata={
            "help": "Points of training at which branches are retired, as FRACTION:BRANCHES. With '0.1:2,0.25:1', the "
            "best 2 branches go on after a tenth of the steps, and the best one after a quarter. None means that all "
            "branches train to the end."
        },
    )
    comlora_rung_average: float = field(
        default=0.25,
        metadata={
            "help": "Rungs compare averages of each branch's weights over its last steps, because an average shows "
            "before the learning rate decays which rate will be the best one afterwards. This is the share of the "
            "steps so far that the average covers, e.g. 0.25. 0 compares the trained weights. The last selection, the "
            "winner and all saved adapters have trained weights."
        },
    )
    comlora_rows: str | None = field(
        default=None,
        metadata={
            "help": "'all': every living branch sees every row. 'shared': each row goes to one living branch, so the "
            "run costs as much as one LoRA run. None means 'all', or 'shared' in a tournament without a selector.",
            "choices": list(ROWS),
        },
    )
    comlora_prompt: str | None = field(
        default=None,
        metadata={
            "help": "Prompt template that the instruction data was built with: 'comlora', 'llm_adapters' or 'hira' "
            "(which differ in white space), or 'plain' (the instruction only). It is recorded with the winner and "
            "used when the winner is scored. None means that the data's prompts use no template. scripts/sft.py "
            "builds instruction data with this template, and with 'comlora' if it is left out.",
            "choices": sorted(PROMPT_TEMPLATES),
        },
    )
    comlora_winner_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that the winner is exported to. None means `{output_dir}/winner`."},
    )
    comlora_overwrite_winner: bool = field(
        default=False, metadata={"help": "Whether to replace the winner's folder if it exists and is not empty."}
    )

    def __post_init__(self) -> None:
        if self.torch_compile and self.torch_compile_backend is None and self.torch_compile_mode is None:
            # Graphs compile each decoder layer already. Compiling the whole model takes minutes and is not faster
            self.torch_compile = not takes_graphs(self)
        lengths_are_free = self.pad_to_multiple_of == "auto"
        with settled_without_gpu(self):
            super().__post_init__()
        if lengths_are_free and takes_graphs(self):
            self.pad_to_multiple_of = self.pad_to_multiple_of if packs(self) else LENGTHS
        self._fill_in()
        check_config(self)

    def _fill_in(self) -> None:
        """Sets the fields that are None to their defaults, which depend on `comlora_tournament`."""
        tournament = self.comlora_tournament
        if self.comlora_k is None:
            self.comlora_k = 4 if tournament else 2
        if self.comlora_selector is None:
            self.comlora_selector = not tournament and self.comlora_rows != "shared"
        if self.comlora_rows is None:
            self.comlora_rows = "shared" if tournament and not self.comlora_selector else "all"
        if self.comlora_winner_by is None:
            self.comlora_winner_by = "validation_loss" if tournament else "selector"
        if tournament and self.comlora_k > 1:
            if self.comlora_branch_learning_rates is None:
                self.comlora_branch_learning_rates = default_rates(self.learning_rate, self.comlora_k)
            if self.comlora_rungs is None:
                self.comlora_rungs = default_rungs(self.comlora_k)

    @property
    def branch_learning_rates(self) -> list[float]:
        """Peak learning rate of each branch."""
        return self.comlora_branch_learning_rates or [self.learning_rate] * self.comlora_k

    @property
    def independent(self) -> bool:
        """Whether each branch trains by its own loss, as it would in a run with one branch."""
        own = self.comlora_branch_learning_rates is not None or self.comlora_rungs or self.comlora_rows == "shared"
        return bool(own) and not self.comlora_selector

    @property
    def competition_settings(self) -> CompetitionSettings:
        """The settings that the pure functions of [`comlora_trl.competition`] take."""
        names = "k top_n annealing annealing_rate noise lm_weight alignment_weight pairwise_weight equation_signs rows"
        rates = self.comlora_branch_learning_rates
        return CompetitionSettings(
            **{name: getattr(self, f"comlora_{name}") for name in names.split()},
            independent=self.independent,
            rungs=parse_rungs(self.comlora_rungs, self.comlora_k),
            winner_by=self.winner_by,
            rates=None if rates is None else tuple(rates),
            learning_rate=self.learning_rate,
            seed=self.seed,
        )

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
        """The folder that the winner is exported to."""
        return self.comlora_winner_dir or f"{self.output_dir}/winner"

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> "CompetitionConfig":
        """Converts a configuration of TRL or `TrainingArguments`, with the defaults of the competition."""
        known: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(args) if f.init}
        return cls(**known)


@dataclass
class ComLoRAConfig(CompetitionConfig, SFTConfig):
    """
    Configuration of the [`ComLoRASFTTrainer`]: all fields of TRL's `SFTConfig`, and the fields of the competition,
    whose names begin with `comlora_`. Each field is documented by its help text (`scripts/sft.py --help`).

    > [!NOTE]
    > `learning_rate` defaults to `1e-4` instead of TRL's `2e-5`. This is the paper's value and usual for LoRA.

    Raises:
        ValueError: if a value is not allowed; the message names the value, what is allowed and what to do.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})


@dataclass
class IndependentConfig(CompetitionConfig):
    """The competition's settings for trainers whose branches each train by TRL's loss, as in a run with one branch.

    There is no selector. The branch with the highest reward accuracy on the validation set wins, unless
    `comlora_winner_by` is "validation_loss".
    """

    comlora_graphs: bool | None = field(
        default=False,
        metadata={
            "help": "Whether decoder layers are compiled, captured as CUDA graphs and replayed, on one GPU. Off by "
            "default: no run of this trainer on a GPU has been measured."
        },
    )

    def _fill_in(self) -> None:
        if self.comlora_selector:
            raise ValueError(
                f"comlora_selector=True is not possible with {type(self).__name__}: eq. 5-9 weigh the negative "
                "log-likelihood of rows, and this loss has none; leave it out."
            )
        self.comlora_selector = False
        if self.comlora_lm_weight != 1.0:
            raise ValueError(
                f"comlora_lm_weight={self.comlora_lm_weight:g} is not possible with {type(self).__name__}: it weighs "
                "the language-modelling loss of eq. 4, and each branch trains by TRL's loss here; leave it out."
            )
        if self.comlora_winner_by is None:
            self.comlora_winner_by = "validation_accuracy"
        super()._fill_in()

    @property
    def independent(self) -> bool:
        """Always True: each branch trains by its own loss."""
        return True

    @property
    def winner_by(self) -> str:
        """How the winner is chosen in this run."""
        return "validation_accuracy" if self.comlora_winner_by == "selector" else self.comlora_winner_by

    @property
    def competition_settings(self) -> CompetitionSettings:
        """The settings that the pure functions of [`comlora_trl.competition`] take."""
        return replace(super().competition_settings, measured=("loss", "reward accuracy"))


@dataclass
class BetaConfig(IndependentConfig):
    """The settings of trainers whose loss has a β, which may differ between branches."""

    comlora_branch_betas: list[float] | None = field(
        default=None, metadata={"help": "β of each branch's loss, K values. None means `beta`."}
    )
    comlora_grid: bool = field(
        default=False,
        metadata={
            "help": "Whether comlora_branch_learning_rates and comlora_branch_betas are the two sides of a grid, with "
            "one branch for each combination. If False, they have one entry for each branch."
        },
    )

    def _fill_in(self) -> None:
        rates, betas = self.comlora_branch_learning_rates, self.comlora_branch_betas
        if self.comlora_grid:
            if not rates or not betas:
                raise ValueError(
                    "comlora_grid=True needs both comlora_branch_learning_rates and comlora_branch_betas: give both, "
                    "or leave it out."
                )
            points = [(rate, beta) for rate in rates for beta in betas]
            if self.comlora_k not in (None, len(points)):
                raise ValueError(
                    f"comlora_k={self.comlora_k} is not possible with comlora_grid=True: {len(rates)} rates and "
                    f"{len(betas)} betas are {len(points)} branches; leave comlora_k out."
                )
            self.comlora_branch_learning_rates = [rate for rate, _ in points]
            self.comlora_branch_betas = betas = [beta for _, beta in points]
            self.comlora_grid = False  # the lists now have one entry for each branch, and the record must say so
        if betas is not None:
            if self.comlora_k is None:
                self.comlora_k = len(betas)
            if self.comlora_branch_learning_rates is None:  # only β differs
                self.comlora_branch_learning_rates = [self.learning_rate] * self.comlora_k
            found = f"{len(betas)} betas"
            advice = "leave it out for the same beta"
            _require(
                len(betas) == self.comlora_k, "comlora_branch_betas", found, f"comlora_k={self.comlora_k}", advice
            )
            for beta in betas:
                _require(beta > 0, "comlora_branch_betas", beta, "above 0 each", advice)
            if len(set(betas)) > 1 and self.comlora_winner_by == "validation_loss":
                raise ValueError(
                    "comlora_winner_by='validation_loss' is not possible with different comlora_branch_betas: losses "
                    "of different beta can't be compared; leave it out, and the reward accuracy decides."
                )
        super()._fill_in()

    @property
    def branch_betas(self) -> list[float]:
        """β of each branch."""
        return self.comlora_branch_betas or [self.beta] * self.comlora_k

    @property
    def competition_settings(self) -> CompetitionSettings:
        """The settings that the pure functions of [`comlora_trl.competition`] take."""
        betas = self.comlora_branch_betas
        return replace(super().competition_settings, betas=None if betas is None else tuple(betas))


@dataclass
class ComLoRADPOConfig(BetaConfig, DPOConfig):
    """
    Configuration of the [`ComLoRADPOTrainer`]: all fields of TRL's `DPOConfig`, and the fields of the competition,
    whose names begin with `comlora_`.

    > [!NOTE]
    > `learning_rate` defaults to `1e-5` instead of TRL's `1e-6`, as TRL's documentation advises for adapters.

    Raises:
        ValueError: if a value is not allowed; the message names the value, what is allowed and what to do.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    comlora_graphs: bool | None = field(
        default=None,
        metadata={
            "help": "Whether decoder layers are compiled, captured as CUDA graphs and replayed. Loss and gradients "
            "are the same up to rounding. None means yes on one GPU, if the model allows it. The reference runs "
            "without graphs. Batches are padded to multiples of 64 tokens, unless pad_to_multiple_of is given. False "
            "turns graphs off."
        },
    )


@dataclass
class ComLoRAKTOConfig(BetaConfig, KTOConfig):
    """
    Configuration of the [`ComLoRAKTOTrainer`]: all fields of TRL's `KTOConfig`, and the fields of the competition,
    whose names begin with `comlora_`.

    > [!NOTE]
    > `learning_rate` defaults to `1e-5` instead of TRL's `1e-6`, as TRL's documentation advises for adapters.

    Raises:
        ValueError: if a value is not allowed; the message names the value, what is allowed and what to do.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self) -> None:
        super().__post_init__()
        known = next(f.metadata.get("choices") for f in fields(KTOConfig) if f.name == "loss_type")
        if known:
            allowed = f"one of {', '.join(known)}"
            _require(self.loss_type in known, "loss_type", repr(self.loss_type), allowed, "leave it out for 'kto'")
        rows, k = self.per_device_train_batch_size, self.comlora_k
        if self.comlora_rows == "shared" and self.loss_type == "kto" and rows < 2 * k:
            raise ValueError(
                f"per_device_train_batch_size={rows} is not possible with comlora_rows='shared' and comlora_k={k}: "
                "TRL estimates the KL term of loss_type='kto' from at least 2 rows, and each branch has its own; set "
                f"it to {2 * k} or more, or comlora_rows='all'."
            )


@dataclass
class ComLoRARewardConfig(IndependentConfig, RewardConfig):
    """
    Configuration of the [`ComLoRARewardTrainer`]: all fields of TRL's `RewardConfig`, and the fields of the
    competition, whose names begin with `comlora_`.

    Raises:
        ValueError: if a value is not allowed; the message names the value, what is allowed and what to do.
    """


@contextmanager
def settled_without_gpu(args: "CompetitionConfig") -> Iterator[None]:
    """The context of TRL's own checks. Without a GPU, the run uses the CPU, in float32 unless bf16 is asked for.

    Otherwise TRL's default, bf16, would raise an error. A warning tells the user.
    """
    settle = not (args.use_cpu or args.fp16 or args.bf16 is False or torch.accelerator.is_available())
    if settle:
        args.use_cpu, args.bf16 = True, bool(args.bf16)
    yield
    if settle:
        logger.warning(f"no GPU is found: training on the CPU, in {'bfloat16' if args.bf16 else 'float32'}.")


def packs(args: "CompetitionConfig") -> bool:
    """Whether batches are packed lines without padding. Not every TRL trainer has these options."""
    return any(getattr(args, option, False) for option in ("packing", "padding_free"))


def takes_graphs(args: "CompetitionConfig") -> bool:
    """Whether a run shall replay its decoder layers as CUDA graphs, if the model allows it."""
    return args.comlora_graphs is not False and not args.use_cpu and torch.cuda.is_available()


def check_config(args: "CompetitionConfig") -> None:
    """Checks all settings of the competition, after the defaults have been filled in.

    Raises:
        ValueError: if a value is not allowed; the message names the value, what is allowed and what to do.
    """
    _check_ranges(args)
    _check_tournament(args)
    _check_choices(args)
    _check_used(args)


def _check_ranges(args: "CompetitionConfig") -> None:
    k = args.comlora_k
    _require(k >= 1, "comlora_k", k, "1 or more", "1 is plain LoRA, 2 the paper's best setting")
    for name, meaning in (("comlora_top_n", "all K branches"), ("comlora_branch_chunk", "all K at once")):
        value = getattr(args, name)
        _require(value is None or 1 <= value <= k, name, value, f"1 to comlora_k={k}", f"leave it out for {meaning}")
    above_zero = ("comlora_annealing_rate", "comlora_selector_heads", "comlora_selector_dim")
    for name in (*above_zero, "comlora_selector_ffn_dim", "comlora_selector_learning_rate"):
        value = getattr(args, name)
        _require(value is None or value > 0, name, value, "above 0", "leave it out for the default")
    for name in ("noise", "lm_weight", "alignment_weight", "pairwise_weight"):
        value = getattr(args, f"comlora_{name}")
        _require(value >= 0, f"comlora_{name}", value, "0 or more", "0 turns it off")
    size = args.comlora_validation_size
    _require(size is None or size > 0, "comlora_validation_size", size, "1 or more", "the paper uses 120")
    if args.comlora_lm_weight == 0 and (args.comlora_alignment_weight == 0 or not args.comlora_selector):
        raise ValueError(
            "comlora_lm_weight=0 without an alignment loss leaves the branches nothing to learn from: set "
            "comlora_lm_weight above 0, or set comlora_alignment_weight above 0 with comlora_selector=True."
        )


def _check_tournament(args: "CompetitionConfig") -> None:
    k, rates = args.comlora_k, args.comlora_branch_learning_rates
    advice = "leave it out for the default"
    if args.comlora_tournament:
        _require(k > 1, "comlora_k", k, "2 or more in a tournament", "one branch can't compete")
    if rates is not None:
        found = f"{len(rates)} rates"
        _require(len(rates) == k, "comlora_branch_learning_rates", found, f"comlora_k={k} rates", advice)
        for rate in rates:
            _require(rate > 0, "comlora_branch_learning_rates", rate, "above 0 each", advice)
    parse_rungs(args.comlora_rungs, k)
    average = args.comlora_rung_average
    _require(0 <= average <= 1, "comlora_rung_average", average, "0 to 1", "0 compares the trained weights")
    if args.comlora_rows == "shared" and args.comlora_selector:
        raise ValueError(
            "comlora_rows='shared' is not possible with comlora_selector=True: eq. 5-9 compare the branches' "
            "losses on the same rows; leave the selector out, or use comlora_rows='all'."
        )
    if args.comlora_rungs and args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size is not possible with comlora_rungs: a retry can't bring retired branches back; "
            "set per_device_train_batch_size."
        )


def _check_choices(args: "CompetitionConfig") -> None:
    choices = {
        "comlora_annealing": ANNEALING_SCHEDULES,
        "comlora_selector_input": SELECTOR_INPUTS,
        "comlora_winner_by": WINNER_CRITERIA,
        "comlora_rows": ROWS,
        "comlora_equation_signs": EQUATION_SIGNS,
        "comlora_prompt": (None, *PROMPT_TEMPLATES),
    }
    for name, allowed in choices.items():
        value = getattr(args, name)
        _require(value in allowed, name, repr(value), f"one of {', '.join(filter(None, allowed))}", "choose one")


def _check_used(args: "CompetitionConfig") -> None:
    """Checks that every setting that differs from its default has an effect.

    Raises:
        ValueError: if one has none.
    """
    unread = {
        "comlora_selector=False": () if args.comlora_selector else _OF_THE_SELECTOR,
        "comlora_alignment_weight=0": () if args.comlora_alignment_weight else ("annealing", "annealing_rate"),
        "comlora_pairwise_weight=0": () if args.comlora_pairwise_weight else ("noise",),
        f"comlora_annealing={args.comlora_annealing}": (
            () if args.comlora_annealing == "exponential" else ("annealing_rate",)
        ),
    }
    defaults = {f.name: f.default for f in fields(args)}
    for reason, names in unread.items():
        for name in (f"comlora_{name}" for name in names):
            value = getattr(args, name)
            if value != defaults[name]:
                raise ValueError(f"{name}={value} does nothing with {reason}: leave one of the two out.")


def _require(condition: bool, name: str, value: Any, allowed: str, advice: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} is not possible: it must be {allowed} ({advice}).")

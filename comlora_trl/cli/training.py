"""Code shared by the training commands: the model's flags, building a trainer from parsed flags, and the run."""

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from comlora_trl.data.loading import PRESETS
from comlora_trl.demo import demo_model_path
from comlora_trl.training.adapters import DEFAULT_ALPHA, DEFAULT_RANK, DEFAULT_TARGETS, ProposedTargets
from comlora_trl.training.initial_adapter import adapter_config


@dataclass
class ComLoRAModelConfig(ModelConfig):
    """TRL's `ModelConfig` whose default is a LoRA adapter with the paper's rank, alpha and target modules."""

    use_peft: bool = field(default=True, metadata={"help": "Always on: the branches are LoRA adapters."})
    lora_r: int = field(default=DEFAULT_RANK, metadata={"help": "Rank of each branch."})
    lora_alpha: int = field(default=DEFAULT_ALPHA, metadata={"help": "LoRA alpha of each branch."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: list(DEFAULT_TARGETS), metadata={"help": "Modules each branch adapts."}
    )


def given_options(argv: list[str]) -> set[str]:
    """Names of the options that are given on the command line or in the --config file, with underscores."""
    names = {argument[2:].split("=")[0].replace("-", "_") for argument in argv if argument.startswith("--")}
    if "--config" in argv[:-1]:
        with open(argv[argv.index("--config") + 1]) as file:
            names |= set(yaml.safe_load(file) or {})
    return names


# Flags of TRL's scripts for one data set, and those of a mixture of several
ONE_DATA_SET = {"dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming"}
MIXTURE = {"streaming", "test_split_size"}


def unread_by_data(dataset_args: Any) -> dict[str, Collection[str]]:
    """The flags of data that have no effect with a mixture or without one, for [`refuse_unread`]."""
    mixed = bool(dataset_args.datasets)
    return {
        "with a mixture (datasets: in --config), which names its own data": ONE_DATA_SET if mixed else (),
        "without a mixture (datasets: in --config)": () if mixed else MIXTURE,
    }


def refuse_unread(given: set[str], unread: Mapping[str, Collection[str]]) -> None:
    """Checks that every given flag has an effect.

    Args:
        given: the result of [`given_options`].
        unread: for each reason, the flags that have no effect for that reason.

    Raises:
        ValueError: if a flag has none; the message names the flag and the reason.
    """
    for reason, names in unread.items():
        for name in sorted(given & set(names)):
            raise ValueError(f"--{name} does nothing {reason}: leave it out.")


def data_name(script_args: Any, dataset_args: Any) -> str:
    """The name of the training data on the winner's card: a preset, a hub id, or an absolute path."""
    named = [entry.path for entry in dataset_args.datasets or ()] or [script_args.dataset_name or "demo"]
    return ", ".join(
        name if name in PRESETS or not Path(name).exists() else str(Path(name).absolute()) for name in named
    )


def lora_config(given: set[str], model_args: ModelConfig) -> LoraConfig:
    """The branches' LoRA configuration.

    Target modules that are not in `given` are only a proposal: other modules are used if the model does not have them.
    """
    config = get_peft_config(model_args)
    if "lora_target_modules" not in given:
        config.target_modules = ProposedTargets(config.target_modules)
    return config


def build_trainer(
    trainer: type, given: set[str], arguments: tuple[Any, ...], load_data: Callable[[], tuple[Any, Any]]
) -> Any:
    """Builds a trainer from parsed flags.

    Args:
        trainer: the trainer's class.
        given: the result of [`given_options`].
        arguments: the parsed script, training, model and dataset arguments.
        load_data: returns the training set and the evaluation set. The second may be None, and the trainer then holds
            examples out of the training set.

    Raises:
        ValueError: if a flag has a value that is not possible.
    """
    script_args, training_args, model_args, dataset_args = arguments
    if not model_args.use_peft:
        raise ValueError(
            "--use_peft false is not possible: the branches are LoRA adapters; TRL's own script trains all."
        )
    resumed = training_args.resume_from_checkpoint
    if resumed and not Path(resumed).is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {resumed} is not a folder: give one of "
            f"{training_args.output_dir}/checkpoint-STEP."
        )
    model = model_args.model_name_or_path or str(demo_model_path())
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    train_dataset, eval_dataset = load_data()
    # If training starts from an adapter, that adapter's configuration holds; flags may only repeat it
    shape = {name for name in given if name.startswith("lora_")} | {"use_dora", "use_rslora"} & given
    starts = not shape and adapter_config(model, model_args.model_revision) is not None
    built = trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=None if starts else lora_config(given, model_args),
    )
    built.data_name = data_name(script_args, dataset_args)
    return built


class _FirstStep(TrainerCallback):
    """Knows whether a training has reached its first step."""

    def __init__(self) -> None:
        self.reached = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self.reached = True


def run(build: Callable[[list[str]], Any], argv: list[str] | None) -> None:
    """Builds a trainer, trains and saves the winner. An error before the first step ends the process with one line.

    Args:
        build: builds the trainer from the flags.
        argv: the flags; None for the process's arguments.
    """
    argv, first_step = sys.argv[1:] if argv is None else argv, _FirstStep()
    try:
        trainer = build(argv)
        trainer.add_callback(first_step)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if first_step.reached:
            raise
        # Such an error comes from the user's input, and its message says what to do: no traceback is needed
        sys.exit(f"error: {error}")
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if hasattr(trainer, "end"):  # transformers 5.20 and later close their trackers in this method
        trainer.end()

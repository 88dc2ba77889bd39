"""Fine-tune a language model with K competing LoRA branches and export the winner as an ordinary PEFT adapter.

With the embedded model and data (small, offline, about two minutes on two CPU cores):

    comlora-sft --comlora_k 2

With your own model and data. Every flag of TRL's sft.py works:

    comlora-sft --model_name_or_path meta-llama/Meta-Llama-3-8B --dtype bfloat16 \
        --dataset_name commonsense_170k --comlora_k 2 --lora_r 8 --per_device_train_batch_size 16

--dataset_name takes a preset (commonsense_170k, mmlu, convai2, demo), a hub id, or a local file or folder. Flags may
come from a YAML file (--config recipe.yaml); flags on the command line override it. The winner is exported to
./winner.
"""

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from trl import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.cli import training
from comlora_trl.cli.script_config import script_config
from comlora_trl.cli.training import ComLoRAModelConfig, data_name, given_options
from comlora_trl.data import load_training_dataset
from comlora_trl.data.loading import PRESETS
from comlora_trl.data.prompts import DEFAULT_TEMPLATE, is_built_with
from comlora_trl.demo import demo_recipe_path

ComLoRAScriptConfig = script_config(ComLoRAConfig, __name__)


def parse_arguments(argv: list[str]) -> tuple[Any, ...]:
    """Parses flags and --config. Without a model and data, the defaults are those of the embedded recipe.

    Returns:
        the script, training, model and dataset arguments.
    """
    parser = TrlParser((ScriptArguments, ComLoRAScriptConfig, ComLoRAModelConfig, DatasetMixtureConfig))
    parser.description = __doc__
    given = given_options(argv)
    if {"model_name_or_path", "dataset_name", "datasets"} & given:
        return parser.parse_args_and_config(args=argv)
    recipe = yaml.safe_load(demo_recipe_path().read_text())
    tournament = recipe.pop("tournament")
    unknown = parser.set_defaults_with_config(**recipe)
    arguments = parser.parse_args_and_config(args=argv)
    # The recipe's tournament settings only fit the default branches, rungs and rows
    own = {"comlora_k", "comlora_rungs", "comlora_rows", "comlora_branch_learning_rates", "comlora_selector"} & given
    if arguments[1].comlora_tournament and not own:
        unknown += parser.set_defaults_with_config(**tournament)
        arguments = parser.parse_args_and_config(args=argv)
    assert not unknown, f"the demo's recipe has unknown fields: {unknown}"
    return arguments


def check_flags(given: set[str], script_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Checks that every given flag has an effect.

    Raises:
        ValueError: if a flag has none; the message names the flag and the reason.
    """
    bits = {"bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"}
    local = script_args.dataset_name in (None, *PRESETS) or Path(script_args.dataset_name).is_file()
    unread = training.unread_by_data(dataset_args) | {
        "with a preset or a file, which has no configurations": {"dataset_config"} if local else (),
        "without --load_in_4bit": () if model_args.load_in_4bit else bits,
        "here, nor in TRL's own script": {"ignore_bias_buffers"},
    }
    training.refuse_unread(given, unread)
    if model_args.lora_task_type != "CAUSAL_LM":
        raise ValueError(f"--lora_task_type {model_args.lora_task_type} is not possible: SFT trains CAUSAL_LM.")


def load_data(given: set[str], script_args: Any, training_args: Any, dataset_args: Any) -> tuple[Any, Any]:
    """Loads the training set, and the data's evaluation set if there is one.

    Sets `training_args.comlora_prompt` to the prompt template, or to None if the data's prompts use no template.

    Returns:
        the training set and the evaluation set. The second is None if the trainer holds examples out instead.

    Raises:
        ValueError: if the data can't be loaded, or a given flag has no effect on it.
    """
    template = training_args.comlora_prompt or DEFAULT_TEMPLATE
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
        train, validation = dataset["train"], dataset.get("test")
    else:
        name = script_args.dataset_name or "demo"
        options = {
            "template": template,
            "config": script_args.dataset_config,
            "streaming": script_args.dataset_streaming,
            "text_field": training_args.dataset_text_field,
        }
        train = load_training_dataset(name, split=script_args.dataset_train_split, **options)
        validation = load_validation(name, given, script_args, training_args, options)
    first = next(iter(train), {})
    if "dataset_text_field" in given and training_args.dataset_text_field not in first:
        raise ValueError(
            f"--dataset_text_field {training_args.dataset_text_field} does nothing with "
            f"{data_name(script_args, dataset_args)}, which has the columns {', '.join(first)}: leave it out."
        )
    built = is_built_with(first.get("prompt"), template)
    if "comlora_prompt" in given and not built:
        raise ValueError(
            f"--comlora_prompt does nothing with {data_name(script_args, dataset_args)}, whose prompts are its own: "
            "leave it out."
        )
    training_args.comlora_prompt = template if built else None
    return train, validation


def load_validation(name: str, given: set[str], script_args: Any, training_args: Any, options: dict) -> Any:
    """Loads the split that --dataset_test_split names. Without the flag, loads the split that TRL would evaluate on.

    The test set of a preset is used only if the flag names it, because the winner is scored on it later.

    Returns:
        the evaluation set, or None if the trainer holds examples out of the training set.
    """
    split = script_args.dataset_test_split
    if "dataset_test_split" in given:
        return load_training_dataset(name, split=split, **options)
    if training_args.comlora_validation_size is not None:
        return None
    if name == "demo":
        return load_training_dataset(name, split="validation", **options)
    if training_args.eval_strategy == "no" or name in PRESETS or Path(name).is_file():
        return None
    try:
        validation = load_training_dataset(name, split=split, **options)
    except ValueError:
        return None  # the data has no such split
    print(f"validation: the split {split!r} of {name}, which also chooses the winner (--dataset_test_split)")
    return validation


def build_trainer(given: set[str], arguments: tuple[Any, ...]) -> ComLoRASFTTrainer:
    """Builds the trainer from the parsed command line."""
    script_args, training_args, model_args, dataset_args = arguments
    check_flags(given, script_args, model_args, dataset_args)
    load = partial(load_data, given, script_args, training_args, dataset_args)
    return training.build_trainer(ComLoRASFTTrainer, given, arguments, load)


def main(argv: list[str] | None = None) -> None:
    """Runs the command `comlora-sft` with the flags in `argv`, or with the process's arguments if it is None."""
    training.run(lambda own: build_trainer(given_options(own), parse_arguments(own)), argv)


if __name__ == "__main__":
    main()

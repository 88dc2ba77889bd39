"""Code shared by comlora-dpo, -kto and -reward: the embedded default and the loading of data.

`--dataset_name` takes `demo` (the embedded preferences), a hub id, or a local JSON or JSON lines file with the columns
that TRL's trainer reads.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from trl import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset

from comlora_trl.cli import training
from comlora_trl.data import build_prompt
from comlora_trl.data.prompts import DEFAULT_TEMPLATE
from comlora_trl.demo import demo_preferences_path, demo_preferences_recipe_path

_ASKED_FOR = re.compile(r"Answer format: (\S+)")


def demo_preferences(split: str, name: str) -> Dataset:
    """The embedded preferences, as a trainer's columns.

    Args:
        split: "train" or "validation".
        name: "dpo" for the columns prompt, chosen and rejected; of two answers the right one is chosen. "kto" for
            prompt, completion and label, where the completion is the chosen one and the rejected one in turn. "reward"
            for the columns of "dpo", with a rejected answer to another kind of question, such as "ending2" where
            "true" or "false" is asked for: the embedded model is too small to score whether an answer is right.
    """
    rows = json.loads(demo_preferences_path(split).read_text(encoding="utf-8"))
    examples = []
    for number, row in enumerate(rows):
        prompt = {"prompt": build_prompt(row["instruction"], DEFAULT_TEMPLATE)}
        chosen, rejected = row["chosen"], row["rejected"]
        if name == "reward":
            rejected = _off_format(rows[number:] + rows[:number])
        label = number % 2 == 0
        unpaired = {"completion": chosen if label else rejected, "label": label}
        examples.append(prompt | (unpaired if name == "kto" else {"chosen": chosen, "rejected": rejected}))
    return Dataset.from_list(examples)


def _off_format(rows: list[dict[str, str]]) -> str:
    """The next rejected answer that the first row's question does not allow."""
    allowed = _ASKED_FOR.search(rows[0]["instruction"])[1].split("/")
    return next(row["rejected"] for row in rows if row["rejected"].split()[-1] not in allowed)


def parse_arguments(name: str, config: type, description: str, argv: list[str]) -> tuple[Any, ...]:
    """Parses flags and --config. Without a model and data, the defaults are those of the embedded recipe.

    Args:
        name: the command's section in the recipe: "dpo", "kto" or "reward".
        config: the class of the trainer's configuration.
        description: the text of --help.
        argv: the flags.

    Returns:
        the script, training, model and dataset arguments.
    """
    parser = TrlParser((ScriptArguments, config, training.ComLoRAModelConfig, DatasetMixtureConfig))
    parser.description = description
    if not {"model_name_or_path", "dataset_name", "datasets"} & training.given_options(argv):
        recipe = yaml.safe_load(demo_preferences_recipe_path().read_text())
        unknown = parser.set_defaults_with_config(**recipe["all"] | recipe[name])
        assert not unknown, f"the demo's recipe has unknown fields: {unknown}"
    return parser.parse_args_and_config(args=argv)


def check_flags(given: set[str], script_args: Any, dataset_args: Any) -> None:
    """Checks that every given flag of the data has an effect.

    Raises:
        ValueError: if a flag has none; the message names the flag and the reason.
    """
    local = script_args.dataset_name in (None, "demo") or Path(script_args.dataset_name).is_file()
    unread = training.unread_by_data(dataset_args) | {
        "with the demo's data or a file, which has one split": training.ONE_DATA_SET - {"dataset_name"}
        if local
        else (),
    }
    training.refuse_unread(given, unread)


def load_preferences(name: str, script_args: Any, training_args: Any, dataset_args: Any) -> tuple[Any, Any]:
    """The training set, and the data's evaluation set if there is one. Otherwise the trainer holds examples out."""
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
        return dataset["train"], dataset.get("test")
    source = script_args.dataset_name or "demo"
    if source == "demo":
        training_args.comlora_prompt = DEFAULT_TEMPLATE
        own = training_args.comlora_validation_size is None
        return demo_preferences("train", name), demo_preferences("validation", name) if own else None
    if Path(source).is_file():
        try:
            return load_dataset("json", data_files=source, split="train"), None
        except DatasetGenerationError as error:
            cause = error.__cause__ or error
            raise ValueError(f"{source} can't be read as JSON or JSON lines: {cause}") from error
    options = {"name": script_args.dataset_config, "streaming": script_args.dataset_streaming}
    dataset = load_dataset(source, **options)
    validation = dataset.get(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None
    return dataset[script_args.dataset_train_split], validation


def run(name: str, trainer: type, config: type, description: str, argv: list[str] | None) -> None:
    """Trains and exports the winner.

    Args:
        name: the trainer's section in the embedded recipe: "dpo", "kto" or "reward".
        trainer, config: the classes of the trainer and of its configuration.
        description: the text of --help.
        argv: the flags; None for the process's arguments.
    """

    def build(own: list[str]) -> Any:
        arguments, given = parse_arguments(name, config, description, own), training.given_options(own)
        script_args, training_args, _, dataset_args = arguments
        check_flags(given, script_args, dataset_args)
        load = partial(load_preferences, name, script_args, training_args, dataset_args)
        return training.build_trainer(trainer, given, arguments, load)

    training.run(build, argv)

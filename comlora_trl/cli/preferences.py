"""What the commands of the preference trainers share: flags, the embedded default, the run.

`--dataset_name` takes `demo` (the embedded preferences), a hub id, or a local JSON or JSON lines file with the columns
that TRL's trainer reads.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset, get_quantization_config

from comlora_trl.cli.sft import ComLoRAModelConfig, _given, lora_config
from comlora_trl.data import build_prompt
from comlora_trl.data.prompts import DEFAULT_TEMPLATE
from comlora_trl.demo import demo_model_path, demo_preferences_path, demo_preferences_recipe_path
from comlora_trl.training.initial_adapter import adapter_config


def demo_preferences(split: str, paired: bool = True) -> Dataset:
    """The embedded preferences: prompt, chosen and rejected or, not paired, prompt, completion and label by turns."""
    rows = json.loads(demo_preferences_path(split).read_text(encoding="utf-8"))
    examples = []
    for number, row in enumerate(rows):
        prompt = {"prompt": build_prompt(row["instruction"], DEFAULT_TEMPLATE)}
        label = number % 2 == 0
        unpaired = {"completion": row["chosen"] if label else row["rejected"], "label": label}
        examples.append(prompt | ({"chosen": row["chosen"], "rejected": row["rejected"]} if paired else unpaired))
    return Dataset.from_list(examples)


def parse_arguments(name: str, config: type, description: str, argv: list[str]) -> tuple[Any, ...]:
    """Parses flags and --config; with neither a model nor data given, the embedded default's recipe comes first."""
    parser = TrlParser((ScriptArguments, config, ComLoRAModelConfig, DatasetMixtureConfig))
    parser.description = description
    if not {"model_name_or_path", "dataset_name", "datasets"} & _given(argv):
        recipe = yaml.safe_load(demo_preferences_recipe_path().read_text())
        unknown = parser.set_defaults_with_config(**recipe["all"] | recipe[name])
        assert not unknown, f"the demo's recipe has unknown fields: {unknown}"
    return parser.parse_args_and_config(args=argv)


def load_preferences(name: str, script_args: Any, training_args: Any, dataset_args: Any) -> tuple[Any, Any]:
    """The training set, and an evaluation set where the data brings one (else the trainer holds examples out)."""
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
        return dataset["train"], dataset.get("test")
    source = script_args.dataset_name or "demo"
    if source == "demo":
        training_args.comlora_prompt = DEFAULT_TEMPLATE
        train = demo_preferences("train", paired=name != "kto")
        own = training_args.comlora_validation_size is None
        return train, demo_preferences("validation", paired=name != "kto") if own else None
    if Path(source).is_file():
        return load_dataset("json", data_files=source, split="train"), None
    options = {"name": script_args.dataset_config, "streaming": script_args.dataset_streaming}
    dataset = load_dataset(source, **options)
    validation = dataset.get(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None
    return dataset[script_args.dataset_train_split], validation


def build_trainer(name: str, trainer: type, given: set[str], arguments: tuple[Any, ...]) -> Any:
    """From what the command line says to a trainer that is ready to start."""
    script_args, training_args, model_args, dataset_args = arguments
    if not model_args.use_peft:
        raise ValueError(
            "--use_peft false is not possible: the branches are LoRA adapters; TRL's own script trains all."
        )
    model = model_args.model_name_or_path or str(demo_model_path())
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})
    train_dataset, eval_dataset = load_preferences(name, script_args, training_args, dataset_args)
    shape = {flag for flag in given if flag.startswith("lora_")} | {"use_dora", "use_rslora"} & given
    starts = not shape and adapter_config(model, model_args.model_revision) is not None
    built = trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=None if starts else lora_config(given, model_args),
    )
    named = [entry.path for entry in dataset_args.datasets or ()] or [script_args.dataset_name or "demo"]
    built.data_name = ", ".join(one if not Path(one).exists() else str(Path(one).absolute()) for one in named)
    return built


def run(name: str, trainer: type, config: type, description: str, argv: list[str] | None) -> None:
    """Trains, and leaves the winner's folder.

    Args:
        name: the trainer's section of the embedded recipe.
        trainer, config: ours.
        argv: flags, None for the process's arguments.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse_arguments(name, config, description, argv)
        built = build_trainer(name, trainer, _given(argv), arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        # Before training starts an error is the input's, and its message says what to do
        sys.exit(f"error: {error}")
    built.train(resume_from_checkpoint=built.args.resume_from_checkpoint)
    built.save_model(built.args.output_dir)
    if built.args.push_to_hub:
        built.push_to_hub()
    if hasattr(built, "end"):  # transformers 5.20 and later close their trackers there
        built.end()

"""What TRL 1.16's SFTTrainer can be asked for: each axis of a recipe, and the arguments behind its values."""

from typing import Any

from conftest import make_arguments, make_dataset, make_tokenizer
from covering import Row, covering_rows
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

AXES = {
    "data": (
        "text",
        "other_field",
        "formatted",
        "messages",
        "conversations",
        "prompt_completion",
        "conversational_prompt",
        "input_ids",
        "labels",
        "masks",
    ),
    "loss": ("default", "whole", "completion", "assistant"),
    "batches": ("padded", "multiple_of", "padding_free", "bfd", "bfd_split", "wrapped"),
    "stream": ("map", "stream"),
    "checkpointing": ("kept", "checkpointed", "reentrant"),
    "accumulation": ("1", "2"),
    "evaluation": ("none", "one", "dict"),
    "tracker": ("silent", "tracked"),
    "lora": (
        "plain",
        "rslora",
        "dora",
        "dropout",
        "gaussian",
        "orthogonal",
        "layers",
        "patterns",
        "all-linear",
        "bias",
        "excluded",
    ),
}
# What is decided in different places: how a text was written is gone when batches are made, and an adapter sees no
# more of them than their tokens
APART = tuple(
    frozenset(pair)
    for pair in (
        ("data", "lora"),
        ("loss", "lora"),
        ("batches", "lora"),
        ("tracker", "lora"),
        ("data", "batches"),
        ("data", "checkpointing"),
        ("data", "tracker"),
    )
)
LOSSES: dict[str, dict] = {
    "default": {},
    "whole": {"completion_only_loss": False},
    "completion": {"completion_only_loss": True},
    "assistant": {"assistant_only_loss": True},
}
BATCHES: dict[str, dict] = {
    "padded": {},
    "multiple_of": {"pad_to_multiple_of": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 48},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 24},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 40},
}
CHECKPOINTING: dict[str, dict] = {
    "kept": {"gradient_checkpointing": False},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
LORA: dict[str, dict] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.2},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "layers": {"layers_to_transform": [1]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "bias": {"lora_bias": True},
    "excluded": {"target_modules": r".*\.(q|k|v)_proj", "exclude_modules": r".*0.*k_proj"},
}
_CONVERSATIONAL = {"messages", "conversational_prompt"}  # TRL looks for roles before it converts `conversations`
_WITH_PROMPT = {"prompt_completion", "conversational_prompt", "masks"}


def possible(row: Row) -> bool:
    """Whether TRL itself accepts a row, or the part of it that is decided."""
    data, loss = row.get("data"), row.get("loss")
    if loss == "assistant" and data is not None and data not in _CONVERSATIONAL:
        return False
    return not (loss == "completion" and data is not None and data not in _WITH_PROMPT)


RECIPES = {"-".join(row.values()): row for row in covering_rows(AXES, possible, APART)}


def make_chat_tokenizer() -> PreTrainedTokenizerFast:
    """The suite's tokenizer with a chat template that marks what the assistant says."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}A{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    return tokenizer


def make_data(kind: str, rows: int) -> Dataset:
    """The suite's examples in one of TRL's formats."""
    tokenizer, examples = make_tokenizer(), []
    for row in make_dataset(rows):
        prompt, completion = row["prompt"], row["completion"]
        question, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        ids = [tokenizer(text)["input_ids"] for text in (prompt, completion + "</s>")]
        whole = ids[0] + ids[1]
        examples.append(
            {
                "text": {"text": prompt + completion},
                "other_field": {"story": prompt + completion, "source": "made up"},
                "formatted": {"question": prompt, "answer": completion},
                "messages": {"messages": [question, answer]},
                "conversations": {"conversations": [{"from": "user", "value": prompt}, _as_sharegpt(completion)]},
                "prompt_completion": {"prompt": prompt, "completion": completion},
                "conversational_prompt": {"prompt": [question], "completion": [answer]},
                "input_ids": {"input_ids": whole},
                "labels": {"input_ids": whole, "labels": [-100] * len(ids[0]) + ids[1]},
                "masks": {"input_ids": whole, "completion_mask": [0] * len(ids[0]) + [1] * len(ids[1])},
            }[kind]
        )
    return Dataset.from_list(examples)


def _as_sharegpt(text: str) -> dict[str, str]:
    return {"from": "assistant", "value": text}


def _format(row: dict[str, str]) -> str:
    return row["question"] + row["answer"]


class Tracker(TrainerCallback):
    """Stands for wandb and its like: takes figures until training ends, and would open a second run after that."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.open = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.open = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        assert self.open, f"figures for a tracker that has closed: {logs}"
        self.logs.append(logs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.open = False


def arguments_of(row: Row, folder: Any, **overrides: Any) -> dict[str, Any]:
    """The configuration's arguments of a recipe, without the competition's.

    Plain gradient descent: its steps are as large as the gradients, where Adam's are alike for gradients of any scale
    and turn rounding of the smallest ones into whole steps.
    """
    arguments = LOSSES[row["loss"]] | BATCHES[row["batches"]] | CHECKPOINTING[row["checkpointing"]]
    arguments |= {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "cosine"}
    arguments |= {"max_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    arguments["gradient_accumulation_steps"] = int(row["accumulation"])
    if row["data"] == "other_field":
        arguments["dataset_text_field"] = "story"
    if row["evaluation"] != "none":
        arguments |= {"eval_strategy": "steps", "eval_steps": 2}
    return make_arguments(folder, **arguments, **overrides)


def given_of(row: Row) -> dict[str, Any]:
    """The trainer's other arguments, but for model and adapter; data sets are made anew, for TRL writes to them."""
    training, evaluation = make_data(row["data"], 40), make_data(row["data"], 5)
    if row["stream"] == "stream":
        training = training.to_iterable_dataset()
    sets = {"none": None, "one": evaluation, "dict": {"first": evaluation, "second": evaluation.select(range(3))}}
    return {
        "train_dataset": training,
        "eval_dataset": sets[row["evaluation"]],
        "processing_class": make_chat_tokenizer(),
        "formatting_func": _format if row["data"] == "formatted" else None,
        "callbacks": [Tracker()] if row["tracker"] == "tracked" else None,
    }

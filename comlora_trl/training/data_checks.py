"""Checks of the data, each in one line, before TRL prepares them and after."""

import textwrap
from typing import Any

from datasets import Dataset, IterableDataset

from comlora_trl.data.prompts import is_built_with

_DATA_COLUMNS = ("messages", "conversations", "prompt", "input_ids")


def check_columns(
    dataset: Dataset | IterableDataset,
    name: str,
    formatting_func: Any,
    text_field: str = "text",
    template: str | None = None,
) -> None:
    """Refuses a data set without a column that TRL's SFT trainer can read, or with prompts of another template.

    Args:
        text_field: the column of plain text (`dataset_text_field`).
        template: the prompt template that is said to have built the prompts (`comlora_prompt`).

    Raises:
        ValueError: naming what was found and what is allowed.
    """
    first = next(iter(dataset), {})
    columns = list(first)
    if not columns:
        raise ValueError(f"the {name} dataset is empty: give it at least one example.")
    if {"image", "images"} & set(columns):
        raise ValueError(f"the {name} dataset has images: competing branches take text only.")
    if formatting_func is None and not {text_field, *_DATA_COLUMNS} & set(columns):
        raise ValueError(
            f"the {name} dataset has the columns {', '.join(columns)}, none of which is known: name a column "
            f"{text_field}, messages, prompt (with completion) or input_ids, name the text's column with "
            "dataset_text_field, or pass formatting_func."
        )
    prompt = first.get("prompt")
    if template is not None and isinstance(prompt, str) and not is_built_with(prompt, template):
        raise ValueError(
            f"comlora_prompt={template!r} is not what the {name} dataset's prompts are built with (the first is "
            f"{textwrap.shorten(prompt, 60)!r}): leave it out, or build them with comlora_trl.data.build_prompt."
        )
    if "prompt" in columns and "completion" not in columns and formatting_func is None:
        raise ValueError(f"the {name} dataset has a prompt column but no completion column: add completion.")
    if isinstance(dataset, Dataset) and formatting_func is None:
        _check_filled(dataset, name, {text_field, "completion", *_DATA_COLUMNS} & set(columns))


def check_precomputed(train_dataset: Any, eval_dataset: Any, processes: int) -> None:
    """Refuses reference log-probabilities precomputed by several processes for data that lies in memory.

    TRL's main process writes them into a file, which the others read; for such data each process has another folder.

    Raises:
        ValueError: naming the data set and what to do.
    """
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, data in {"train_dataset": train_dataset, **sets}.items():
        if isinstance(data, Dataset) and not data.cache_files:
            raise ValueError(
                f"precompute_ref_log_probs=True is not possible on {processes} processes with {name} in memory, where "
                "TRL's processes do not find each other's file: load it from a file (datasets.load_dataset), or leave "
                "precompute_ref_log_probs out."
            )


def check_text_only(dataset: Dataset | IterableDataset) -> None:
    """Refuses a data set without an example, or with images.

    Raises:
        ValueError: saying so.
    """
    columns = list(next(iter(dataset), {}))
    if not columns:
        raise ValueError("the training dataset is empty: give it at least one example.")
    if {"image", "images"} & set(columns):
        raise ValueError("the training dataset has images: competing branches take text only.")


def check_prepared(train: Any, validation: Any, max_length: int | None) -> None:
    """Refuses data of which TRL's preparation has left nothing, for no supervised token lies within `max_length`.

    Raises:
        ValueError: saying so.
    """
    sets = validation if isinstance(validation, dict) else {"validation": validation}
    for name, dataset in {"training": train, **sets}.items():
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(
                f"no example of the {name} dataset has a token to learn within max_length={max_length}: raise "
                "max_length, or shorten the examples."
            )


def _check_filled(dataset: Dataset, name: str, columns: set[str]) -> None:
    for column in sorted(columns):
        if not dataset.data.column(column).null_count:  # of the whole table, of which this may be a selection
            continue
        if (row := next((row for row, value in enumerate(dataset[column]) if value is None), None)) is not None:
            raise ValueError(f"row {row} of the {name} dataset has no {column}: fill it in, or leave the row out.")

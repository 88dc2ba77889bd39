"""Checks of the data before and after TRL prepares it."""

import textwrap
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset, is_caching_enabled

from comlora_trl.data.prompts import is_built_with

_DATA_COLUMNS = ("messages", "conversations", "prompt", "input_ids")


def check_columns(
    dataset: Dataset | IterableDataset,
    name: str,
    formatting_func: Any,
    text_field: str = "text",
    template: str | None = None,
) -> None:
    """Checks that TRL's SFT trainer can read a data set, and that its prompts were built with the given template.

    Args:
        dataset: the data set.
        name: its name in messages, such as "training".
        formatting_func: the user's function that makes texts of examples, or None.
        text_field: name of the column with plain text (`dataset_text_field`).
        template: the prompt template (`comlora_prompt`); None for no check.

    Raises:
        ValueError: if the data set is empty, has images, lacks columns or values, or has prompts of another template.
    """
    first = _first_example(dataset, name)
    columns = list(first)
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


def _first_example(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """The first example of a data set.

    Raises:
        ValueError: if there is none, or it has images.
    """
    first = next(iter(dataset), {})
    if not first:
        raise ValueError(f"the {name} dataset is empty: give it at least one example.")
    if {"image", "images"} & first.keys():
        raise ValueError(f"the {name} dataset has images: competing branches take text only.")
    return first


def check_precomputed(train_dataset: Any, eval_dataset: Any, processes: int) -> None:
    """Refuses reference log-probabilities precomputed by several processes for data that lies in memory.

    TRL's main process writes them into a file, which the others read. For such data, and for all data while the cache
    of `datasets` is off, each process has another folder.

    Raises:
        ValueError: naming the data set and what to do.
    """
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, data in {"train_dataset": train_dataset, **sets}.items():
        if not isinstance(data, Dataset):
            continue
        if not data.cache_files:
            raise ValueError(
                f"precompute_ref_log_probs=True is not possible on {processes} processes with {name} in memory, where "
                "TRL's processes do not find each other's file: load it from a file (datasets.load_dataset), or leave "
                "precompute_ref_log_probs out."
            )
        if not is_caching_enabled():
            raise ValueError(
                f"precompute_ref_log_probs=True is not possible on {processes} processes while the cache of datasets "
                "is off, where TRL's processes do not find each other's file: call datasets.enable_caching(), or "
                "leave precompute_ref_log_probs out."
            )


def check_preferences(train: Any, validation: Any, columns: Sequence[Sequence[str]]) -> None:
    """Checks that data sets of a preference trainer have examples, the columns that TRL reads, and no images.

    Args:
        train: the training set.
        validation: the validation set, a dict of several, or None.
        columns: the sets of columns, one of which TRL needs.

    Raises:
        ValueError: if one is empty, has images or lacks columns.
    """
    sets = validation if isinstance(validation, dict) else {"validation": validation}
    for name, dataset in {"training": train, **sets}.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            continue
        found = list(_first_example(dataset, name))
        if not any(set(wanted) <= set(found) for wanted in columns):
            needed = ", or ".join(f"{', '.join(wanted[:-1])} and {wanted[-1]}" for wanted in columns)
            raise ValueError(
                f"the {name} dataset has the columns {', '.join(found)}, but this trainer reads {needed}: rename its "
                "columns."
            )


def check_prepared(train: Any, validation: Any, max_length: int | None) -> None:
    """Checks that prepared data sets are not empty. TRL drops examples without a supervised token in `max_length`.

    Args:
        train: the prepared training set.
        validation: the prepared validation set, a dict of several, or None.
        max_length: the longest length of an example, in tokens; None for no limit.

    Raises:
        ValueError: if one is empty.
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
        # The count is that of the whole table, from which this data set may select some rows
        if not dataset.data.column(column).null_count:
            continue
        if (row := next((row for row, value in enumerate(dataset[column]) if value is None), None)) is not None:
            raise ValueError(f"row {row} of the {name} dataset has no {column}: fill it in, or leave the row out.")

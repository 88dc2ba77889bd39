"""The validation set: the user's own, or examples taken out of the training set."""

import json
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from comlora_trl.training.config import ComLoRAConfig

logger = get_logger(__name__)

DEFAULT_SIZE = 120  # the paper's
_SHARE = 10  # of small data, at most one example in ten


def hold_out(
    train: Dataset | IterableDataset, validation: Any, args: ComLoRAConfig
) -> tuple[Dataset | IterableDataset, Any]:
    """Takes validation examples out of the training set if none are given, drawn by the seed (streams: the first).

    With one branch there is nothing to choose, and nothing is taken.

    Args:
        validation: the user's eval_dataset, a dict of several, or None.

    Returns:
        what is left to train on, and the validation set.

    Raises:
        ValueError: if a size is given that can't be met, or beside a validation set; or if that set is empty.
    """
    size = args.comlora_validation_size
    if validation is not None:
        if size is not None:
            raise ValueError(
                f"comlora_validation_size={size} is given beside an eval_dataset, the validation set already: "
                "leave one of them out."
            )
        _check_not_empty(validation)
        return train, validation
    if args.comlora_k == 1 and size is None:
        return train, None
    if isinstance(train, IterableDataset):
        return _out_of_stream(train, size)
    size = _checked(size, len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    return train.select(sorted(order[size:])), train.select(sorted(order[:size]))


def _out_of_stream(train: IterableDataset, size: int | None) -> tuple[IterableDataset, Dataset]:
    # Read once: a stream that shuffles would give other examples at another reading
    wanted = DEFAULT_SIZE * _SHARE if size is None else size + 1
    examples = list(islice(train, wanted))
    # A stream that goes on has at least one example more than were read
    size = _checked(size, len(examples) if len(examples) < wanted else max(wanted, (size or 0) + 1))
    # A stream that shuffles without a seed gives each process others: the main process's are everyone's
    examples = broadcast_object_list(examples[:size])
    held_out = {_content(example) for example in examples}
    rest = train.filter(lambda example: _content(example) not in held_out)
    if next(iter(rest), None) is None:
        raise ValueError(
            f"every example of the training stream is among the {size} held out (or a copy of one): pass an "
            "eval_dataset, or a smaller comlora_validation_size."
        )
    return rest, Dataset.from_list(examples, features=train.features)


def _checked(size: int | None, available: int) -> int:
    """The number of examples to take out of `available` ones."""
    if available < 2:
        raise ValueError(
            "the training set has a single example, so none can be held out to choose the winner by: pass an "
            "eval_dataset, or more examples."
        )
    if size is None:
        size = max(1, min(DEFAULT_SIZE, available // _SHARE))
        if size < DEFAULT_SIZE:
            logger.warning(
                f"{size} of {available} training examples are held out to choose the winner by (a tenth, the data "
                f"being small; otherwise {DEFAULT_SIZE}): set comlora_validation_size, or pass an eval_dataset."
            )
    if size >= available:
        raise ValueError(
            f"comlora_validation_size={size} takes all of the {available} training examples: lower it below "
            f"{available}, or pass an eval_dataset."
        )
    return size


def _content(example: dict[str, Any]) -> str:
    return json.dumps(example, sort_keys=True, default=str)


def _check_not_empty(validation: Any) -> None:
    for dataset in (validation.values() or [()]) if isinstance(validation, dict) else [validation]:
        if next(iter(dataset), None) is None:
            raise ValueError(
                "the eval_dataset is empty, so no winner could be chosen: give it examples, or leave it out."
            )

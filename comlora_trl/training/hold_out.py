"""The validation set: the user's, or examples that are held out of the training set."""

import json
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset

from comlora_trl.training.config import ComLoRAConfig

logger = get_logger(__name__)

DEFAULT_SIZE = 120  # as in the paper
_SHARE = 10  # from small data, at most one example in ten is held out


def hold_out(
    train: Dataset | IterableDataset, validation: Any, args: ComLoRAConfig
) -> tuple[Dataset | IterableDataset, Any]:
    """Holds validation examples out of the training set if the user gives no validation set.

    The examples are drawn by the seed; from a stream, the first ones are taken. With one branch there is no choice to
    make, so none are held out unless `comlora_validation_size` is given.

    Args:
        train: the training set.
        validation: the user's `eval_dataset`, a dict of several, or None.
        args: the training arguments.

    Returns:
        the examples to train on, and the validation set, or None.

    Raises:
        ValueError: if `comlora_validation_size` is too large, or given together with a validation set, or if a
            validation set is empty.
    """
    size = args.comlora_validation_size
    if validation is not None:
        if size is not None:
            raise ValueError(
                f"comlora_validation_size={size} is given beside an eval_dataset, which is the validation set: leave "
                "one of them out."
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
    # The stream is read only once here, because a shuffled stream may give other examples the next time
    wanted = DEFAULT_SIZE * _SHARE if size is None else size + 1
    examples = list(islice(train, wanted))
    # If the stream did not end, it may have more examples than were read
    size = _checked(size, len(examples) if len(examples) < wanted else max(wanted, (size or 0) + 1))
    # A stream that shuffles without a seed gives each process other examples, so all use those of the main process
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
    """The number of examples to hold out of `available` examples.

    Raises:
        ValueError: if it is not possible.
    """
    if available < 2:
        raise ValueError(
            "the training set has a single example, so none can be held out to choose the winner by: pass an "
            "eval_dataset, or more examples."
        )
    if size is None:
        size = max(1, min(DEFAULT_SIZE, available // _SHARE))
        if size < DEFAULT_SIZE:
            logger.warning(
                f"{size} of {available} training examples are held out to choose the winner. This is a tenth of the "
                f"small data, instead of {DEFAULT_SIZE}: set comlora_validation_size, or pass an eval_dataset."
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

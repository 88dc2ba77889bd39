"""Validation of all branches. Each example counts once, with any number of processes and any kind of data set."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from torch import Tensor
from tqdm.auto import tqdm

from comlora_trl import compat
from comlora_trl.competition import ValidationTally
from comlora_trl.training.competition import ROWS_PER_LINE, Competition


class Measured(NamedTuple):
    """The figures of a batch, in the order of [`ValidationTally.add`].

    Attributes:
        losses: the summed loss of each row under each branch, [K, R].
        correct: number of correct predictions of each branch on each row, [K, R].
        counts: number of items (tokens or pairs) of each row, by which losses and correct predictions are divided,
            [R].
        scores: sim, [R, K]; None without a selector.
    """

    losses: Tensor
    correct: Tensor
    counts: Tensor
    scores: Tensor | None = None


def own_batches(
    dataset: Dataset | IterableDataset, size: int, rank: int, processes: int
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Splits a validation set among the processes.

    All processes get the same number of batches, because all of them must gather sharded weights at the same time. A
    process without examples in a batch gets an example of another process, which does not count.

    Args:
        dataset: the validation set.
        size: examples of a batch, for each process.
        rank: this process.
        processes: number of processes.

    Yields:
        this process's examples of a batch, and how many of them count.
    """
    for group in _groups(dataset, size * processes):
        own = group[rank * size : (rank + 1) * size]
        yield (own, len(own)) if own else (group[:1], 0)


def _groups(dataset: Dataset | IterableDataset, size: int) -> Iterator[Sequence[dict[str, Any]]]:
    if isinstance(dataset, IterableDataset):
        examples = iter(dataset)
        while group := list(islice(examples, size)):
            yield group
    else:
        for first in range(0, len(dataset), size):
            yield [dataset[index] for index in range(first, min(first + size, len(dataset)))]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode. Afterwards, the mode of each module is restored.

    Only the flags are set. `eval()` and `train()` would take about 10 ms each in a model with thousands of modules.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.__dict__["training"] = False
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True


@torch.no_grad()
def validate(
    model: torch.nn.Module,
    competition: Competition,
    datasets: Iterable[Dataset | IterableDataset],
    trainer: Any,
    measure: Callable[[torch.nn.Module, dict[str, Any], Any, int], Measured],
) -> ValidationTally:
    """Measures all living branches on all validation sets together. All processes must call this.

    Args:
        model: the model in the accelerator's wrapper.
        competition: the competition.
        datasets: the validation sets.
        trainer: the trainer, whose collator, batch size, device and precision are used.
        measure: measures the living branches on a batch. Its arguments are the model, the batch, a pass over the
            living branches, and the number of examples that count.

    Returns:
        the sums over all processes.
    """
    accelerator: Accelerator = trainer.accelerator
    tally, rows = ValidationTally.empty(competition.settings.k, accelerator.device), competition.branch_pass()
    with evaluation_mode(model):
        for dataset in datasets:
            loader = trainer.get_eval_dataloader(dataset)  # for its columns and its collator only
            readable = dataset if isinstance(dataset, IterableDataset) else loader.dataset
            # A training batch fits into memory, so a validation batch of the same size does too, and takes fewer
            # launches
            size = max(trainer.args.per_device_eval_batch_size, trainer.args.per_device_train_batch_size)
            batches = own_batches(readable, size, accelerator.process_index, accelerator.num_processes)
            hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
            for examples, count in tqdm(batches, desc="selection", leave=False, disable=hidden):
                inputs = compat.prepare_inputs(trainer, loader.collate_fn(examples))
                inputs.pop(ROWS_PER_LINE, None)
                with trainer.compute_loss_context_manager():
                    measured = measure(model, inputs, rows, count)
                if count:
                    tally.add(*measured, count)
    tally.sums = accelerator.reduce(tally.sums, reduction="sum")
    return tally


def selection_metrics(selection: dict[str, Any], prefix: str) -> dict[str, float]:
    """The figures of a selection as log entries `PREFIX_comlora/...`."""
    metrics = {}
    columns = {"loss": "validation_nll", "accuracy": "validation_accuracy", "score": "scores"}
    for entry, column in columns.items():
        for branch, value in enumerate(selection[column] or []):
            if value is not None:
                metrics[f"{prefix}_comlora/{entry}_{branch}"] = value
    return metrics | {f"{prefix}_comlora/winner": selection["winner"]}

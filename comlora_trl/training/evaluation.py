"""Every branch on a validation set, each example once, whatever the number of processes or the kind of data set."""

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
    """A batch's figures, as [`ValidationTally.add`] takes them.

    Attributes:
        losses: sums of each row's losses of each branch, [K, R].
        correct: what each branch got right of each row, [K, R].
        counts: what losses and right answers are counted by, of each row, [R].
        scores: sim, [R, K], None without a selector.
    """

    losses: Tensor
    correct: Tensor
    counts: Tensor
    scores: Tensor | None = None


def own_batches(
    dataset: Dataset | IterableDataset, size: int, rank: int, processes: int
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """This process's examples, batch by batch, and how many of them count.

    All processes get as many batches, for sharded weights are gathered by all at once: one that has no example left
    repeats another's, which does not count.
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
    """Evaluation mode, and afterwards each module's own mode again.

    The flags alone: `eval()` and `train()` call every module's own, some 10 ms a call in a model of thousands.
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
    """S, correct tokens and scores of every living branch over all the sets together.

    Args:
        model: the model as the accelerator wrapped it.
        competition: its living branches are measured.
        trainer: the trainer whose collator, batch size, devices and precision are used.
        measure: measures the living branches on a batch, of which so many examples count.
    """
    accelerator: Accelerator = trainer.accelerator
    tally, rows = ValidationTally.empty(competition.settings.k, accelerator.device), competition.branch_pass()
    with evaluation_mode(model):
        for dataset in datasets:
            loader = trainer.get_eval_dataloader(dataset)  # its columns and its collator, not its batches
            readable = dataset if isinstance(dataset, IterableDataset) else loader.dataset
            # As many rows as a training step has, which needs more memory: the same sums in fewer, fuller launches
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
    """A selection's figures as log entries `PREFIX_comlora/...`."""
    metrics = {}
    columns = {"loss": "validation_nll", "accuracy": "validation_accuracy", "score": "scores"}
    for entry, column in columns.items():
        for branch, value in enumerate(selection[column] or []):
            if value is not None:
                metrics[f"{prefix}_comlora/{entry}_{branch}"] = value
    return metrics | {f"{prefix}_comlora/winner": selection["winner"]}

"""Validation of all branches. Each example counts once, with any number of processes and any kind of data set."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
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


class BatchSize:
    """The size of validation batches.

    A training batch fits into memory, so a validation batch of as many examples does too. Without gradients, a pass
    over a model of many layers needs much less memory than training. So on one GPU, batches after the first one are
    larger: as large as fits into the memory that training has needed. Few large batches take fewer launches.

    Args:
        examples: examples of a batch that fits into memory, for all processes together.
        device: the device.
        layers: number of decoder layers; 0 if batches must not grow.
        multiple: batches are padded to multiples of this length.

    Attributes:
        tokens: number of tokens, padding included, up to which a batch may have more examples.
    """

    def __init__(self, examples: int, device: torch.device, layers: int = 0, multiple: int = 1) -> None:
        self.examples, self.tokens, self.multiple = examples, 0, multiple
        self.device, self.layers = device, layers if device.type == "cuda" else 0

    def groups(self, dataset: Dataset | IterableDataset) -> Iterator[list[dict[str, Any]]]:
        """Splits a data set into batches."""
        streamed = isinstance(dataset, IterableDataset)
        group, longest = [], 0
        for example in dataset if streamed else (dataset[index] for index in range(len(dataset))):
            length = math.ceil(_length(example) / self.multiple) * self.multiple
            longest = max(longest, length)
            if len(group) >= self.examples and (len(group) + 1) * longest > self.tokens:
                yield group
                group, longest = [], length
            group.append(example)
        if group:
            yield group

    @contextmanager
    def watched(self, tokens: int) -> Iterator[None]:
        """Within the block, a batch of so many tokens is measured. Afterwards, later batches may be larger."""
        if not self.layers:
            yield
            return
        before = self._allocated()
        yield
        # What one layer allocates, as if it freed nothing before its end: more than the memory that it needs
        needed = (self._allocated() - before) // (self.layers * tokens)
        if needed <= 0:
            return  # not all of PyTorch's allocators count
        in_use, free = torch.cuda.memory_allocated(self.device), torch.cuda.mem_get_info(self.device)[0]
        self.tokens = min(torch.cuda.max_memory_allocated(self.device) - in_use, free) // needed

    def _allocated(self) -> int:
        """All bytes that were allocated on the device until now, freed ones included."""
        return torch.cuda.memory_stats(self.device).get("allocated_bytes.all.allocated", 0)


def _length(example: Any) -> int:
    """Number of tokens of an example; very large if it is not known."""
    known = isinstance(example, Mapping) and hasattr(example.get("input_ids"), "__len__")
    return len(example["input_ids"]) if known else 2**62


def own_batches(
    dataset: Dataset | IterableDataset, size: BatchSize, rank: int, processes: int
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Splits a validation set among the processes.

    All processes get the same number of batches, because all of them must gather sharded weights at the same time. A
    process without examples in a batch gets an example of another process, which does not count.

    Args:
        dataset: the validation set.
        size: the size of the batches of all processes together.
        rank: this process.
        processes: number of processes.

    Yields:
        this process's examples of a batch, and how many of them count.
    """
    for group in size.groups(dataset):
        each = max(len(group), size.examples) // processes
        own = group[rank * each : (rank + 1) * each]
        yield (own, len(own)) if own else (group[:1], 0)


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
    layers: int = 0,
) -> ValidationTally:
    """Measures all living branches on all validation sets together. All processes must call this.

    Args:
        model: the model in the accelerator's wrapper.
        competition: the competition.
        datasets: the validation sets.
        trainer: the trainer, whose collator, batch size, device and precision are used.
        measure: measures the living branches on a batch. Its arguments are the model, the batch, a pass over the
            living branches, and the number of examples that count.
        layers: number of decoder layers, if their memory is all that a batch needs; 0 otherwise. See [`BatchSize`].

    Returns:
        the sums over all processes.
    """
    accelerator: Accelerator = trainer.accelerator
    tally, rows = ValidationTally.empty(competition.settings.k, accelerator.device), competition.branch_pass()
    with evaluation_mode(model):
        for dataset in datasets:
            loader = trainer.get_eval_dataloader(dataset)  # for its columns and its collator only
            readable = dataset if isinstance(dataset, IterableDataset) else loader.dataset
            each = max(trainer.args.per_device_eval_batch_size, trainer.args.per_device_train_batch_size)
            # All processes need batches of the same size, and the memory of one device is looked at
            alone = accelerator.distributed_type == DistributedType.NO and not trainer.is_model_parallel
            multiple = trainer.args.pad_to_multiple_of or 1
            size = BatchSize(each * accelerator.num_processes, accelerator.device, layers if alone else 0, multiple)
            batches = own_batches(readable, size, accelerator.process_index, accelerator.num_processes)
            hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
            for examples, count in tqdm(batches, desc="selection", leave=False, disable=hidden):
                inputs = compat.prepare_inputs(trainer, loader.collate_fn(examples))
                inputs.pop(ROWS_PER_LINE, None)
                with trainer.compute_loss_context_manager(), size.watched(inputs["input_ids"].numel()):
                    measured = measure(model, inputs, rows, count)
                if count:
                    tally.add(*measured, count)
    tally.sums = accelerator.reduce(tally.sums, reduction="sum")
    return tally


def selection_metrics(selection: dict[str, Any], prefix: str) -> dict[str, float]:
    """The figures of a selection as log entries `PREFIX_comlora/...`; `averaged_...` for those of averaged weights."""
    metrics, weights = {}, "averaged_" if selection.get("average") else ""
    columns = {"loss": "validation_nll", "accuracy": "validation_accuracy", "score": "scores"}
    for entry, column in columns.items():
        for branch, value in enumerate(selection[column] or []):
            if value is not None:
                kind = entry if entry == "score" else weights + entry  # scores do not depend on the branches' weights
                metrics[f"{prefix}_comlora/{kind}_{branch}"] = value
    return metrics | {f"{prefix}_comlora/winner": selection["winner"]}

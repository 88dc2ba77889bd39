"""Whole steps of TRL's trainer and of ours, for `run.py`."""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from cases import Bench, rotated, summary
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer


def make_trainer(
    bench: Bench,
    kind: str,
    rows: int,
    folder: Path,
    steps: int | None = None,
    validation: int = 2,
    **settings: Any,
) -> SFTTrainer:
    """A trainer over the frozen base; without checkpointing, logging every step.

    Args:
        kind: "trl" or "comlora".
        rows: of a step.
        steps: of a run; by default a turn's of [`alternate_trainers`].
        validation: rows of the validation set.
    """
    steps = steps or bench.shape.rounds // 2 + 4
    arguments: dict[str, Any] = {
        "output_dir": str(folder / kind / str(len(list(folder.rglob("*"))))),
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 1e-4,
        "bf16": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "use_cpu": bench.shape.device.type == "cpu",
    }
    config, trainer = (SFTConfig, SFTTrainer) if kind == "trl" else (ComLoRAConfig, ComLoRASFTTrainer)
    data = _dataset(bench, rows * steps)
    made = trainer(
        bench.base(),
        config(**arguments, **settings),
        train_dataset=data,
        eval_dataset=_dataset(bench, validation),
        processing_class=tokenizer(),
        peft_config=bench.lora_config(),
    )
    made.remove_callback(PrinterCallback)
    return made


def alternate_trainers(
    device: torch.device, trainers: dict[str, SFTTrainer], turns: int = 4
) -> dict[str, dict[str, float]]:
    """Median milliseconds from one step's end to the next; the trainers take turns, another one first each time.

    A turn's first two steps are for warm-up, and its last one has the winner's selection in it: these do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(turns):
        for name in rotated(trainers, turn):
            trainer, timer = trainers[name], StepTimer(device)
            trainer.add_callback(timer)
            with quiet():
                trainer.train()
            trainer.remove_callback(timer)
            times[name] += timer.intervals()[1:-1]
    return {name: summary(values) for name, values in times.items()}


def _dataset(bench: Bench, rows: int) -> Dataset:
    batch = bench.batch(rows)
    return Dataset.from_dict({name: batch[name].tolist() for name in ("input_ids", "labels")})


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the trainers' tables to itself."""
    with redirect_stdout(io.StringIO()):
        yield


class StepTimer(TrainerCallback):
    """Marks the end of every step, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Milliseconds between consecutive ends of steps."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type != "cuda":
            return [1e3 * (later - earlier) for earlier, later in pairs]
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) for earlier, later in pairs]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

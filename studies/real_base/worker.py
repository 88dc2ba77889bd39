"""Trains an arm with a seed and scores its branches on the held-out replies. As a program: a worker that takes jobs.

    python -m studies.real_base.worker SETTINGS     # JSON, see `Settings`

It reads jobs from its standard input, one JSON object a line ({"arm", "seed"}), and answers each with one line, the
result or {"error"}. All else it prints goes to its standard error. The base model, the tokenized rows and an adapter
to score with stay in memory from job to job.
"""

import copy
import gc
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.competition.rungs import Rung
from comlora_trl.data import build_prompt
from studies.common.worker import work
from studies.real_base import data
from studies.real_base.arms import GRID_FIELD, RUNG_SHARES, Arm, all_arms, steps_of, timed_arms

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
WARM_UP = 12  # steps before a run that is timed


@dataclass(frozen=True)
class Settings:
    """What all arms share.

    Attributes:
        base: folder of the base model.
        data: folder with the task's files.
        task: what is learnt, of `data.TASKS`.
        rows: training rows, the validation rows among them; None for all.
        validation: of these, rows that choose, drawn by the seed.
        test: held-out replies that are scored, spread over the file; None for all.
        batch: rows of an optimizer step.
        rates, most: the grid, and how many of its branches train in one run.
        chunk: branches that run at a time.
        bf16: the base in bfloat16 and autocast; else float32.
        scored: rows of a scoring batch.
        adapters: folder in which every scored adapter is kept, None for none.
    """

    base: str
    data: str
    task: str = data.DEFAULT
    rows: int | None = None
    validation: int = 120
    test: int | None = None
    batch: int = 32
    rates: tuple[float, ...] = ()
    most: int = 5
    chunk: int = 2
    bf16: bool = False
    scored: int = 64
    adapters: str | None = None

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """From what `asdict` became in JSON."""
        values = json.loads(text)
        return cls(**values | {"rates": tuple(values["rates"])})

    @property
    def shown(self) -> dict[str, Any]:
        """What results must agree in to be compared."""
        names = ("task", "rows", "validation", "test", "batch", "bf16")
        return {name: value for name, value in asdict(self).items() if name in names}


class Watch(TrainerCallback):
    """Asks for an evaluation after given steps, which logs every branch's validation figures and changes nothing."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = set(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            control.should_evaluate = True


class SameStart(TrainerCallback):
    """Gives every branch the A of branch 0, which is that of a single run with the same seed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = dict(model.named_parameters())
        for name, parameter in named.items():
            if ".lora_A.branch_" in name:
                head, _, tail = name.partition(".branch_")
                parameter.data.copy_(named[f"{head}.branch_0.{tail.partition('.')[2]}"].data)


def tokenize(tokenizer: Any, rows: Sequence[dict[str, str]]) -> Dataset:
    """`input_ids` of prompt, reply and end, and `labels`, as TRL makes them; the trainer has nothing to prepare."""
    prompts = tokenizer([build_prompt(row["instruction"]) for row in rows])["input_ids"]
    whole = tokenizer([build_prompt(row["instruction"]) + row["output"] + tokenizer.eos_token for row in rows])
    labels = [[-100] * len(p) + ids[len(p) :] for p, ids in zip(prompts, whole["input_ids"], strict=True)]
    return Dataset.from_dict({"input_ids": whole["input_ids"], "labels": labels})


def spread(count: int, wanted: int | None) -> list[int]:
    """`wanted` places of `count`, evenly spread; all of them for None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [place * count // wanted for place in range(wanted)]


class Study:
    """The base and the rows, held once, and runs on them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(settings.base)
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        self.base = AutoModelForCausalLM.from_pretrained(settings.base, dtype=dtype).to(self.device)
        self.base.requires_grad_(False)
        self.train_rows = self._rows("train", settings.rows)
        self.test_rows = self._rows("validation", settings.test)
        self._scorers: dict[int, PeftModel] = {}

    def _rows(self, split: str, wanted: int | None) -> Dataset:
        rows = data.read_rows(self.settings.task, Path(self.settings.data), split)
        return tokenize(self.tokenizer, [rows[place] for place in spread(len(rows), wanted)])

    def split(self, seed: int) -> tuple[Dataset, Dataset]:
        """The rows to train on and those that choose, as the package draws them from the training set by the seed."""
        order = torch.randperm(len(self.train_rows), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = self.settings.validation
        return self.train_rows.select(sorted(order[held_out:])), self.train_rows.select(sorted(order[:held_out]))

    @property
    def steps(self) -> int:
        """Optimizer steps of one pass."""
        return steps_of(len(self.train_rows) - self.settings.validation, self.settings.batch)

    def trainer(self, arm: Arm, seed: int, folder: str, max_steps: int = -1, chunk: int | None = None) -> SFTTrainer:
        """A trainer that is ready to start, on a copy of the base; with `chunk` branches at a time, if given."""
        steps, train, validation = arm.passes * self.steps, *self.split(seed)
        given = {
            "output_dir": folder,
            "seed": seed,
            "max_steps": max_steps,
            "num_train_epochs": arm.passes,
            "warmup_steps": max(1, round(0.03 * steps)),
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": self.settings.batch,
            "per_device_eval_batch_size": self.settings.scored,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
            "gradient_checkpointing": False,
            "bf16": self.settings.bf16,
            "tf32": self.device.type == "cuda",
            "use_cpu": self.device.type == "cpu",
            "logging_steps": steps,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **arm.fields,
        }
        lora = LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        shared = {"train_dataset": train, "processing_class": self.tokenizer, "peft_config": lora}
        model = copy.deepcopy(self.base)
        if arm.kind == "trl":
            return SFTTrainer(model, SFTConfig(**given), **shared)
        # Workers that share a GPU fill it without graphs, and each would compile its own
        alone = chunk is not None and chunk > self.settings.chunk
        config = ComLoRAConfig(
            **given,
            comlora_branch_chunk=min(chunk or self.settings.chunk, len(arm.rates)),
            comlora_graphs=None if alone else False,
        )
        watched = [Rung(share, 1).step(steps) for share in RUNG_SHARES] if arm.watched else []
        callbacks: list[TrainerCallback] = [Watch(watched)] + ([SameStart()] if arm.kind == "field" else [])
        return ComLoRASFTTrainer(model, config, eval_dataset=validation, callbacks=callbacks, **shared)

    def run(self, arm: Arm, seed: int, alone: bool = False) -> dict[str, Any]:
        """The result of one arm and seed; the seconds are those of training, validation and export."""
        with tempfile.TemporaryDirectory() as name:
            if alone:  # the first steps of a process are slower than any others
                self.trainer(arm, seed, f"{name}/warm-up", WARM_UP).train()
            try:
                # Alone there is room for all branches at once, which is faster
                trainer, begin = self._trained(arm, seed, name, len(arm.rates) if alone else self.settings.chunk)
            except RuntimeError as error:
                if not re.search(r"all \d+ branches have diverged|every branch is disqualified", str(error)):
                    raise
                self._free()
                units = arm.branch_steps(arm.passes * self.steps) / self.steps
                nothing = {"units": units, "winner": 0, "branches": {}, "watched": {}, "seconds": 0.0}
                return {"arm": arm.name, "seed": seed, "rates": arm.rates, "diverged": str(error), **nothing}
            if arm.kind == "trl":
                trainer.save_model()
            seconds = self._now() - begin
            found = self._single(trainer) if arm.kind == "trl" else self._branches(trainer, arm)
            for branch, folder in found["folders"].items():
                found["branches"][branch] |= self.score(folder, arm.rank, f"{arm.name}, seed {seed}, {branch}")
        del found["folders"], trainer
        self._free()
        return {"arm": arm.name, "seed": seed, "seconds": round(seconds, 2), "rates": arm.rates, **found}

    def _trained(self, arm: Arm, seed: int, folder: str, most: int) -> tuple[SFTTrainer, float]:
        """A finished trainer and when it began; where the GPU is full, one branch at a time, which changes nothing."""
        for chunk in (most, 1):
            trainer = self.trainer(arm, seed, f"{folder}/run-{chunk}", chunk=chunk)
            begin = self._now()
            try:
                trainer.train()
                return trainer, begin
            except torch.OutOfMemoryError:
                if chunk == 1:
                    raise
            del trainer
            self._free()
        raise AssertionError("unreachable")

    def _free(self) -> None:
        gc.collect()  # trainers hold themselves in circles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the others share the GPU

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _single(self, trainer: SFTTrainer) -> dict[str, Any]:
        units = trainer.state.max_steps / self.steps
        return {"units": units, "winner": 0, "branches": {"0": {}}, "folders": {"0": trainer.args.output_dir}}

    def _branches(self, trainer: ComLoRASFTTrainer, arm: Arm) -> dict[str, Any]:
        """What the run's own log says of its branches, and where the adapters of those that reached its end are."""
        winner, figures = trainer.determine_winner(), validation_figures(trainer.state.log_history, len(arm.rates))
        last = figures.pop(trainer.state.max_steps)
        folder = Path(trainer.args.output_dir)
        trainer.comlora_model.save_pretrained(str(folder / "branches"))
        ended = [branch for branch, nll in enumerate(last["nll"]) if nll is not None]
        passes = max(entry.get("comlora/row_passes", 0) for entry in trainer.state.log_history)
        return {
            "steps": trainer.state.max_steps,
            "units": round(passes / len(trainer.train_dataset), 4),
            "winner": winner,
            "branches": {str(branch): {by: last[by][branch] for by in last} for branch in ended},
            "watched": figures,
            "folders": {str(branch): str(folder / "branches" / f"branch_{branch}") for branch in ended},
        }

    def scorer(self, rank: int) -> PeftModel:
        """An ordinary PEFT model on a copy of the base, to load adapters of this rank into."""
        if rank not in self._scorers:
            lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
            self._scorers[rank] = get_peft_model(copy.deepcopy(self.base), lora).eval()
        return self._scorers[rank]

    def score(self, folder: str, rank: int, title: str) -> dict[str, Any]:
        """Held-out NLL and token accuracy of a plain adapter, and the hash of its weights' file."""
        file = Path(folder) / "adapter_model.safetensors"
        model = self.scorer(rank)
        set_peft_model_state_dict(model, load_file(file))
        if self.settings.adapters:
            self._keep(Path(folder), title)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return {**held_out_figures(model, self.test_rows, self.settings), "sha256": digest}

    def _keep(self, folder: Path, title: str) -> None:
        place = kept_folder(Path(self.settings.adapters), title)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (place / name).write_bytes((folder / name).read_bytes())

    @cached_property
    def untrained(self) -> dict[str, Any]:
        """The base's own figures on the held-out replies."""
        return held_out_figures(self.base, self.test_rows, self.settings)


def kept_folder(adapters: Path, title: str) -> Path:
    """Where a scored adapter is kept; its title is "ARM, seed SEED, BRANCH". lm_eval takes no comma in a path."""
    return adapters / re.sub(r"[^\w.-]+", "_", title)


def validation_figures(log: Sequence[dict[str, Any]], k: int) -> dict[int, dict[str, list[float | None]]]:
    """step -> {"nll", "accuracy"} of every branch on the validation rows, None for one that is out; from the log."""
    columns = {"nll": "loss", "accuracy": "accuracy"}
    return {
        entry["step"]: {
            own: [entry.get(f"eval_comlora/{name}_{branch}") for branch in range(k)] for own, name in columns.items()
        }
        for entry in log
        if "eval_comlora/winner" in entry
    }


@torch.no_grad()
def held_out_figures(model: PreTrainedModel | PeftModel, rows: Dataset, settings: Settings) -> dict[str, Any]:
    """NLL (nats; None if it is not finite) and token accuracy, means over all supervised tokens of the rows.

    Rows of like length go together.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda place: lengths[place])
    nll = correct = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for begin in range(0, len(order), settings.scored):
        batch = rows.select(order[begin : begin + settings.scored])
        ids, labels = ([torch.tensor(one) for one in batch[name]] for name in ("input_ids", "labels"))
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(one) for one in ids], batch_first=True).to(base.device)
        ids, labels = pad(ids, True, 0).to(base.device), pad(labels, True, -100).to(base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=settings.bf16):
            hidden = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
            asked = labels[:, 1:] != -100
            logits = base.lm_head(hidden[asked]).float()
        targets = labels[:, 1:][asked]
        nll = nll + torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double().cpu()
        correct = correct + (logits.argmax(dim=-1) == targets).sum().double().cpu()
        tokens += len(targets)
    mean = nll.item() / tokens
    return {"test_nll": mean if math.isfinite(mean) else None, "test_accuracy": correct.item() / tokens}


def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What does a job, by the settings of the command line."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = Settings.from_json(sys.argv[1])
    study = Study(settings)

    def run(job: dict[str, Any]) -> dict[str, Any]:
        if job["arm"] == "base":  # the model as it is
            result = {"arm": "base", "seed": 0, "units": 0.0, "winner": 0, "branches": {"0": study.untrained}}
        else:
            given = job["best"], settings.rates, settings.most
            arms = timed_arms(job["best"]) if job.get("alone") else all_arms(*given)
            arm = next(arm for arm in arms if arm.name == job["arm"])
            result = study.run(arm, job["seed"], job.get("alone", False))
        if job.get("alone"):
            result["alone"] = True
        elif "best" in job and not GRID_FIELD.fullmatch(job["arm"]):
            result["best"] = job["best"]
        return result

    return run


if __name__ == "__main__":
    work(prepare)

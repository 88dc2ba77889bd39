"""One run of the study: trains an arm with a seed, scores its branches. As a program: a worker that takes jobs.

A worker reads jobs from its standard input, one JSON object a line ({"arm", "size", "seed", "data"}), and answers each
with one line, the result or {"error"}. All else it prints goes to its standard error.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from study_arms import Arm, all_arms
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.data import build_prompt
from comlora_trl.demo import demo_model_path
from comlora_trl.training.evaluation import validate
from studies.common.worker import work

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
EVALUATED = 2000  # rows of all branches at a time in validation and test
Rows = list[dict[str, str]]


class Data(NamedTuple):
    """The rows of one size and seed, tokenized, and the test rows' tasks."""

    train: Dataset
    validation: Dataset
    test: Dataset
    tasks: list[str]


@lru_cache(maxsize=1)
def load_tokenizer() -> PreTrainedTokenizerBase:
    """The demo base's."""
    return AutoTokenizer.from_pretrained(demo_model_path())


@lru_cache(maxsize=16)
def load_rows(path: str) -> Data:
    """All rows of a file, tokenized once for many runs."""
    with open(path, encoding="utf-8") as file:
        splits = json.load(file)
    return Data(*(tokenize(splits[name]) for name in Data._fields[:3]), [row["task"] for row in splits["test"]])


def tokenize(rows: Rows) -> Dataset:
    """`input_ids` of prompt, answer and end, and `labels`, as TRL makes them; the trainer has nothing to prepare."""
    tokenizer = load_tokenizer()
    prompts = tokenizer([build_prompt(row["instruction"]) for row in rows])["input_ids"]
    answers = tokenizer([row["output"] + tokenizer.eos_token for row in rows])["input_ids"]
    pairs = list(zip(prompts, answers, strict=True))
    return Dataset.from_dict(
        {"input_ids": [p + a for p, a in pairs], "labels": [[-100] * len(p) + a for p, a in pairs]}
    )


class Watch(TrainerCallback):
    """Every living branch's validation figures at given steps: `seen`, step -> column -> values by branch.

    They are reported, and change nothing: no branch is chosen and none is retired.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps, self.seen, self.trainer = set(steps), {}, None

    def on_step_end(self, args: ComLoRAConfig, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.seen[state.global_step] = validation_figures(self.trainer)


def validation_figures(trainer: ComLoRASFTTrainer) -> dict[str, list[float | None]]:
    """NLL (nats) and accuracy of every living branch, both means over the supervised tokens."""
    alive = trainer.competition.state.alive
    tally = validate(
        trainer.model_wrapped, trainer.competition, [trainer.eval_dataset], trainer, trainer.measure_batch
    )
    result = tally.result(alive, "validation_loss", trainer.state.global_step)
    return {"nll": result["validation_nll"], "accuracy": result["validation_accuracy"]}


def train(arm: Arm, seed: int, data: Data, folder: str, bf16: bool = False) -> tuple[ComLoRASFTTrainer, Watch]:
    """A finished trainer, its winner determined, and what was watched on the way."""
    args = ComLoRAConfig(
        output_dir=folder,
        seed=seed,
        max_steps=arm.steps,
        warmup_steps=max(1, arm.steps // 30),
        lr_scheduler_type="cosine",
        per_device_train_batch_size=arm.rows,
        per_device_eval_batch_size=max(25, EVALUATED // arm.k),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        gradient_checkpointing=False,
        bf16=bf16,
        tf32=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=arm.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arm.fields,
    )
    watch = Watch(arm.watched_steps)
    trainer = ComLoRASFTTrainer(
        model=str(demo_model_path()),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=load_tokenizer(),
        peft_config=LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    return trainer, watch


@torch.no_grad()
def test_accuracy(trainer: ComLoRASFTTrainer, data: Data) -> list[dict[str, float]]:
    """Per branch and task, the share of questions whose greedy answer is the right one, word for word.

    Greedy decoding writes the right answer just where each of its tokens, the end included, is the first choice after
    those before it: one forward tells.
    """
    model, size = trainer.comlora_model.eval(), trainer.args.per_device_eval_batch_size
    hits: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(model.k)]
    for begin in range(0, len(data.test), size):
        examples = [data.test[place] for place in range(begin, min(begin + size, len(data.test)))]
        inputs = trainer._prepare_inputs(trainer.data_collator(examples))
        output = model(branch_pass=trainer.competition.branch_pass(), fused_lm_head=True, use_cache=False, **inputs)
        right = (output.correct[:, : len(examples)] == output.tokens[: len(examples)]).float().tolist()
        for branch, values in enumerate(right):
            for task, value in zip(data.tasks[begin:], values, strict=False):
                hits[branch][task].append(value)
    return [{task: sum(each) / len(each) for task, each in branch.items()} for branch in hits]


def score(trainer: ComLoRASFTTrainer, data: Data) -> dict[str, Any]:
    """The winner's index and the figures of every living branch."""
    winner, alive = trainer.determine_winner(), trainer.competition.state.alive
    figures, tests = validation_figures(trainer), test_accuracy(trainer, data)
    branches = {
        str(branch): {
            "nll": figures["nll"][branch],
            "accuracy": figures["accuracy"][branch],
            "test": sum(tests[branch].values()) / len(tests[branch]),
            "tasks": {task: round(value, 4) for task, value in tests[branch].items()},
        }
        for branch, lives in enumerate(alive)
        if lives
    }
    return {"winner": winner, "branches": branches}


def run(job: dict[str, Any], arms: dict[str, Arm], bf16: bool = False) -> dict[str, Any]:
    """The result of one job; the seconds are those of training, validation and export."""
    arm, data = arms[job["arm"]], load_rows(job["data"])
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        trainer, watch = train(arm, job["seed"], data, folder, bf16)
        seconds = time.perf_counter() - begin
        figures = score(trainer, data)
    kept = {key: job[key] for key in ("arm", "size", "seed", "alone") if key in job}
    watched = {"watched": watch.seen} if watch.seen else {}
    return {**kept, "row_passes": arm.row_passes, "seconds": round(seconds, 2), **figures, **watched}


def prepare() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What does a job, by the settings of the command line."""
    torch.set_num_threads(1)
    arms = {arm.name: arm for arm in all_arms(float(sys.argv[1]))}
    return lambda job: run(job, arms, sys.argv[2] == "bf16")


if __name__ == "__main__":
    work(prepare)

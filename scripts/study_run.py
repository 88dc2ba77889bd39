"""One run of the study: trains an arm with a seed, scores its branches. As a program: a worker that takes jobs.

A worker reads jobs from its standard input, one JSON object a line ({"arm", "size", "seed", "data"}), and answers each
with one line, the result or {"error"}. All else it prints goes to its standard error.
"""

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from study_arms import Arm, all_arms
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.data import COMMONSENSE_TASKS, build_prompt, first_keyword
from comlora_trl.demo import demo_model_path

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ANSWER_TOKENS = 12  # "the correct answer is ..." has fewer
BATCH = 500  # rows at a time in scoring
Rows = list[dict[str, str]]


@lru_cache(maxsize=1)
def load_tokenizer() -> PreTrainedTokenizerBase:
    """The demo base's, padding on the left for generation."""
    return AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")


@lru_cache(maxsize=4)
def load_rows(path: str) -> tuple[Dataset, Dataset, Rows]:
    """Training and validation rows, tokenized once for many runs; test rows as they are."""
    with open(path, encoding="utf-8") as file:
        splits = json.load(file)
    return tokenize(splits["train"]), tokenize(splits["validation"]), splits["test"]


def tokenize(rows: Rows) -> Dataset:
    """`input_ids` of prompt, answer and end, and `completion_mask`, as TRL makes them."""
    tokenizer = load_tokenizer()
    prompts = tokenizer([build_prompt(row["instruction"]) for row in rows])["input_ids"]
    answers = tokenizer([row["output"] + tokenizer.eos_token for row in rows])["input_ids"]
    pairs = list(zip(prompts, answers, strict=True))
    masks = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs]
    return Dataset.from_dict({"input_ids": [p + a for p, a in pairs], "completion_mask": masks})


def train(arm: Arm, seed: int, data: tuple[Dataset, Dataset, Rows], folder: str) -> ComLoRASFTTrainer:
    """A finished trainer, its winner determined."""
    args = ComLoRAConfig(
        output_dir=folder,
        seed=seed,
        max_steps=arm.steps,
        warmup_steps=max(1, arm.steps // 30),
        lr_scheduler_type="cosine",
        per_device_train_batch_size=arm.rows,
        per_device_eval_batch_size=BATCH,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=arm.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arm.fields,
    )
    trainer = ComLoRASFTTrainer(
        model=str(demo_model_path()),
        args=args,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=load_tokenizer(),
        peft_config=LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def pad(lists: list[list[int]], device: torch.device) -> torch.Tensor:
    """The lists as rows of one tensor, zeros on the right."""
    longest = max(map(len, lists))
    return torch.tensor([one + [0] * (longest - len(one)) for one in lists], device=device)


@torch.no_grad()
def validation_figures(model: Any, rows: Dataset) -> tuple[float, float]:
    """NLL (nats) and accuracy, both means over the supervised tokens."""
    nll, right, count = 0.0, 0, 0
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        ids, mask = (pad(batch[name], model.device) for name in ("input_ids", "completion_mask"))
        mask = mask[:, 1:] == 1
        logits, target = model(input_ids=ids).logits[:, :-1][mask].float(), ids[:, 1:][mask]
        nll += F.cross_entropy(logits, target, reduction="sum").item()
        right += (logits.argmax(-1) == target).sum().item()
        count += target.numel()
    return nll / count, right / count


@torch.no_grad()
def test_accuracy(model: Any, rows: Rows) -> dict[str, float]:
    """Accuracy of greedy answers by their first keyword, by task."""
    tokenizer, hits = load_tokenizer(), defaultdict(list)
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        prompts = tokenizer([build_prompt(r["instruction"]) for r in part], return_tensors="pt", padding=True)
        prompts = prompts.to(model.device)
        generated = model.generate(**prompts, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(generated[:, prompts["input_ids"].size(1) :], skip_special_tokens=True)
        for row, answer in zip(part, answers, strict=True):
            hits[row["task"]].append(first_keyword(answer, COMMONSENSE_TASKS[row["task"]].keywords) == row["answer"])
    return {task: sum(each) / len(each) for task, each in hits.items()}


def score(trainer: ComLoRASFTTrainer, data: tuple[Dataset, Dataset, Rows], branches: Sequence[int]) -> dict[str, Any]:
    """The winner's index and the figures of the given branches and of the winner."""
    model = trainer.comlora_model.eval()
    winner = trainer.determine_winner()
    figures = {}
    for branch in sorted({winner, *branches}):
        model.set_adapter(f"branch_{branch}")
        nll, accuracy = validation_figures(model, data[1])
        tasks = test_accuracy(model, data[2])
        figures[str(branch)] = {
            "nll": nll,
            "accuracy": accuracy,
            "test": sum(tasks.values()) / len(tasks),
            "tasks": {task: round(value, 4) for task, value in tasks.items()},
        }
    return {"winner": winner, "branches": figures}


def run(job: dict[str, Any], arms: dict[str, Arm]) -> dict[str, Any]:
    """The result of one job; the seconds are those of training, validation and export."""
    arm, data = arms[job["arm"]], load_rows(job["data"])
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        trainer = train(arm, job["seed"], data, folder)
        seconds = time.perf_counter() - begin
        retiring = arm.fields.get("comlora_rungs") is not None
        figures = score(trainer, data, [] if retiring else range(arm.fields["comlora_k"]))
    kept = {key: job[key] for key in ("arm", "size", "seed")}
    return {**kept, "row_passes": arm.row_passes, "seconds": round(seconds, 2), **figures}


def main() -> None:
    """Works until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print
    torch.set_num_threads(1)
    arms = {arm.name: arm for arm in all_arms(float(sys.argv[1]))}
    for line in sys.stdin:
        try:
            result = run(json.loads(line), arms)
        except Exception as error:  # one arm's failure must not end the study; it is reported as such
            result = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

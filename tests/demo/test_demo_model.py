"""The demo's base model: its tokenizer, its files, and that without an adapter it answers at chance."""

import importlib
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from comlora_trl.data.keywords import COMMONSENSE_TASKS, first_keyword
from comlora_trl.data.prompts import PROMPT_TEMPLATES, build_prompt
from comlora_trl.demo import demo_data_path, demo_model_path

PER_TASK = 40
TOOLS = Path(__file__).resolve().parents[2] / "tools" / "demo"
needs_tools = pytest.mark.skipif(not TOOLS.exists(), reason="installed without the repository's tools")
Accuracy = dict[str, float]


@pytest.fixture(autouse=True)
def tools_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_model_path(), padding_side="left")


@pytest.fixture(scope="module")
def test_rows() -> list[dict[str, str]]:
    return json.loads(demo_data_path("test").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "  two spaces,\ttab\n\n  and lines \n",
        "naïve 数学 🙂 \u00a0 x",
        "def f(x):\r\n    return x ** 2",
        "don't , stop .",
    ],
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_demo_rows_round_trip(tokenizer: PreTrainedTokenizerFast, test_rows: list[dict[str, str]]) -> None:
    texts = [build_prompt(row["instruction"]) + row["output"] for row in test_rows]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    assert max(map(len, encoded)) <= 128


# llm_adapters ends in spaces, and the last of them joins the next word in every byte-level BPE, LLaMA-3's included
@pytest.mark.parametrize("template", sorted(set(PROMPT_TEMPLATES) - {"llm_adapters"}))
def test_prompt_tokens_are_a_prefix(
    tokenizer: PreTrainedTokenizerFast, test_rows: list[dict[str, str]], template: str
) -> None:
    """TRL finds where the completion begins by this."""
    for row in test_rows[::10]:
        prompt = build_prompt(row["instruction"], template)
        alone, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + row["output"])["input_ids"]
        assert whole[: len(alone)] == alone


def test_special_tokens_are_distinct_and_not_added(tokenizer: PreTrainedTokenizerFast) -> None:
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert None not in special and len(set(special)) == 3
    assert not set(special) & set(tokenizer("a robin is a bird.")["input_ids"])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_model_path())


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """The model's greedy responses."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy_and_chance(rows: Sequence[dict[str, str]], responses: list[str]) -> tuple[Accuracy, Accuracy]:
    """Accuracy by first keyword of each task, and what guessing gives."""
    right: dict[str, list[bool]] = defaultdict(list)
    chance: Accuracy = {}
    for row, response in zip(rows, responses, strict=True):
        right[row["task"]].append(first_keyword(response, COMMONSENSE_TASKS[row["task"]].keywords) == row["answer"])
        chance[row["task"]] = 1 / len(row["instruction"].rsplit("Answer format: ", 1)[1].split("/"))
    assert set(right) == set(COMMONSENSE_TASKS)
    return {task: sum(hits) / len(hits) for task, hits in right.items()}, chance


def test_base_model_is_small_and_scores_near_chance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, test_rows: list[dict[str, str]]
) -> None:
    assert model.dtype == torch.float32 and model.config.model_type == "llama"
    assert 1e6 < model.num_parameters() < 5e6 and model.config.vocab_size == len(tokenizer)
    rows = [row for number, row in enumerate(test_rows) if number % 75 < PER_TASK]
    responses = generate(model, tokenizer, [build_prompt(row["instruction"]) for row in rows])
    accuracy, chance = accuracy_and_chance(rows, responses)
    assert abs(sum(accuracy.values()) - sum(chance.values())) / 8 < 0.1, (accuracy, chance)


@needs_tools
def test_base_model_knows_something_of_every_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """What it knows it says in the quizzes' layout; a task that it knows nothing of would stay at chance."""
    rng, rows = random.Random(0), []
    for make, facts in importlib.import_module("demo_world").GENERATORS.values():
        rows += [make(fact, 1, rng).row() for fact in rng.sample(facts, 25)]
    quiz_prompt = importlib.import_module("pretrain_demo").quiz_prompt
    responses = generate(model, tokenizer, [quiz_prompt(row["instruction"]) + "the correct answer is" for row in rows])
    accuracy, chance = accuracy_and_chance(rows, responses)
    assert all(accuracy[task] > chance[task] + 0.2 for task in accuracy), (accuracy, chance)


@needs_tools
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_default_run_leaves_every_task_between_chance_and_100(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    test_rows: list[dict[str, str]],
) -> None:
    """Else the demo could not tell one method from another."""
    monkeypatch.chdir(tmp_path)
    sft, argv = (
        importlib.import_module("comlora_trl.cli.sft"),
        ["--comlora_k", "2", "--use_cpu", "--disable_tqdm", "true"],
    )
    trainer = sft.build_trainer(sft.given_options(argv), sft.parse_arguments(argv))
    trainer.train()
    responses = generate(trainer.comlora_model.eval(), tokenizer, [build_prompt(r["instruction"]) for r in test_rows])
    accuracy, chance = accuracy_and_chance(test_rows, responses)
    assert all(chance[task] + 0.1 < accuracy[task] < 0.95 for task in accuracy), accuracy

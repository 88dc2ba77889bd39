"""The demo's base model: its tokenizer, its files, and that without an adapter it answers at chance."""

import json
from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from comlora_trl.data.keywords import COMMONSENSE_TASKS, first_keyword
from comlora_trl.data.prompts import PROMPT_TEMPLATES, build_prompt
from comlora_trl.demo import demo_data_path, demo_model_path

PER_TASK = 40


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


def test_base_model_is_small_and_scores_near_chance(
    tokenizer: PreTrainedTokenizerFast, test_rows: list[dict[str, str]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    assert model.dtype == torch.float32 and model.config.model_type == "llama"
    assert 1e6 < model.num_parameters() < 5e6 and model.config.vocab_size == len(tokenizer)
    right: dict[str, list[bool]] = defaultdict(list)
    chance: dict[str, float] = {}
    rows = [row for number, row in enumerate(test_rows) if number % 75 < PER_TASK]
    batch = tokenizer([build_prompt(row["instruction"]) for row in rows], return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False)
    responses = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, response in zip(rows, responses, strict=True):
        right[row["task"]].append(first_keyword(response, COMMONSENSE_TASKS[row["task"]].keywords) == row["answer"])
        chance[row["task"]] = 1 / len(row["instruction"].rsplit("Answer format: ", 1)[1].split("/"))
    accuracy = {task: sum(hits) / len(hits) for task, hits in right.items()}
    assert set(accuracy) == set(COMMONSENSE_TASKS)
    assert abs(sum(accuracy.values()) - sum(chance.values())) / 8 < 0.1, (accuracy, chance)

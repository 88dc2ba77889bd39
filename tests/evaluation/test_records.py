"""Every result says what it is a figure of, and nothing is silently another run's."""

import hashlib
import json

import pytest

pytest.importorskip("lm_eval")

from replaying import evaluate, manager_of  # noqa: E402

from comlora_trl.data import build_prompt  # noqa: E402
from comlora_trl.evaluation import harness, metrics, tasks  # noqa: E402
from comlora_trl.evaluation.harness import check_tasks  # noqa: E402


def gold(doc):
    return doc["answer"]


def write_boolq(folder, rows, word="question"):
    path = folder / "commonsense" / "boolq" / "test.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [
        {"instruction": f"{word} {i}?", "input": "", "output": "the answer is true", "answer": "true"}
        for i in range(rows)
    ]
    path.write_text(json.dumps(content))
    return folder


def write_adapter(folder, prompt="llm_adapters"):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": "org/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "competition.json").write_text(json.dumps({"k": 2, "winner": 0}))
    record = {
        "prompt_template": prompt,
        "base": {"name": "org/base"},
        "seed": 7,
        "data": "boolq",
        "settings": {"a": 1},
    }
    (folder / "training.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture(autouse=True)
def nothing_said():
    harness._said.clear()
    harness._pending.clear()


def record_of(result, task="comlora_boolq"):
    return result["configs"][task]["metadata"]["comlora"]


def test_a_result_records_what_it_is_of(tmp_path, capsys):
    write_boolq(tmp_path, 6)
    adapter = write_adapter(tmp_path / "winner")
    settings = {"limit": 4, "gen_kwargs": {"num_beams": 2}}
    result, model = evaluate(gold, ["comlora_boolq"], tmp_path, settings, peft=adapter)

    record = record_of(result)
    assert len(record["data_sha256"]) == 64
    assert record["adapter"].pop("sha256") == hashlib.sha256(b"weights").hexdigest()
    assert record["adapter"] == {
        "name": adapter,
        "method": "ComLoRA K=2 r=8",
        "base": "org/base",
        "rank": 8,
        "seed": 7,
        "data": "boolq",
        "settings": {"a": 1},
    }
    assert (record["rows"], record["expected_rows"], record["prompt"]) == (4, 3270, "llm_adapters")
    assert record["decoding"] == {"do_sample": False, "max_gen_toks": 32, "num_beams": 2}
    assert record["chat_template_sha256"] is None and record["protocol"] == "comlora"
    json.dumps(result["configs"])
    errors = capsys.readouterr().err
    assert "comlora-trl: rows scored: comlora_boolq 4 of 3,270\n" in errors
    assert model.seen[0][0] == build_prompt("question 0?", "llm_adapters")


def test_the_prompt_is_the_adapters_unless_it_is_named(tmp_path, capsys):
    """Seen: an adapter trained with --comlora_prompt llm_adapters was scored under the default without a word."""
    write_boolq(tmp_path, 1)
    adapter = write_adapter(tmp_path / "winner")
    _, model = evaluate(gold, ["comlora_boolq"], tmp_path, peft=adapter, comlora_prompt="hira")
    assert model.seen[0][0] == build_prompt("question 0?", "hira")
    assert f"{adapter} was trained under the prompt llm_adapters, and is scored under hira" in capsys.readouterr().err
    _, model = evaluate(gold, ["comlora_boolq"], tmp_path, lora_local_path=adapter)
    assert model.seen[0][0] == build_prompt("question 0?", "llm_adapters")
    assert f"prompt llm_adapters, under which {adapter} was trained" in capsys.readouterr().err
    _, model = evaluate(gold, ["comlora_boolq"], tmp_path, peft="org/unknown")
    assert model.seen[0][0] == build_prompt("question 0?")


def test_a_small_file_does_not_pass_for_all_of_mmlu(tmp_path, capsys):
    """Seen: 285 of 14,042 rows (five a subject) passed without a word."""
    from comlora_trl.data import mmlu

    (tmp_path / "mmlu").mkdir()
    rows = [
        {"question": f"{i}", "subject": subject, "choices": list("wxyz"), "answer": 0}
        for subject in mmlu.SUBJECT_ROWS
        for i in range(5)
    ]
    (tmp_path / "mmlu" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result, _ = evaluate(gold, ["comlora_mmlu"], tmp_path)
    assert "rows scored: comlora_mmlu (57 tasks) 285 of 14,042\n" in capsys.readouterr().err
    assert record_of(result, "comlora_mmlu_anatomy")["expected_rows"] == 135


def test_cached_requests_are_those_of_this_data_prompt_and_decoding(tmp_path, monkeypatch):
    """Seen: the first run's figures, 0.425 for 0.200."""
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path / "cache"))
    first, second = write_boolq(tmp_path / "1", 4), write_boolq(tmp_path / "2", 3, "other")
    cached = {"cache_requests": True}
    _, model = evaluate(gold, ["comlora_boolq"], first, cached)
    known = model.seen
    _, model = evaluate(gold, ["comlora_boolq"], first, cached)
    assert model.seen == known and len(list((tmp_path / "cache").iterdir())) == 1
    _, model = evaluate(gold, ["comlora_boolq"], second, cached)
    assert [prompt for prompt, _ in model.seen] == [build_prompt(f"other {i}?") for i in range(3)]
    _, model = evaluate(gold, ["comlora_boolq"], first, cached, comlora_prompt="hira")
    assert model.seen[0][0] == build_prompt("question 0?", "hira")
    _, model = evaluate(gold, ["comlora_boolq"], first, cached | {"gen_kwargs": {"num_beams": 4}})
    assert model.seen[0][1]["num_beams"] == 4
    _, model = evaluate(gold, ["comlora_boolq"], first, cached | {"samples": {"comlora_boolq": [2]}})
    assert [prompt for prompt, _ in model.seen] == [build_prompt("question 2?")]
    _, model = evaluate(gold, ["comlora_boolq"], first, cached | {"limit": 2})
    assert len(model.seen) == 2


def test_a_file_that_changes_within_the_process_is_read_again(tmp_path):
    """Seen: the caches kept the first answer."""
    for rows in (2, 3):
        _, model = evaluate(gold, ["comlora_boolq"], write_boolq(tmp_path, rows))
        assert len(model.seen) == rows


def test_another_bertscore_model_or_layer_is_another_score(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "score_dialogue", lambda *given: seen.append(given) or {"bleu": len(seen)})
    items = [(0, 0, "a", "b")]
    for name, layers in (("x", "1"), ("y", "1"), ("y", "2"), ("y", "2")):
        monkeypatch.setenv(metrics.MODEL_VARIABLE, name)
        monkeypatch.setenv(metrics.LAYERS_VARIABLE, layers)
        tasks.aggregate_bleu(items)
    assert len(seen) == 3


@pytest.fixture
def dialogue_dir(tmp_path, monkeypatch):
    lines = ["1 your persona: i swim.", "2 hi\thello there friend", "3 swim ?\tyes i do"]
    (tmp_path / "convai2").mkdir()
    (tmp_path / "convai2" / "valid_self_original.txt").write_text("\n".join(lines))
    for name in (metrics.MODEL_VARIABLE, metrics.LAYERS_VARIABLE, "NLTK_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(metrics, "score_dialogue", lambda *given: dict.fromkeys(tasks.DIALOGUE_METRICS, 1.0))
    return tmp_path


def missing():
    raise RuntimeError("METEOR needs WordNet")


def test_a_sample_has_its_row_and_the_prompt_once(dialogue_dir, monkeypatch):
    """Seen: the prompt eight times, once per metric, and no source row."""
    monkeypatch.setattr(metrics, "check_requirements", lambda: None)
    result, _ = evaluate(lambda doc: "yes", ["comlora_convai2"], dialogue_dir)
    sample = result["samples"]["comlora_convai2"][1]
    assert sample["doc"]["output"] == "yes i do" and sample["doc"]["instruction"].endswith("Q: swim ?")
    text = json.dumps(sample)
    assert text.count("### Response:") == 2  # the prompt, and the stop string
    assert text.count("your persona: i swim.") == 2  # the row, and the prompt
    record = record_of(result, "comlora_convai2")
    assert (record["rows"], record["expected_rows"]) == (2, 7801)
    assert (record["bertscore_model"], record["bertscore_layers"]) == ("roberta-large", 17)


def test_predictions_alone_need_no_metric(dialogue_dir, monkeypatch):
    """Seen: --predict_only demanded WordNet and roberta-large."""
    monkeypatch.setattr(metrics, "check_requirements", missing)
    result, _ = evaluate(lambda doc: "yes", ["comlora_convai2"], dialogue_dir, {"predict_only": True})
    assert [sample["resps"] for sample in result["samples"]["comlora_convai2"]] == [[["yes"]], [["yes"]]]
    manager = manager_of({"comlora_data_dir": str(dialogue_dir)})
    check_tasks(manager, ["comlora_convai2"], predict_only=True, num_fewshot=None)
    with pytest.raises(ValueError, match="METEOR needs WordNet"):
        check_tasks(manager, ["comlora_convai2"], predict_only=False, num_fewshot=None)
    with pytest.raises(ValueError, match="METEOR needs WordNet"):
        evaluate(lambda doc: "yes", ["comlora_convai2"], dialogue_dir)


def test_few_shot_examples_are_refused(tmp_path):
    write_boolq(tmp_path, 2)
    with pytest.raises(ValueError, match="comlora_boolq takes no few-shot examples, got num_fewshot=5"):
        evaluate(gold, ["comlora_boolq"], tmp_path, {"num_fewshot": 5})
    with pytest.raises(ValueError, match="got num_fewshot=1"):
        manager = manager_of({"comlora_data_dir": str(tmp_path)})
        check_tasks(manager, ["comlora_boolq"], predict_only=False, num_fewshot=1)
    evaluate(gold, ["comlora_boolq"], tmp_path, {"num_fewshot": 0})


def test_a_limit_on_the_demo_takes_some_of_each_task():
    result, _ = evaluate(gold, ["comlora_demo"], "unused", {"limit": 64})
    found = [sample["doc"]["task"] for sample in result["samples"]["comlora_demo"]]
    assert {found.count(task) for task in set(found)} == {8} and len(set(found)) == 8


def test_hira_counts_nothing_as_nothing():
    doc = {"task": "boolq", "answer": "true", "output": "the correct answer is true"}
    score = tasks.score_keyword_as_hira
    assert score(doc, ["it is true Q: false"]) == {"acc": 1.0}
    assert score(doc, ["Q: true"]) == {"acc": 0.0}
    assert score(doc | {"output": "no keyword"}, ["R: true"]) == {"acc": 1.0}


@pytest.mark.parametrize("task", ["comlora_boolq_llm_adapters", "comlora_boolq_hira"])
def test_the_named_protocols_prompt_and_decoding(tmp_path, task):
    write_boolq(tmp_path, 1)
    result, model = evaluate(gold, [task], tmp_path)
    protocol = task.removeprefix("comlora_boolq_")
    prompt, decoding = model.seen[0]
    assert prompt == build_prompt("question 0?", protocol) and record_of(result, task)["protocol"] == protocol
    assert decoding["num_beams"] == 4 and decoding["do_sample"] == (protocol == "hira")
    assert decoding["max_gen_toks"] == {"hira": 16, "llm_adapters": 32}[protocol]


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_model_without_an_adapter_is_scored_by_the_same_tasks(tmp_path, monkeypatch, capsys):
    """The user's turn is the instruction; the record has the chat template."""
    from conftest import make_model, make_tokenizer
    from lm_eval.models.huggingface import HFLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    lm = HFLM(pretrained=make_model(max_position_embeddings=1024).eval(), tokenizer=tokenizer, batch_size=4)
    seen = []
    generate = lm._model_generate
    monkeypatch.setattr(
        lm, "_model_generate", lambda context, **given: seen.append(context) or generate(context, **given)
    )
    write_boolq(tmp_path, 4)

    results = []
    for settings, metadata in (({"apply_chat_template": True}, {}), ({}, {}), ({"apply_chat_template": True}, "hira")):
        named = {"comlora_prompt": metadata} if metadata else {}
        result, _ = evaluate(None, ["comlora_boolq"], tmp_path, settings, model=lm, **named)
        results.append(record_of(result))
    prompts = [tokenizer.decode(context[0]).removeprefix("<s>") for context in seen]
    assert prompts[0] == "<user>question 0?<assistant>"
    assert prompts[1] == build_prompt("question 0?")
    assert prompts[2] == f"<user>{build_prompt('question 0?', 'hira')}<assistant>"
    assert [record["prompt"] for record in results] == ["plain", "comlora", "hira"]
    assert (
        results[0]["chat_template_sha256"] == results[2]["chat_template_sha256"] != results[1]["chat_template_sha256"]
    )
    assert results[1]["chat_template_sha256"] is None and results[0]["adapter"] is None
    assert "the instruction stands alone in the user's turn (prompt plain)" in capsys.readouterr().err

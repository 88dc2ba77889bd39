"""A replaying model through lm_eval: gold answers, empty ones, several keywords; and the reference's regexes."""

import json
import random
import re

import pytest

lm_eval = pytest.importorskip("lm_eval")

from replaying import evaluate, manager_of  # noqa: E402

import comlora_lm_eval_hook  # noqa: E402
from comlora_trl.data import COMMONSENSE_TASKS, build_prompt, first_keyword  # noqa: E402
from comlora_trl.data.keywords import first_letter  # noqa: E402
from comlora_trl.evaluation import tasks  # noqa: E402
from comlora_trl.evaluation.harness import check_tasks  # noqa: E402

comlora_lm_eval_hook.install()

REFERENCE = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Easy": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Challenge": r"answer1|answer2|answer3|answer4|answer5",
    "openbookqa": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
}
NAMES = {name: f"comlora_{name.lower().replace('-', '_')}" for name in COMMONSENSE_TASKS}


def reference_answer(task: str, output: str) -> str:
    """LLM-Adapters' extraction: what stands between the first two response marks, and the first match in it."""
    sentence = output.split("### Response:")[1].strip()
    found = re.findall(REFERENCE[task], sentence)
    return found[0] if found else ""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Five questions of each task; the sizes differ, so that weighting would show."""
    folder = tmp_path_factory.mktemp("data")
    for number, (task, facts) in enumerate(COMMONSENSE_TASKS.items()):
        rows = [
            {"instruction": f"{task} question {i}?", "input": "", "output": "", "answer": facts.keywords[i % 2]}
            for i in range(5 + number)
        ]
        path = folder / "commonsense" / task / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    subjects = [config.removeprefix("comlora_mmlu_") for config in mmlu_subjects()]
    rows = [
        {"question": f"{subject} {i}", "subject": subject, "choices": list("wxyz"), "answer": i % 4}
        for number, subject in enumerate(subjects)
        for i in range(1 + number % 3)
    ]
    (folder / "mmlu").mkdir()
    (folder / "mmlu" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def mmlu_subjects():
    names = manager_of(None).all_subtasks
    return [name for name in names if name.startswith("comlora_mmlu_")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda doc: f"the correct answer is {doc['answer']}", 1.0),
        (lambda doc: "", 0.0),
        (lambda doc: f"{doc['answer']}, or {' '.join(COMMONSENSE_TASKS[doc['task']].keywords)}", 1.0),
        (lambda doc: f"{COMMONSENSE_TASKS[doc['task']].keywords[doc['answer'][-1] in '1e']} {doc['answer']}", None),
        (lambda doc: doc["answer"].upper(), 0.0),
        (lambda doc: doc["answer"] if doc["task"] == "piqa" else "", 0.125),
    ],
    ids=["gold", "empty", "several", "wrong first", "upper case", "one of eight"],
)
def test_replayed_commonsense(data_dir, answer, expected):
    result, _ = evaluate(answer, ["comlora_commonsense"], data_dir)
    scores = result["results"]
    if expected is None:
        assert scores["comlora_piqa"]["acc,none"] == 0.0
    else:
        assert scores["comlora_commonsense"]["acc,none"] == pytest.approx(expected)
    assert set(NAMES.values()) <= scores.keys()


@pytest.mark.parametrize("template", ["comlora", "llm_adapters", "hira"])
def test_the_model_gets_the_exact_prompt(data_dir, template):
    _, model = evaluate(lambda doc: "", ["comlora_boolq"], data_dir, comlora_prompt=template)
    prompts = [prompt for prompt, _ in model.seen]
    assert prompts == [build_prompt(f"boolq question {i}?", template) for i in range(5)]
    assert model.seen[0][1] == {"until": ["### Response:"], "do_sample": False, "max_gen_toks": 32}


def test_mmlu_counts_every_question(data_dir):
    assert len(mmlu_subjects()) == 57

    def answer(doc):
        return f"Because it is so, A{doc['answer'] * 2}: the correct answer is {doc['answer']}"

    result, model = evaluate(answer, ["comlora_mmlu"], data_dir)
    assert result["results"]["comlora_mmlu"]["acc,none"] == 1.0
    result, model = evaluate(lambda doc: "D", ["comlora_mmlu"], data_dir)
    assert result["results"]["comlora_mmlu"]["acc,none"] == 0.0
    result, model = evaluate(lambda doc: "A.", ["comlora_mmlu"], data_dir)
    assert result["results"]["comlora_mmlu"]["acc,none"] == pytest.approx(57 / len(model.seen))
    assert len(result["groups"]) == 5


# Hendrycks et al.'s own categories.py: every subject by its subcategories
CATEGORIES = {
    "stem": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics "
    "high_school_statistics astronomy college_physics conceptual_physics high_school_physics college_chemistry "
    "high_school_chemistry college_biology high_school_biology college_computer_science computer_security "
    "high_school_computer_science machine_learning electrical_engineering",
    "humanities": "high_school_european_history high_school_us_history high_school_world_history prehistory "
    "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy world_religions "
    "international_law jurisprudence professional_law",
    "social_sciences": "high_school_government_and_politics public_relations security_studies us_foreign_policy "
    "human_sexuality sociology econometrics high_school_macroeconomics high_school_microeconomics "
    "high_school_geography high_school_psychology professional_psychology",
    "other": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition "
    "professional_medicine virology business_ethics management marketing global_facts miscellaneous "
    "professional_accounting",
}


def test_mmlu_categories_are_the_authors(data_dir):
    result, _ = evaluate(lambda doc: "A", ["comlora_mmlu"], data_dir)
    groups = result["group_subtasks"]
    for category, subjects in CATEGORIES.items():
        assert sorted(groups[f"comlora_mmlu_{category}"]) == sorted(f"comlora_mmlu_{s}" for s in subjects.split())
    assert sorted(groups["comlora_mmlu"]) == sorted(f"comlora_mmlu_{category}" for category in CATEGORIES)
    assert sum(len(subjects.split()) for subjects in CATEGORIES.values()) == len(mmlu_subjects()) == 57


def test_demo_gold():
    result, _ = evaluate(lambda doc: doc["answer"], ["comlora_demo"], "unused")
    assert result["results"]["comlora_demo"]["acc,none"] == 1.0


def test_extraction_agrees_with_the_reference():
    draw = random.Random(0)
    keywords = sorted({keyword for task in COMMONSENSE_TASKS.values() for keyword in task.keywords})
    pieces = [
        *keywords,
        "answer10",
        "untrue",
        "answer\uff11",
        "solution\u00b2",
        "True",
        "TRUE",
        "\n",
        "\r",
        "\u2028",
        " ",
    ]
    pieces += [
        "answer",
        "1",
        "tr",
        "ue",
        "### Response:",
        "### Instruction:",
        "\u0661",
        "option",
        "\x00",
        "\u00e9",
        "falsetrue",
        build_prompt("another instruction: true or answer2?"),
    ]
    for _ in range(10_000):
        response = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 8)))
        task = draw.choice(list(COMMONSENSE_TASKS))
        expected = reference_answer(task, build_prompt("I") + response)
        for answer in COMMONSENSE_TASKS[task].keywords:
            score = tasks.score_keyword({"task": task, "answer": answer}, [response])["acc"]
            assert score == (answer == expected), (task, response)


def test_letters_stand_alone():
    assert first_keyword("Because C", "ABCD", whole_word=True) == "C"
    assert first_keyword("Dogs. (B) or A", "ABCD", whole_word=True) == "B"
    assert first_keyword("Bad", "ABCD", whole_word=True) == ""


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A good answer would be B", "B"),
        ("A Roman legion. C", "C"),
        ("A 5-year plan: (D)", "D"),
        ("A", "A"),
        ("A.", "A"),
        ("(A) a good one", "A"),
        ("A: gold", "A"),
        ("A\nBecause it is", "A"),
        ("A is correct, not B", "A"),
        ("A because of B", "A"),
        ("A or B", "A"),
        ("the correct answer is A", "A"),
        ("A gas. A solid.", ""),
    ],
)
def test_an_article_is_no_answer(response, letter):
    assert first_letter(response, "ABCD") == letter
    assert tasks.score_letter({"answer": letter or "A"}, [response])["acc"] == float(letter != "")


@pytest.fixture
def dialogue_dir(tmp_path, monkeypatch):
    lines = ["1 your persona: i swim.", "2 hi\thello there friend", "3 swim ?\tyes i do", "3 swim ?\tsometimes"]
    (tmp_path / "convai2").mkdir()
    (tmp_path / "convai2" / "valid_self_original.txt").write_text("\n".join(lines))
    from comlora_trl.evaluation import metrics

    seen = []

    def score(predictions, references):
        seen.append((predictions, references))
        return {name: 50.0 for name in tasks.DIALOGUE_METRICS[:-1]}

    monkeypatch.setattr(metrics, "score_dialogue", score)
    monkeypatch.setattr(metrics, "check_requirements", lambda: seen.append("checked"))
    monkeypatch.setattr(metrics, "bertscore_model_name", lambda: "some/model")
    tasks._dialogue_scores.cache_clear()
    return tmp_path, seen


def test_convai2_scores_once_and_names_the_model(dialogue_dir):
    folder, seen = dialogue_dir
    result, model = evaluate(lambda doc: doc["output"] + "\nQ: more", ["comlora_convai2"], folder)
    scored = [entry for entry in seen if entry != "checked"]
    assert seen[0] == "checked" and len(scored) == 1, "requirements first, and all metrics from one scoring"
    assert scored[0][0][0] == "hello there friend"
    scores = result["results"]["comlora_convai2"]
    assert scores["average,none"] == 50.0 and scores["bertscore_model,none"] == "some/model"
    lm_eval.utils.make_table(result)
    json.dumps(scores)


def test_processes_may_hand_in_documents_in_any_order(dialogue_dir):
    _, seen = dialogue_dir
    tasks.aggregate_bleu([(1, 0, "one", "b"), (2, 1, "two", "c"), (0, 0, "zero", "a")])
    assert seen == [(["zero", "two"], [["a", "b"], ["c"]])]


def check(names, metadata, **given):
    check_tasks(manager_of(metadata), names, **{"predict_only": False, "num_fewshot": None, **given})


def test_missing_data_is_told_before_the_model_loads(tmp_path, data_dir):
    with pytest.raises(ValueError, match="boolq/test.json: no such file, but .* was named as the data folder"):
        check(["comlora_boolq"], {"comlora_data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="no stable public file"):
        check(["comlora_convai2"], {"comlora_data_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="unknown key 'comlora_promt'"):
        check(["comlora_piqa"], {"comlora_data_dir": str(data_dir), "comlora_promt": "hira"})
    with pytest.raises(ValueError, match="unknown prompt template 'alpaca': choose one of comlora, "):
        check(["comlora_piqa"], {"comlora_data_dir": str(data_dir), "comlora_prompt": "alpaca"})


def test_an_incomplete_mmlu_names_what_is_there(tmp_path):
    (tmp_path / "mmlu").mkdir()
    row = {"question": "Q", "subject": "anatomy", "choices": list("wxyz"), "answer": 0}
    (tmp_path / "mmlu" / "test.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="no question on .*expected all 57 subjects.*comlora_mmlu_anatomy"):
        check(["comlora_mmlu"], {"comlora_data_dir": str(tmp_path)})
    check(["comlora_mmlu_anatomy"], {"comlora_data_dir": str(tmp_path)})


def test_mmlu_subjects_run_by_name(shared_data):
    lines = (shared_data / "mmlu" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    names = sorted({f"comlora_mmlu_{json.loads(line)['subject']}" for line in lines})
    result, model = evaluate(lambda doc: f"the correct answer is {doc['answer']}", names, shared_data)
    assert sorted(result["results"]) == names and len(model.seen) == len(lines) == 2595
    assert all(scores["acc,none"] == 1.0 for scores in result["results"].values())


def test_seven_tasks_run_without_hellaswag(shared_data):
    names = [name for name in NAMES.values() if name != "comlora_hellaswag"]
    result, model = evaluate(lambda doc: doc["answer"], names, shared_data)
    assert all(result["results"][name]["acc,none"] == 1.0 for name in names)
    assert len(model.seen) == 1635 + 919 + 977 + 633 + 1188 + 586 + 250

"""Every source becomes prompt-completion rows, and bad data gets one line that says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from comlora_trl.data import (
    DataError,
    build_prompt,
    commonsense,
    convai2,
    load_training_dataset,
    mmlu,
)

ROW = {
    "instruction": "Is it so?\n\nAnswer format: true/false",
    "input": "",
    "output": "the answer is true",
    "answer": "true",
}
QUESTION = {"question": "Which?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1}
DIALOGUE = """1 your persona: i swim.
2 hi\thello there\t\tno|hello there
3 swim ?\tyes\t\tyes
1 your persona: i read.
2 hi\tgood day
"""


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch, tmp_path):
    monkeypatch.delenv("COMLORA_DATA_DIR", raising=False)
    monkeypatch.setenv("COMLORA_CACHE_DIR", str(tmp_path / "cache"))


def test_prompts_have_the_exact_white_space():
    words = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    pad = " " * 16
    assert build_prompt("I\nJ") == f"{words}\n\n### Instruction:\nI\nJ\n\n### Response:\n"
    expected = f"{words} \n\n{pad}### Instruction:\n{pad}I\n\n{pad}### Response:\n{pad}"
    assert build_prompt("I", "llm_adapters") == expected
    assert build_prompt("I", "hira") == f"{words}  \n\n### Instruction:\nI\n\n### Response:\n"
    assert build_prompt("{instruction} {x}").count("{instruction} {x}") == 1
    with pytest.raises(ValueError, match="'alpaca'.*comlora, llm_adapters, hira, plain"):
        build_prompt("I", "alpaca")


def test_commonsense_file_list_and_folder(tmp_path):
    first = write(tmp_path / "data" / "boolq" / "train.json", [ROW, ROW])
    second = write(tmp_path / "data" / "piqa" / "train.json", [dict(ROW, output="solution1")])
    expected = {"prompt": build_prompt(ROW["instruction"]), "completion": ROW["output"]}
    assert load_training_dataset(str(first)).to_list() == [expected] * 2
    rows = load_training_dataset(tmp_path / "data").to_list()
    assert rows == load_training_dataset([first, second]).to_list()
    assert [row["completion"] for row in rows] == [ROW["output"]] * 2 + ["solution1"]
    streamed = load_training_dataset(first, streaming=True)
    assert list(streamed) == [expected] * 2


def test_template_and_input_reach_the_prompt(tmp_path):
    path = write(tmp_path / "a.json", [dict(ROW, input="more")])
    prompt = load_training_dataset(path, template="hira")[0]["prompt"]
    assert prompt == build_prompt(ROW["instruction"] + "\n\nmore", "hira")


def test_mmlu(tmp_path):
    path = write(tmp_path / "mmlu" / "dev.jsonl", json.dumps(QUESTION) + "\n")
    for source, split in ((path, "train"), (path.parent, "dev")):
        [row] = load_training_dataset(source, split=split).to_list()
        assert row["completion"] == "the correct answer is B"
        assert "Which?\n\nA: a\nB: b\nC: c\nD: d\n\nAnswer format: A/B/C/D" in row["prompt"]


def test_five_questions_a_subject_are_taken_only_when_named(tmp_path, monkeypatch):
    write(tmp_path / "mmlu" / "dev.jsonl", json.dumps(QUESTION) + "\n")
    monkeypatch.setenv("COMLORA_DATA_DIR", str(tmp_path))
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=rf"mmlu/{split}\.jsonl: no such file.*or name the split dev, which is"):
            load_training_dataset("mmlu", split=split)
        with pytest.raises(DataError, match=rf"no data of the split '{split}'.*got dev\.jsonl; to use one of those"):
            load_training_dataset(tmp_path / "mmlu", split=split)
    assert len(load_training_dataset("mmlu", split="dev")) == 1


def test_a_hub_out_of_reach_is_not_a_wrong_name():
    """The suite runs with HF_HUB_OFFLINE."""
    with pytest.raises(DataError, match="the train questions cannot be loaded.*set COMLORA_DATA_DIR") as caught:
        load_training_dataset("mmlu")
    assert "\n" not in str(caught.value) and "not a preset" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hubs_rows_are_checked_too(tmp_path, monkeypatch, streaming):
    rows = [QUESTION, dict(QUESTION, choices=["a", "b", "c"])]
    asked = []

    def hub(*names, **options):
        asked.append((names, options["split"], options["revision"]))
        dataset = datasets.Dataset.from_list(rows)
        dataset = dataset.cast_column("answer", datasets.ClassLabel(names=list("ABCD")))
        return dataset.to_iterable_dataset() if options["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(
        DataError, match=r"cais/mmlu: row 1 has the choices \['a', 'b', 'c'\], expected a list of four"
    ):
        list(load_training_dataset("mmlu", streaming=streaming))
    rows.pop()
    [row] = load_training_dataset("mmlu", streaming=streaming)
    assert row["completion"] == "the correct answer is B" and row.keys() == {"prompt", "completion"}
    # the configuration "auxiliary_train" nests the same questions in one column
    assert asked[0] == (("cais/mmlu", "all"), "auxiliary_train", mmlu.HUB_REVISION)


def test_a_folder_of_parquet_is_checked_too(tmp_path):
    datasets.Dataset.from_list([{"instruction": 5, "output": "x"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 0 has the instruction 5, expected text"):
        load_training_dataset(tmp_path)


def test_a_file_has_one_split(tmp_path):
    path = write(tmp_path / "boolq.json", [ROW])
    for source in (path, [path]):
        assert len(load_training_dataset(source)) == 1
        with pytest.raises(DataError, match="boolq.json: a file has no split 'validation'.*leave the split out"):
            load_training_dataset(source, split="validation")
    assert len(load_training_dataset(tmp_path)) == 1
    with pytest.raises(DataError, match="no data of the split 'validation'.*got boolq.json"):
        load_training_dataset(tmp_path, split="validation")
    with pytest.raises(DataError, match="convai2 has no split 'dev'"):
        load_training_dataset("convai2", split="dev")


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    for name, content, rows in [
        ("a.json", [ROW], 1),
        ("b.jsonl", json.dumps(QUESTION), 1),
        ("c.txt", DIALOGUE, 3),
        ("d.jsonl", json.dumps(chat), 1),
        ("e.json", [chat], 1),
    ]:
        path = write(tmp_path / name, content)
        plain = load_training_dataset(path).to_list()
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert load_training_dataset(path).to_list() == plain and len(plain) == rows


def test_convai2_starts_anew_at_number_one(tmp_path):
    path = write(tmp_path / "train_self_original.txt", DIALOGUE)
    rows = load_training_dataset(path.parent).to_list()
    assert [row["completion"] for row in rows] == ["hello there", "yes", "good day"]
    assert "your persona: i swim.\nQ: hi\nR: hello there\nQ: swim ?\n" in rows[1]["prompt"]
    assert "i swim" not in rows[2]["prompt"] and "hello" not in rows[2]["prompt"]
    assert "no|hello" not in "".join(row["prompt"] for row in rows)


def test_references_are_grouped_like_the_reference_implementation():
    groups = convai2.number_groups(["p", "p", "q", "p"])
    grouped = convai2.group_references(groups, ["1", "2", "3", "4"], ["a", "b", "c", "d"])
    assert grouped == (["1", "3", "4"], [["a", "b"], ["c"], ["d"]])


@pytest.mark.parametrize(
    ("response", "reply", "as_hira"),
    [
        (" i swim .\nQ: and\nR: you", "i swim .", "i swim ."),
        ("R: i swim .\nR: twice", "i swim .", ""),
        ("\nR: i swim .\n  Q: you ?", "i swim .", ""),
        ("i like BBQ: ribs", "i like BBQ: ribs", "i like BB"),
        ("i swim . TARGET: x ### Instruction:", "i swim . TARGET: x", "i swim ."),
        ("R:", "", ""),
        ("R: R: you", "R: you", ""),
    ],
)
def test_a_reply_is_cut_at_the_next_line_with_a_mark(response, reply, as_hira):
    assert convai2.cut_reply(response) == reply
    assert convai2.cut_reply_as_hira(response) == as_hira


def test_mmlus_rows_by_subject_are_the_real_ones(shared_data):
    from collections import Counter

    found = Counter(row["subject"] for row in mmlu.read_mmlu_rows(shared_data / "mmlu" / "test.jsonl"))
    assert found and all(mmlu.SUBJECT_ROWS[subject] == rows for subject, rows in found.items())
    assert len(mmlu.SUBJECT_ROWS) == 57 and mmlu.TEST_ROWS == 14042


def test_demo():
    assert len(load_training_dataset("demo")) > len(load_training_dataset("demo", split="validation")) > 0
    with pytest.raises(DataError, match="'dev'.*train, validation, test"):
        load_training_dataset("demo", split="dev")


def test_trl_formats_are_left_alone(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    path = write(tmp_path / "chat.jsonl", json.dumps(row) + "\n")
    assert load_training_dataset(str(path))[0] == row


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"a\.json: the file is empty"),
        ("a.json", "[]", r"a\.json: the list holds no rows"),
        ("a.json", "[{", r"a\.json: not valid JSON"),
        ("a.json", {"a": 1}, r"a\.json: expected a list of JSON objects"),
        ("a.json", [ROW, {"instruction": "I"}], r"a\.json: row 1 has no 'output'; expected the fields instruction"),
        ("a.jsonl", json.dumps(dict(QUESTION, answer=4)), r"row 0 has the answer 4, expected an index 0 to 3"),
        (
            "a.jsonl",
            json.dumps(dict(QUESTION, choices=["a"])),
            r"row 0 has the choices \['a'\], expected a list of four",
        ),
        ("a.json", [ROW, dict(ROW, instruction=5)], r"a\.json: row 1 has the instruction 5, expected text; fix"),
        ("a.json", [dict(ROW, output=True)], r"row 0 has the output True, expected text"),
        ("a.json", [dict(ROW, input=["x"])], r"row 0 has the input \['x'\], expected text"),
        ("a.json", [dict(QUESTION, answer=None)], r"row 0 has no 'answer'; expected the fields question, choices"),
        ("a.json", [dict(QUESTION, answer=True)], r"row 0 has the answer True, expected a whole number"),
        ("a.json", [dict(QUESTION, question=["w"])], r"row 0 has the question \['w'\], expected text"),
        ("a.json", [dict(QUESTION, choices="abcd")], r"row 0 has the choices 'abcd', expected a list"),
        (
            "a.json",
            [dict(QUESTION, choices=[1, 2, 3, 4])],
            r"row 0 has the choices \[1, 2, 3, 4\], expected a list of",
        ),
        ("a.txt", "1 your persona: i swim.\n", r"holds no dialogue turn"),
        ("a.txt", "hello\n", r"line 1 does not begin with its number"),
        ("a.txt", "1 hi\tho\n", r"line 1 belongs to a dialogue without 'your persona:'"),
        ("a.txt", "1 your persona: i swim.\n2 hi\n", r"line 2 has no reply"),
        ("a.csv", "x", r"unknown kind of file; expected \.json"),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_training_dataset(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_missing_things_get_one_line(tmp_path, monkeypatch):
    for name, message in [
        ("convai2", "no stable public file.*COMLORA_DATA_DIR=DIR"),
        ("boolq", "no train file of boolq alone.*commonsense_170k"),
        (tmp_path, "no data of the split 'train'; expected TASK/train.json"),
    ]:
        with pytest.raises(DataError, match=message):
            load_training_dataset(name)
    monkeypatch.setenv("COMLORA_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="mmlu/train.jsonl: no such file, but .* was named as the data folder"):
        load_training_dataset("mmlu")
    with pytest.raises(DataError, match="hellaswag/test.json: no such file"):
        commonsense.test_file("hellaswag", str(tmp_path))


def test_prompts_and_evaluation_import_no_torch():
    code = (
        "import sys, comlora_trl.data, comlora_trl.evaluation.hook, comlora_trl.evaluation.tasks;"
        "comlora_trl.data.build_prompt('I');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'trl', 'datasets', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_data(shared_data):
    assert len(load_training_dataset(shared_data / "commonsense")) == 9427 + 2251 + 1119 + 4957
    train = load_training_dataset(shared_data / "convai2")
    text = (shared_data / "convai2" / "train_self_original.txt").read_text(encoding="utf-8")
    assert len(train) == sum("\t" in line for line in text.split("\n"))
    assert len(load_training_dataset(shared_data / "mmlu", split="dev")) == 285
    assert len(mmlu.read_mmlu_rows(shared_data / "mmlu" / "test.jsonl")) == 2595

"""The demo data: reproducible, split cleanly, in the eight formats, and small."""

import importlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from comlora_trl.data.keywords import COMMONSENSE_TASKS, first_keyword
from comlora_trl.demo import DEMO_SPLITS, demo_data_path, demo_model_path, demo_recipe_path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "demo" / "make_demo_data.py"


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {split: json.loads(demo_data_path(split).read_text(encoding="utf-8")) for split in DEMO_SPLITS}


@pytest.mark.skipif(not SCRIPT.exists(), reason="installed without the repository's tools")
def test_script_rewrites_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, SCRIPT, "--out", tmp_path], check=True, capture_output=True)
    for split in DEMO_SPLITS:
        assert (tmp_path / f"{split}.json").read_bytes() == demo_data_path(split).read_bytes(), split


@pytest.fixture(scope="module")
def world() -> Iterator[ModuleType]:
    """tools/demo/demo_world.py, where the repository is there."""
    if not SCRIPT.exists():
        pytest.skip("installed without the repository's tools")
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("demo_world")
    sys.path.remove(str(SCRIPT.parent))


def test_questions_of_validation_and_test_are_held_out(
    world: ModuleType, rows: dict[str, list[dict[str, str]]]
) -> None:
    for split in DEMO_SPLITS:
        assert {world.is_held_out(row["instruction"]) for row in rows[split]} == {split != "train"}


def test_every_depth_of_a_task_has_distinct_options_and_names_the_right_one(world: ModuleType) -> None:
    rng = random.Random(0)
    for task, (make, facts) in world.GENERATORS.items():
        for depth in world.DEPTHS:
            for fact in rng.sample(facts, 20):
                item = make(fact, depth, rng)
                assert item.task == task and len(set(item.options)) == len(item.options)
                assert set(item.keywords) <= set(COMMONSENSE_TASKS[task].keywords)
                assert item.row()["answer"] == item.keywords[item.right]


def test_more_rows_of_another_seed_are_other_rows(world: ModuleType, rows: dict[str, list[dict[str, str]]]) -> None:
    splits = importlib.import_module("make_demo_data").make_splits(train=40, validation=5, test=10, seed=1)
    assert [len(splits[split]) for split in DEMO_SPLITS] == [320, 40, 80]
    known = {row["instruction"] for row in rows["test"]}
    assert len(known & {row["instruction"] for row in splits["test"]}) < 20


def test_no_instruction_occurs_twice_across_splits(rows: dict[str, list[dict[str, str]]]) -> None:
    instructions = [row["instruction"] for split in DEMO_SPLITS for row in rows[split]]
    assert len(instructions) == len(set(instructions))


@pytest.mark.parametrize("split", DEMO_SPLITS)
def test_rows_follow_the_formats(rows: dict[str, list[dict[str, str]]], split: str) -> None:
    counts = Counter(row["task"] for row in rows[split])
    assert set(counts) == set(COMMONSENSE_TASKS) and len(set(counts.values())) == 1
    for row in rows[split]:
        keywords = COMMONSENSE_TASKS[row["task"]].keywords
        offered = row["instruction"].rsplit("Answer format: ", 1)[1].split("/")
        assert set(row) == {"instruction", "input", "output", "answer", "task"} and row["input"] == ""
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert row["answer"] in offered and set(offered) <= set(keywords)
        assert first_keyword(row["output"], keywords) == row["answer"]


@pytest.mark.parametrize("split", DEMO_SPLITS)
def test_always_giving_one_answer_scores_at_chance(rows: dict[str, list[dict[str, str]]], split: str) -> None:
    for task in COMMONSENSE_TASKS:
        answers = Counter(row["answer"] for row in rows[split] if row["task"] == task)
        share = max(answers.values()) / answers.total()
        assert share <= 1 / len(answers) + 0.05, (task, answers)


def test_everything_embedded_stays_below_8_mb() -> None:
    folder = demo_recipe_path().parent
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert size <= 8_000_000
    assert demo_model_path().parent == folder


def test_an_unknown_split_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'dev'.*train, validation, test"):
        demo_data_path("dev")


def test_the_paths_need_no_torch() -> None:
    code = "import sys, comlora_trl.demo as d; d.demo_model_path(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_another_world_has_other_facts_in_the_same_words(world: ModuleType) -> None:
    facts = importlib.import_module("demo_facts")
    assert facts.shuffled_world(0, share=0.0) == facts.DEMO and facts.shuffled_world(0) == facts.shuffled_world(0)
    other = facts.shuffled_world(0)
    for name in ("kind", "goals", "feeling", "scenes"):
        known, new = getattr(facts.DEMO, name), getattr(other, name)
        assert set(known) == set(new) and Counter(known.values()) == Counter(new.values())
        assert sum(known[fact] == new[fact] for fact in known) < len(known) / 4
    make, nouns = world.generators(other)["ARC-Easy"]
    item = make(nouns[0], 1, random.Random(0))
    assert other.kind[nouns[0]] in item.question and item.options[item.right] == nouns[0]

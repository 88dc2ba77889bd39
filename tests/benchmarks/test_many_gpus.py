"""The measurement of two GPUs, on two gloo processes: its runs equal those of one process, and its page is written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "many_gpus.py"
ZERO = ["ZeRO-2", "ZeRO-3"] if importlib.util.find_spec("deepspeed") else []
EQUAL = 2e-6  # the bases and the logged losses are float32


def call(*options: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("many") / "results.jsonl"
    call("--output", output, "--steps", 6, "--rows", 8, "--shapes", "SmolLM2-135M", "--commit", "abc123")
    return output


def lines(results: Path, **wanted: object) -> list[dict]:
    found = [json.loads(line) for line in results.read_text().splitlines()]
    return [line for line in found if all(line[name] == value for name, value in wanted.items())]


def test_every_arm_was_measured(results):
    assert [line for line in lines(results) if "ms" not in line] == []
    backends = ["DDP", "FSDP2", *ZERO]
    assert [line["backend"] for line in lines(results, processes=2)] == [name for name in backends for _ in range(4)]
    assert len(lines(results, processes=1, resumed=False)) == 4 * 2  # all rows of a step, and half of them
    assert len(lines(results, resumed=True)) == 2 * 2
    assert all(line["commit"] == "abc123" and "torch" in line["versions"] for line in lines(results))
    assert all(len(line["losses"]) == 6 for line in lines(results))


def test_two_processes_equal_one(results):
    for two in lines(results, processes=2):
        (one,) = lines(results, processes=1, rows=8, resumed=False, method=two["method"])
        assert two["losses"] == pytest.approx(one["losses"], rel=EQUAL), two["backend"]
        assert two.get("decided") == one.get("decided"), two["backend"]


def test_one_process_resumes_the_run_of_two(results):
    for resumed in lines(results, resumed=True):
        (whole,) = lines(results, processes=2, backend=resumed["backend"], method=resumed["method"])
        assert resumed["losses"] == pytest.approx(whole["losses"], rel=EQUAL), resumed["backend"]
        assert len(resumed["steps_ms"]) < len(whole["steps_ms"])  # it did not begin anew
        assert resumed["decided"] == whole["decided"]


def test_report_is_written_between_the_markers(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- two GPUs: begin -->\nold\n<!-- two GPUs: end -->\nafter\n")
    call("--output", results, "--report", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "commit abc123" in text and "| K=1 | 2, FSDP2 |" in text and "differ**" not in text
    page.write_text("no markers")
    with pytest.raises(AssertionError, match="has no place for the report"):
        call("--output", results, "--report", page)
    assert page.read_text() == "no markers"


def test_no_arm_begins_when_time_is_over(tmp_path):
    output = tmp_path / "results.jsonl"
    call("--output", output, "--processes", 1, "--seconds", 0, "--backends", "DDP")
    assert {line["skipped"] for line in lines(output)} == {"no time was left"}

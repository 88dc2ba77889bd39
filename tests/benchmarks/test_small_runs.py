"""The measurement of whole runs, at a tiny shape: all trainers run, rungs are timed, ratios are to the same loss."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

ROOT = Path(__file__).resolve().parents[2]
ARMS = ["trl", "tournament", "trl_dpo", "dpo_tournament", "dpo_k4"]


def test_whole_runs_of_sft_and_dpo(tmp_path):
    output = tmp_path / "small.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "small.py"), "--arms", *ARMS, "--output", str(output)]
    command += ["--shape", "tiny", "--rows", "8", "--steps", "12", "--validation", "8", "--longest", "48", "--profile"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    found = {one["arm"]: one for one in json.loads(output.read_text())}
    assert [*found] == ARMS
    for one in found.values():
        assert len(one["times_ms"]) == 12 and one["profile"]["host_ms"] > 0
    timed = {arm: len(one["selections_s"]) for arm, one in found.items()}
    assert timed["trl"] == timed["trl_dpo"] == 0
    assert timed["tournament"] == timed["dpo_tournament"] == 3  # two rungs and the selection
    assert timed["dpo_k4"] == 1
    rows = {row.split("|")[1].strip(): row.split("|") for row in done.stdout.splitlines() if row.startswith("| ")}
    ratio = found["dpo_tournament"]["step_ms"] / found["trl_dpo"]["step_ms"]
    assert float(rows["dpo_tournament"][6]) == pytest.approx(ratio, abs=0.006)

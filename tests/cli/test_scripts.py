"""The scripts as a user runs them, from a folder that is not the repository."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "2", "--use_cpu", "--bf16", "false", "--per_device_train_batch_size", "4"]


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def test_default_run_leaves_a_winner_and_export_finds_it_again(tmp_path):
    done = run(
        tmp_path, "sft.py", "--comlora_k", "2", "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "3"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "K=2 branches of rank 8" in done.stdout and "winner: branch_" in done.stdout
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "winner")
    again = run(tmp_path, "sft.py", "--comlora_k", "2")
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].startswith(
        "error: the winner's folder winner"
    )

    done = run(tmp_path, "export_winner.py", "comlora-output/checkpoint-3", "--branch", "all", "--output", "branches")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "branches").iterdir()} == {"branch_0", "branch_1"}
    done = run(tmp_path, "export_winner.py", "comlora-output/checkpoint-3", "--branch", "best", "--output", "x")
    assert done.stderr.strip().splitlines()[-1].startswith("error: --branch best is not possible")


@pytest.mark.exhaustive
def test_recipe_file_gives_way_to_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_name: demo\ncomlora_k: 3\nlearning_rate: 0.001\nmax_length: 256\n")
    done = run(tmp_path, "sft.py", "--config", str(recipe), "--lora_r", "4", *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "K=3 branches of rank 4" in done.stdout


def test_bad_input_is_one_line(tmp_path):
    done = run(tmp_path, "sft.py", "--comlora_k", "0")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "error: comlora_k=0 is not possible: it must be 1 or more (1 is plain LoRA, 2 the paper's best setting)."
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["commonsense", "convai2"])
def test_real_data_trains_every_branch(tmp_path, shared_data, name):
    source = shared_data / name
    if name == "commonsense":
        for task in ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"):
            (tmp_path / "data" / task).mkdir(parents=True)
            (tmp_path / "data" / task / "train.json").symlink_to(source / task / "train.json")
        source = tmp_path / "data"
    options = ["--max_steps", "10", "--learning_rate", "0.003", "--max_length", "512", "--eval_strategy", "steps"]
    options += ["--eval_steps", "5", "--comlora_validation_size", "16", "--per_device_train_batch_size", "2"]
    done = run(tmp_path, "sft.py", "--dataset_name", str(source), *SHORT, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "winner" / "competition.json").read_text())
    evaluations = [entry for entry in summary["history"] if "eval_comlora/loss_0" in entry]
    for branch in (0, 1):
        assert evaluations[-1][f"eval_comlora/loss_{branch}"] < evaluations[0][f"eval_comlora/loss_{branch}"]
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "winner")

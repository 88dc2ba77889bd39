"""Two processes equal one with the doubled batch, and a killed run resumes bitwise; both in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import difference, exhaustive

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer, parameters
from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

output, batch, names, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "resume"
field = {"comlora_k": 4, "comlora_selector": False, "comlora_branch_learning_rates": [5e-3, 1e-2, 2e-2, 4e-2]}
killed = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12, "logging_steps": 3}
modes = {
    "padded": {}, "chunked": {"comlora_branch_chunk": 1}, "packed": {"padding_free": True, "max_length": None},
    "all_rows": {**field, "comlora_rungs": "0.3:2,0.6:1"},
    "shared_rows": {**field, "comlora_rungs": "0.3:3,0.6:1", "comlora_rows": "shared"},
    "shared_packed": {
        **field, "comlora_rungs": "0.5:2", "comlora_rows": "shared", "padding_free": True, "max_length": None
    },
    "kill": killed, "kill_in_a_rung": {**killed, **field, "comlora_rungs": "0.25:2,0.6:1", "comlora_rows": "shared"},
}
for name in names.split(","):
    folder = output if resume or "kill" in name else f"{output}/{name}"
    arguments = make_arguments(folder, per_device_train_batch_size=batch, per_device_eval_batch_size=4, max_steps=6)
    config = ComLoRAConfig(**{**arguments, **modes[name]}, comlora_overwrite_winner=True)
    lora = {"lora_dropout": 0.1} if "kill" in name else {}
    trainer = ComLoRASFTTrainer(
        make_model().double(), config, train_dataset=make_dataset(), eval_dataset=make_dataset(13),
        processing_class=make_tokenizer(), peft_config=make_lora(**lora),
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.accelerator.is_main_process:
        state = trainer.competition.state
        torch.save({"parameters": parameters(trainer), "state": vars(state)}, folder + "/result.pt")
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parents[2]}",
    "OMP_NUM_THREADS": "1",
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


ONE_AND_TWO = (("one", 8, [sys.executable]), ("two", 4, LAUNCH))


def run(script: Path, folder: Path, batch: int, modes: str, launcher: list[str], resume: str = "new"):
    command = [*launcher, str(script), str(folder), str(batch), modes, resume]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    return lambda name, batch, mode, launcher, resume="new": run(
        script, tmp_path / name, batch, mode, launcher, resume
    )


def result(process: subprocess.Popen, folder: Path) -> dict:
    finish(process)
    return torch.load(folder / "result.pt", weights_only=False)


MODES = ("padded", "chunked", "packed", "all_rows", "shared_rows", "shared_packed")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> Path:
    """A folder with the results of one process and of two, each with all modes after one another."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "run.py"
    script.write_text(SCRIPT)
    runs = [run(script, folder / name, batch, ",".join(MODES), launcher) for name, batch, launcher in ONE_AND_TWO]
    for process in runs:
        finish(process)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(one_and_two, mode):
    one, two = (torch.load(one_and_two / name / mode / "result.pt", weights_only=False) for name in ("one", "two"))
    # DDP knows every parameter for good: those of retired branches stay with it, and train no more
    living = {name: two["parameters"][name] for name in one["parameters"]}
    assert difference(one["parameters"], living) < 1e-9
    for kept in ("wins", "retired", "row_passes"):
        assert one["state"][kept] == two["state"][kept]
    first, second = one["state"]["selection"], two["state"]["selection"]
    assert first["winner"] == second["winner"] and first["examples"] == second["examples"] == 13
    if first["scores"]:
        assert first["scores"] == pytest.approx(second["scores"], abs=1e-6)


@pytest.mark.parametrize("mode", [*exhaustive("kill"), "kill_in_a_rung"])
def test_killed_and_resumed_ends_bitwise_where_the_uninterrupted_run_does(start, tmp_path, mode):
    whole = result(start("whole", 4, mode, [sys.executable]), tmp_path / "whole")
    process = start("killed", 4, mode, [sys.executable])
    checkpoint = tmp_path / "killed" / "checkpoint-5" / "trainer_state.json"
    for _ in range(2400):
        if checkpoint.is_file() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert checkpoint.is_file()
    for later in ("checkpoint-10", "checkpoint-12"):  # however late the kill came, resume from step 5
        subprocess.run(["rm", "-rf", str(tmp_path / "killed" / later)], check=True)
    resumed = result(start("killed", 4, mode, [sys.executable], "resume"), tmp_path / "killed")
    for name, value in whole["parameters"].items():
        assert torch.equal(value, resumed["parameters"][name]), name
    assert whole["state"] == resumed["state"]

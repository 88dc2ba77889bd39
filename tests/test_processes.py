"""Two processes equal one with the doubled batch, and a killed run resumes bitwise; both in real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import difference

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer, parameters
from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

output, batch, mode, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "resume"
modes = {
    "padded": {}, "chunked": {"comlora_branch_chunk": 1}, "packed": {"padding_free": True, "max_length": None},
    "kill": {"save_strategy": "steps", "save_steps": 5, "max_steps": 12, "logging_steps": 3},
}
arguments = make_arguments(output, per_device_train_batch_size=batch, per_device_eval_batch_size=4, max_steps=6)
config = ComLoRAConfig(**{**arguments, **modes[mode]}, comlora_overwrite_winner=True)
lora = {"lora_dropout": 0.1} if mode == "kill" else {}
trainer = ComLoRASFTTrainer(
    make_model().double(), config, train_dataset=make_dataset(), eval_dataset=make_dataset(13),
    processing_class=make_tokenizer(), peft_config=make_lora(**lora),
)
trainer.train(resume_from_checkpoint=resume)
if trainer.accelerator.is_main_process:
    state = trainer.comlora_model.competition_state
    torch.save({"parameters": parameters(trainer), "state": vars(state)}, output + "/result.pt")
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    "OMP_NUM_THREADS": "1",
}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def run(name: str, batch: int, mode: str, launcher: list[str], resume: str = "new") -> subprocess.Popen:
        command = [*launcher, str(script), str(tmp_path / name), str(batch), mode, resume]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


def result(process: subprocess.Popen, folder: Path) -> dict:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return torch.load(folder / "result.pt", weights_only=False)


@pytest.mark.parametrize("mode", ["padded", "chunked", "packed"])
def test_two_processes_equal_one(start, tmp_path, mode):
    one = result(start("one", 8, mode, [sys.executable]), tmp_path / "one")
    two = result(start("two", 4, mode, LAUNCH), tmp_path / "two")
    assert difference(one["parameters"], two["parameters"]) < 1e-9
    assert one["state"]["wins"] == two["state"]["wins"]
    first, second = one["state"]["selection"], two["state"]["selection"]
    assert first["winner"] == second["winner"] and first["examples"] == second["examples"] == 13
    assert first["scores"] == pytest.approx(second["scores"], abs=1e-6)


def test_killed_and_resumed_ends_bitwise_where_the_uninterrupted_run_does(start, tmp_path):
    whole = result(start("whole", 4, "kill", [sys.executable]), tmp_path / "whole")
    process = start("killed", 4, "kill", [sys.executable])
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
    resumed = result(start("killed", 4, "kill", [sys.executable], "resume"), tmp_path / "killed")
    for name, value in whole["parameters"].items():
        assert torch.equal(value, resumed["parameters"][name]), name
    assert whole["state"] == resumed["state"]

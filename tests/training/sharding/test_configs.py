"""The ready-made configurations are accelerate's: each is read, and starts the kind of run that its name says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from conftest import exhaustive

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "scripts" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


@pytest.mark.parametrize("name", KINDS)
def test_config_is_read(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # which refuses keys it does not know
    assert config.distributed_type == KINDS[name] and config.mixed_precision == "bf16"
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        assert "gradient_clipping" not in config.deepspeed_config  # it would contradict --max_grad_norm
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_every_config_is_tested():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", *exhaustive("zero3")])
def test_a_run_starts_with_a_deepspeed_config(name, tmp_path):
    """The other tests give DeepSpeed's settings to the trainer, where accelerate's launcher does not put them."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the deepspeed extra")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    launch += ["--mixed_precision", "no", "--num_processes", "1", str(ROOT / "scripts" / "sft.py")]
    flags = ["--comlora_tournament", "--comlora_rungs", "0.3:2,0.6:1", "--max_steps", "4", "--use_cpu"]
    flags += ["--per_device_train_batch_size", "4", "--comlora_validation_size", "8", "--report_to", "none"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launch, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "winner" / "adapter_config.json").is_file() and "the retired branches are in" in done.stdout

"""The ready-made configurations are accelerate's: each is read, and starts the kind of run that its name says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[3] / "scripts" / "accelerate"
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

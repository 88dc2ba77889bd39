"""Sharded runs equal one process with the doubled batch: losses, weights, disqualification, winner, resume, export."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from competition_run import HURT_BRANCH, HURT_STEP, MODES, MORE_MODES, SAVED, STEPS, prepare, run_and_resume
from conftest import exhaustive, make_model, selected
from kinds import make_classifier
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[2]
# DeepSpeed and FSDP1 are compared in float32; one process and two then round a sum of gradients differently
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 2e-2}
LOSS = {
    "float64": 2e-6,
    "float32": 2e-6,
    "bfloat16": 0.5,
}  # TRL logs losses in float32; the pairwise one is in the sum
NLL = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 1e-3}
FOLDERS = {"outcome.json": "whole", "resumed.json": f"checkpoint-{STEPS}"}


PARAMETERS = [name for name in MODES if name not in MORE_MODES] + exhaustive(*MORE_MODES)


def possible(mode: str) -> bool:
    """Whether the packages of a mode are installed."""
    return not mode.startswith("zero") or importlib.util.find_spec("deepspeed") is not None


def plain(mode: str) -> str:
    """The folder of the run in one process that a mode's run equals."""
    settings = MODES[mode]
    rungs = "-rungs" if settings.get("rungs") else ""
    return f"plain-{settings.get('trainer', 'sft')}-{settings.get('dtype', 'float32')}{rungs}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Path:
    """Every mode one after the other in one pair of processes, and meanwhile the plain runs in this one."""
    folder = tmp_path_factory.mktemp("sharded")
    modes = [mode for mode in selected(request, "mode") if possible(mode)]
    prepare(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_SIZE": "2"}
    shared |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(Path(__file__).with_name("competition_run.py")), str(folder), *modes]
        with open(folder / f"log-{rank}", "w") as log:
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for name in dict.fromkeys(map(plain, modes)):
            _, kind, base, *rungs = name.split("-")
            settings = {"use_cpu": True, "dtype": base, "bf16": base == "bfloat16", "trainer": kind}
            settings |= {"rungs": bool(rungs)}
            run_and_resume(folder / name, settings, batch=8)
        for process in processes:
            process.wait(timeout=400)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {key}": value for file in files for key, value in load_file(file).items()}


def difference(folder: Path, other: Path, retired: Iterable[str] = ()) -> float:
    """The largest difference of all weights but those of retired branches, which wrappers can't remove."""
    one, two = (
        {
            key: value
            for key, value in weights(own).items()
            if not key.startswith(tuple(f"branch_{b}/" for b in retired))
        }
        for own in (folder, other)
    )
    assert one.keys() == two.keys() and one, (folder, other)
    return max((one[key].double() - two[key].double()).abs().max().item() for key in one)


@pytest.mark.parametrize("mode", PARAMETERS)
def test_equals_one_process(runs, mode):
    if not possible(mode):
        pytest.skip("needs the deepspeed extra")
    log = "".join(file.read_text() for file in sorted(runs.glob(f"{mode}-*.error")))
    assert (runs / mode / "resumed.json").is_file(), log or (runs / "log-0").read_text()[-3000:]
    base = MODES[mode].get("dtype", "float32")
    one, tolerance = runs / plain(mode), TOLERANCE[base]
    for result, checkpoint in FOLDERS.items():
        expected, found = (json.loads((folder / result).read_text()) for folder in (one, runs / mode))
        assert found["losses"] == pytest.approx(expected["losses"], abs=LOSS[base])
        state, wanted = found["state"], expected["state"]
        assert state["disqualified"] == wanted["disqualified"] == {str(HURT_BRANCH): HURT_STEP + 1}
        assert state["wins"] == wanted["wins"]
        assert sum(state["wins"]) == (state["rungs"][-1]["step"] if state["rungs"] else STEPS)
        assert state["row_passes"] == wanted["row_passes"]
        assert len(state["rungs"]) == bool(MODES[mode].get("rungs"))
        for rung, own in zip(state["rungs"], wanted["rungs"], strict=True):
            assert rung["average"] == own["average"] == 0.25 and rung["retired"] == own["retired"]
            assert rung["validation_nll"] == pytest.approx(own["validation_nll"], abs=NLL[base])
        for key in ("step", "examples", "winner"):
            assert state["selection"][key] == wanted["selection"][key]
        assert state["selection"]["step"] == SAVED  # the best checkpoint's
        for figure in ("validation_nll", "validation_accuracy"):
            assert state["selection"][figure] == pytest.approx(wanted["selection"][figure], abs=NLL[base])
        if base != "bfloat16":
            assert state["selection"]["scores"] == pytest.approx(wanted["selection"]["scores"], abs=5e-6)
        assert difference(runs / mode / checkpoint, one / checkpoint, state["retired"]) < tolerance
    for folder in (f"checkpoint-{SAVED}", "whole-winner", "winner"):
        assert difference(runs / mode / folder, one / folder) < tolerance
    disqualified = load_file(runs / mode / "whole" / f"branch_{HURT_BRANCH}" / "adapter_model.safetensors")
    assert not any(value.any() for value in disqualified.values())


@pytest.mark.parametrize("mode", PARAMETERS)
def test_winner_is_a_plain_adapter(runs, mode):
    if not possible(mode):
        pytest.skip("needs the deepspeed extra")
    base = make_classifier() if MODES[mode].get("trainer") == "reward" else make_model()
    model = PeftModel.from_pretrained(base, runs / mode / "winner").eval()
    ids = torch.arange(3, 21).view(2, 9)
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert (model(input_ids=ids).logits - base).abs().max() > 1e-3

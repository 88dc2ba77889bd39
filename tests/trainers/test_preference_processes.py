"""Two processes equal one with the doubled batch, in real processes: TRL gathers metrics within its losses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import difference, exhaustive, selected

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
import torch
from conftest import parameters
from kinds import KINDS, perturb

output, batch = Path(sys.argv[1]), int(sys.argv[2])
base = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 6, "per_device_eval_batch_size": 4}
field = {"comlora_k": 3, "comlora_branch_learning_rates": [0.1, 0.3, 0.5]}
modes = {
    "all": field,
    "rungs": {**field, "comlora_rungs": "0.4:2,0.7:1"},
    "shared": {**field, "comlora_rows": "shared"},
    "scarce": {**field, "comlora_rows": "shared", "per_device_train_batch_size": batch // 4},
    "chunked": {**field, "comlora_rows": "shared", "comlora_branch_chunk": 1},
}
for kind in KINDS:
    for name in sys.argv[3].split(","):
        options = modes[name]
        folder = output / f"{kind}-{name}"
        trainer = kind.run(folder, **{**base, "per_device_train_batch_size": batch, **options, **kind.of_any_cut})
        perturb(trainer)
        trainer.train()
        if trainer.accelerator.is_main_process:
            history = [entry for entry in trainer.state.log_history if "loss" in entry]
            result = {"parameters": parameters(trainer), "state": vars(trainer.competition.state), "history": history}
            torch.save(result, folder / "result.pt")
"""
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
MODES = ["rungs", "shared", "chunked", *exhaustive("all", "scarce")]
TRAINERS = ("dpo", "reward", "kto")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, request) -> Path:
    """A folder with the results of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "run.py"
    script.write_text(SCRIPT)
    runs = [
        subprocess.Popen(
            [*launcher, str(script), str(folder / name), batch, ",".join(selected(request, "mode"))],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, batch, launcher in (("one", "8", [sys.executable]), ("two", "4", LAUNCH))
    ]
    for process in runs:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-3000:]
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TRAINERS)
def test_two_processes_equal_one(one_and_two, kind, mode):
    one, two = (
        torch.load(one_and_two / name / f"{kind}-{mode}" / "result.pt", weights_only=False) for name in ("one", "two")
    )
    living = {name: two["parameters"][name] for name in one["parameters"]}
    assert difference(one["parameters"], living) < 1e-5
    for kept in ("wins", "retired", "row_passes"):
        assert one["state"][kept] == two["state"][kept]
    first, second = one["state"]["selection"], two["state"]["selection"]
    assert first["winner"] == second["winner"] and first["examples"] == second["examples"] == 13
    for figure in ("validation_nll", "validation_accuracy"):
        assert first[figure] == pytest.approx(second[figure], abs=1e-5)
    for entry, other in zip(one["history"], two["history"], strict=True):
        # TRL's KTO metrics are means over the examples of one label, here over processes with few of them
        metrics = "loss_|num_tokens" if kind == "kto" and mode == "scarce" else "loss_|num_tokens|reward"
        names = [name for name in entry if re.search(metrics, name)]
        assert names
        for name in names:
            assert entry[name] == pytest.approx(other[name], abs=1e-5), name

"""Two processes whose decoder layers are replayed train as two whose layers run: DDP waits for the same gradients."""

from pathlib import Path
from subprocess import run

import pytest
import torch
from conftest import difference
from training.test_processes import ENVIRONMENT, LAUNCH

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
import comlora_trl.training.trainer as trainers
from conftest import make_arguments, make_dataset, make_lora, make_model, make_tokenizer, parameters
from rerunning import RerunGraphs
from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.branches.graphs import LayerGraphs

def settle(model, args, accelerator):
    layers = model.expansion.layers
    replays = sys.argv[2] == "replayed"
    model.competing.graphs = LayerGraphs(model.competing, layers, RerunGraphs(), print) if replays else None

trainers.settle_graphs = settle
settings = {"comlora_k": 4, "comlora_selector": False, "comlora_branch_learning_rates": [5e-3, 1e-2, 2e-2, 4e-2]}
settings |= {"comlora_rungs": "0.5:2", "gradient_accumulation_steps": 2, "pad_to_multiple_of": 16, "max_steps": 8}
settings |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
trainer = ComLoRASFTTrainer(
    make_model().double(), ComLoRAConfig(**{**make_arguments(sys.argv[1]), **settings}), train_dataset=make_dataset(),
    eval_dataset=make_dataset(13), processing_class=make_tokenizer(), peft_config=make_lora(),
)
trainer.train()
if trainer.accelerator.is_main_process:
    graphs = trainer.comlora_model.competing.graphs
    torch.save((parameters(trainer), graphs and graphs.replays), sys.argv[1] + "/result.pt")
"""


def test_two_processes_train_alike(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    found = []
    for way in ("replayed", "as they are"):
        folder = tmp_path / way
        folder.mkdir()
        done = run([*LAUNCH, str(script), str(folder), way], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(folder / "result.pt", weights_only=False))
    (replayed, replays), (plain, none) = found
    assert replays > 10 and none is None
    assert difference(replayed, plain) < 1e-12

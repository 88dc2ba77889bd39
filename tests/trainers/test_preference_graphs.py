"""Preference trainers and CUDA graphs: a run whose decoder layers are replayed ends as one whose layers run."""

import pytest
import torch
from conftest import difference, parameters
from kinds import KINDS, perturb
from rerunning import RerunGraphs

from comlora_trl.branches.graphs import LayerGraphs
from comlora_trl.training import graphing


class OnGpu:
    """As much of an accelerator as says where a run is."""

    device, num_processes, distributed_type = torch.device("cuda"), 1, None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_can_not_be_captured_is_named(kind, tmp_path):
    trainer = kind.run(tmp_path, comlora_k=2)
    reason = graphing.why_not(trainer.comlora_model, trainer.args, OnGpu())
    assert reason is None or "CUDA" not in reason


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_batches_can_be_padded_to_multiples(kind, tmp_path):
    trainer = kind.run(tmp_path, comlora_k=2, max_steps=1, pad_to_multiple_of=8)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("rows", ["all", "shared"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_run_ends_with_the_same_weights(kind, rows, tmp_path, monkeypatch):
    said: list[str] = []

    def settle(model, args, accelerator):
        if args.comlora_graphs:
            layers = model.expansion.layers
            model.competing.graphs = LayerGraphs(model.competing, layers, RerunGraphs(), said.append)
        return None

    monkeypatch.setattr("comlora_trl.training.trainer.settle_graphs", settle)
    options = {"comlora_k": 3, "comlora_branch_learning_rates": [1e-3, 2e-3, 4e-3], "comlora_rows": rows}
    options |= {"max_steps": 8, "pad_to_multiple_of": 32, "train_sampling_strategy": "sequential", **kind.of_any_cut}
    found = []
    for graphs in (False, True):
        trainer = kind.run(tmp_path / str(graphs), comlora_graphs=graphs, **options)
        perturb(trainer)
        trainer.train()
        found.append(parameters(trainer))
    graphs = trainer.comlora_model.competing.graphs
    assert graphs.captures > 0 and graphs.replays > graphs.captures and not said
    assert difference(*found) < 1e-5  # float32

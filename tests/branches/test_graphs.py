"""Decoder layers that are replayed give what layers that run give; here with a stand-in for CUDA graphs."""

import pytest
import torch
from conftest import collate, make_rows
from plain_loop import assert_equal, make_comlora, make_noise, step
from rerunning import RerunGraphs
from torch import Tensor

from comlora_trl.branches.graphs import LayerGraphs
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.model import ComLoRAModel


def compiler(function):
    """What regional compilation traces, without a code generator."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def graphed(model: ComLoRAModel, compiled: bool = False) -> list[str]:
    lines: list[str] = []
    model.competing.graphs = LayerGraphs(
        model.competing, model.expansion.layers, RerunGraphs(), lines.append, compiler if compiled else None
    )
    return lines


def gradients(model: ComLoRAModel, rows: int = 4, k: int = 3, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    own = make_rows()[:rows]
    return step(model, collate(own), make_noise(own, k), **kwargs)[:2]


def make(k: int = 3, checkpointing: bool = False, **kwargs) -> ComLoRAModel:
    model = make_comlora(CompetitionSettings(k=k), **kwargs)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["as_is", "compiled"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("k", [1, 3])
def test_replayed_layers_give_the_same_loss_and_gradients(k, checkpointing, compiled):
    model = make(k, checkpointing)
    expected = gradients(model, k=k)
    lines = graphed(model, compiled)
    graphs = model.competing.graphs
    for turn in range(4):  # recorded, captured, replayed twice
        loss, found = gradients(model, k=k)
        torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-9)
        assert_equal(found, expected[1])
        assert graphs.captures == (turn > 0) and graphs.replays == 2 * turn
    assert not lines

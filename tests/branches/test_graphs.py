"""Decoder layers that are replayed give what layers that run give; here with a stand-in for CUDA graphs."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import collate, make_rows
from plain_loop import assert_equal, make_comlora, make_noise, step, trainable
from rerunning import RerunGraph, RerunGraphs
from torch import Tensor

from comlora_trl.branches.batches import Rows
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


def forward(model: ComLoRAModel) -> Tensor:
    """A loss of the living branches."""
    inputs = collate(make_rows()[:4])
    rows = Rows.of(inputs)
    weights = torch.ones(model.k, rows.count, dtype=torch.float64)
    living = [branch for branch in range(model.k) if f"branch_{branch}" in model.peft_config]
    return -model.run_branches(
        {**inputs, "fused_lm_head": True, "use_cache": False}, rows, weights, living
    ).log_probs.sum()


def forward_gradients(model: ComLoRAModel) -> dict[str, Tensor]:
    """The gradients of [`forward`], without graphs."""
    kept, model.competing.graphs = model.competing.graphs, None
    model.zero_grad()
    forward(model).backward()
    model.competing.graphs = kept
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


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


def test_two_forwards_before_a_backward():
    model = make(2)
    expected = gradients(model, k=2)
    lines = graphed(model)
    for _ in range(2):
        gradients(model, k=2)
    before = model.competing.graphs.replays
    loss = forward(model)
    other = forward(model)  # the first one's memory is not free: this one runs as usual
    assert model.competing.graphs.replays == before + 2
    own = []
    for value in (loss, other):
        model.zero_grad()
        value.backward()
        own.append({n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None})
    for found in own:
        assert_equal(found, forward_gradients(model))
    assert_equal(gradients(model, k=2)[1], expected[1])
    assert not lines


def test_a_second_backward_is_refused():
    model = make(2)
    graphed(model)
    for _ in range(2):
        gradients(model, k=2)
    loss = forward(model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="comlora_graphs=False"):
        loss.backward()


def test_a_hook_that_watches_turns_graphs_off_with_a_line():
    model = make(2)
    expected = gradients(model, k=2)
    lines = graphed(model)
    for _ in range(2):
        gradients(model, k=2)
    seen = []
    hook = model.expansion.layers[1].mlp.register_forward_hook(lambda *call: seen.append(call))
    loss, found = gradients(model, k=2)
    hook.remove()
    assert len(seen) == 1 and len(lines) == 1 and "hook" in lines[0]
    assert_equal(found, expected[1])


class WrongGraph(RerunGraph):
    """Replays a layer whose first adapter is another one."""

    def replay(self) -> None:
        super().replay()
        layer = self.work.__self__
        if self.work.__name__ == "_forward" and layer.index == 1:
            layer.output[0] *= 1.5


def test_a_graph_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(RerunGraphs, "new", lambda self: WrongGraph())
    model = make(2)
    expected = gradients(model, k=2)
    lines = graphed(model)
    for _ in range(4):
        loss, found = gradients(model, k=2)
        torch.testing.assert_close(loss, expected[0], rtol=0, atol=1e-9)
        assert_equal(found, expected[1])
    assert len(lines) == 1 and "output of a layer" in lines[0] and "rounding" in lines[0]
    assert model.competing.graphs.replays == 0


def test_layers_that_can_not_be_compiled_are_captured_as_they_are():
    def failing(function):
        def run(*args):
            raise NotImplementedError("no compiler here")

        return run

    model = make(2)
    expected = gradients(model, k=2)
    lines: list[str] = []
    model.competing.graphs = LayerGraphs(model.competing, model.expansion.layers, RerunGraphs(), lines.append, failing)
    for _ in range(3):
        assert_equal(gradients(model, k=2)[1], expected[1])
    assert len(lines) == 1 and "without compilation" in lines[0] and "no compiler here" in lines[0]
    assert model.competing.graphs.replays > 0


def test_a_dropped_branch_and_other_shapes_are_captured_anew():
    model = make(3)
    lines = graphed(model)
    for rows in (4, 3, 4, 3):
        gradients(model, rows)
    assert model.competing.graphs.captures == 2
    model.drop_branch(1)
    assert not model.competing.graphs._shapes and not model.competing.graphs._buffers
    expected, kept = forward_gradients(model), model.competing.graphs
    for _ in range(2):
        model.zero_grad()
        forward(model).backward()
        assert_equal({n: p.grad for n, p in trainable(model).items() if p.grad is not None}, expected)
    assert kept.captures >= 3 and not lines


def test_nothing_of_graphs_is_left_on_a_model_or_its_copies():
    model = make(2)
    graphed(model)
    for _ in range(3):
        gradients(model, k=2)
    assert not any("forward" in layer.__dict__ for layer in model.expansion.layers)
    copied = copy.deepcopy(model)
    assert copied.competing.graphs is None
    assert_equal(gradients(copied, k=2)[1], gradients(model, k=2)[1])
    plain = model.merge_and_unload()
    assert model.competing.graphs is None and not any("forward" in layer.__dict__ for layer in plain.model.layers)


def test_the_parameters_of_a_dropped_branch_are_freed():
    """Passes of one branch keep their memory; it must not hold the parameters of a branch that is gone."""
    model = make(3)
    graphed(model)
    for _ in range(3):
        gradients(model, chunk=1)
    gone = weakref.ref(next(iter(model.branch_parameters(2))))
    model.drop_branch(2)
    gc.collect()
    assert gone() is None

"""A run whose decoder layers are replayed ends where one ends whose layers run; with a stand-in for CUDA graphs."""

import os

import pytest
import torch
from conftest import TOURNAMENT, collate, difference, make_arguments, make_rows, parameters
from plain_loop import assert_equal, make_comlora, make_noise, step
from rerunning import RerunGraphs
from transformers import TrainerCallback

from comlora_trl import ComLoRAConfig
from comlora_trl.branches.graphs import LayerGraphs
from comlora_trl.branches.passes import is_padded_right
from comlora_trl.branches.trial import ignores_padding
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training import graphing

BUCKETS = {"pad_to_multiple_of": 16, "per_device_train_batch_size": 4}


@pytest.fixture
def graphed(monkeypatch):
    """Graphs in every trainer that is made from now on; their lines are returned."""
    lines: list[str] = []

    def settle(model, args, accelerator):
        if args.comlora_graphs is False:
            model.competing.graphs = None
            return None
        layers = model.expansion.layers
        model.competing.graphs = LayerGraphs(model.competing, layers, RerunGraphs(), lines.append)
        return None

    monkeypatch.setattr("comlora_trl.training.trainer.settle_graphs", settle)
    return lines


class Interfering(TrainerCallback):
    """Runs the model between steps, in evaluation mode and in training mode, with and without a backward."""

    def __init__(self) -> None:
        self.trainer = None

    def on_step_end(self, args, state, control, model, **kwargs):
        batch = self.trainer.data_collator([self.trainer.train_dataset[0], self.trainer.train_dataset[1]])
        with torch.no_grad():
            model(**batch)
        self.trainer.compute_loss(model, dict(batch))  # a forward without a backward


OPTIONS = {
    "one branch": {"comlora_k": 1, "comlora_selector": False},
    "selector": {"comlora_k": 2},
    "tournament": {**TOURNAMENT, "comlora_rungs": "0.34:2,0.67:1", "comlora_rows": "shared"},
    "rungs, all rows": {**TOURNAMENT, "comlora_rungs": "0.34:2,0.67:1"},
    "accumulation": {"comlora_k": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"comlora_k": 2, "gradient_checkpointing": True},
    "a smaller last batch": {"comlora_k": 2, "per_device_train_batch_size": 6, "max_steps": 24},
    "chunks": {"comlora_k": 3, "comlora_branch_chunk": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_ends_with_the_same_weights(train, float64, graphed, name):
    options = {"max_steps": 10, "eval_strategy": "steps", "eval_steps": 5, **BUCKETS, **OPTIONS[name]}
    plain = train(comlora_graphs=False, **options)
    other = train(start=False, **options)
    interfering = Interfering()
    interfering.trainer = other
    other.add_callback(interfering)
    other.train()
    graphs = other.comlora_model.competing.graphs
    assert graphs.captures > 0 and graphs.replays > 2 * graphs.captures and not graphed
    assert difference(parameters(other), parameters(plain)) < 1e-9
    ours, theirs = ([entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (other, plain))
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_a_run_resumes_to_the_bit(train, float64, graphed):
    options = {"comlora_k": 2, "max_steps": 8, "save_steps": 4, "save_strategy": "steps", **BUCKETS}
    whole = train(**options)
    again = train(start=False, **options)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    assert again.comlora_model.competing.graphs.captures > 0
    assert difference(parameters(again), parameters(whole)) < 1e-12


def test_a_line_says_why_there_are_no_graphs(train, capsys):
    train(comlora_graphs=True, max_steps=1, comlora_k=2)
    said = [line for line in capsys.readouterr().out.splitlines() if "comlora_graphs" in line]
    assert len(said) == 1 and "NVIDIA GPU" in said[0]


def test_nothing_is_said_where_no_graphs_are_expected(train, capsys):
    train(max_steps=1, comlora_k=2)
    assert "comlora_graphs" not in capsys.readouterr().out


class OnGpu:
    """As much of an accelerator as says where a run is."""

    device, num_processes, distributed_type = torch.device("cuda"), 1, None


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({}, None),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"use_dora": True}, "not a plain linear LoRA"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "one stack"),
    ],
)
def test_what_can_not_be_captured_is_named(train, lora, reason):
    trainer = train(start=False, lora=lora, comlora_k=2)
    found = graphing.why_not(trainer.comlora_model, trainer.args, OnGpu())
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("options, length, compiles", [({}, 64, False), ({"comlora_graphs": False}, None, True)])
def test_a_gpu_pads_and_compiles_by_layer(tmp_path, monkeypatch, options, length, compiles):
    monkeypatch.setattr("comlora_trl.training.config.takes_graphs", lambda args: args.comlora_graphs is not False)
    arguments = make_arguments(tmp_path)
    assert ComLoRAConfig(**arguments, **options).pad_to_multiple_of == length
    assert ComLoRAConfig(**arguments, pad_to_multiple_of=8, **options).pad_to_multiple_of == 8
    assert ComLoRAConfig(**arguments, pad_to_multiple_of=None, **options).pad_to_multiple_of is None
    monkeypatch.setattr("os.environ", dict(os.environ))  # the Trainer's own compilation goes by it
    assert ComLoRAConfig(**arguments, torch_compile=True, **options).torch_compile is compiles
    assert ComLoRAConfig(**arguments, torch_compile_backend="aot_eager", **options).torch_compile


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_over_padding_is_left_out_of_causal_models_alone(causal):
    model = make_comlora(CompetitionSettings(k=2))
    for layer in model.expansion.layers:
        layer.self_attn.is_causal = causal
    batch = collate(make_rows())
    assert not batch["attention_mask"].bool().all()
    assert ignores_padding(model, [batch]) is causal
    assert model.expansion.ignores_padding is False


def test_without_the_mask_loss_and_gradients_are_the_same():
    model = make_comlora(CompetitionSettings(k=3))
    rows = make_rows()
    expected = step(model, collate(rows), make_noise(rows, 3))
    model.expansion.ignores_padding = True
    seen = []
    hook = model.expansion.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    found = step(model, collate(rows), make_noise(rows, 3))
    hook.remove()
    assert seen == [None]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    assert_equal(found[1], expected[1])
    left = {name: value.flip(1) for name, value in collate(rows).items()}
    assert not is_padded_right(left["attention_mask"]) and is_padded_right(collate(rows)["attention_mask"])


def test_a_line_tells_what_padding_costs(train, capsys):
    train(max_steps=1, comlora_k=2, **BUCKETS)
    assert "padded to multiples of 16" in capsys.readouterr().out

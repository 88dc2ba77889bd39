"""Tournament: each branch is the LoRA run it would be alone, rungs retire branches, a shared row goes to one."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    RATES,
    TOURNAMENT,
    difference,
    make_arguments,
    make_dataset,
    make_lora,
    make_model,
    make_tokenizer,
    parameters,
)
from peft import PeftModel, get_peft_model
from reference import ReferenceRun, Row
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from comlora_trl.training.evaluation import evaluation_mode
from comlora_trl.training.export import export_checkpoint, write_snapshots
from comlora_trl.training.model import ComLoRAModel


class Recorder(TrainerCallback):
    """Keeps each step's weights and gradients, and the examples in the order in which they were collated."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad.clone() for name, p in own.items() if p.grad is not None}
        self.steps.append(({name: p.detach().clone() for name, p in own.items()}, gradients))


def of_branch(values: dict[str, Tensor], branch: int) -> dict[str, Tensor]:
    own = f".branch_{branch}."
    return {name.replace(own, ".default."): value for name, value in values.items() if own in name}


def lora_alone(start: dict[str, Tensor], rate: float, folder: Path, stop: int | None = None, **options) -> dict:
    """TRL's own trainer from the same start, at one rate; its adapter after `stop` steps, and its losses."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    model = get_peft_model(make_model().double(), make_lora())
    model.load_state_dict(start, strict=False)
    config = SFTConfig(**make_arguments(folder, learning_rate=rate, **options))
    given = {"train_dataset": make_dataset(), "processing_class": make_tokenizer()}
    trainer = SFTTrainer(model, config, callbacks=[Stop()], **given)
    trainer.train()
    adapter = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"adapter": adapter, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


def test_rates_alone_are_separate_runs_of_trls_lora(train, tmp_path):
    start = {}

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            start.update(parameters_of(model))

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.15}
    trainer = train(
        comlora_k=3,
        comlora_selector=False,
        comlora_branch_learning_rates=RATES[:3],
        trainer={"callbacks": [Start()]},
        **options,
    )
    for branch, rate in enumerate(RATES[:3]):
        alone = lora_alone(of_branch(start, branch), rate, tmp_path / f"alone-{branch}", **options)
        assert difference(of_branch(parameters(trainer), branch), alone["adapter"]) < 1e-9
        own = [entry[f"comlora/loss_{branch}"] for entry in trainer.state.log_history if "loss" in entry]
        assert own == pytest.approx(alone["losses"], abs=1e-3)  # TRL rounds what it logs
        logged = [entry[f"comlora/learning_rate_{branch}"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx([rate * (1 - step / 8) for step in range(8)])
    assert trainer.competition.state.row_passes == 8 * 8 * 3


def parameters_of(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_rungs_stop_the_losers_runs_and_free_what_they_took(train, tmp_path, capsys):
    start, sizes = {}, []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            start.update(parameters_of(model))

        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            sizes.append((len(optimizer.state), len(parameters_of(model))))

    trainer = train(comlora_rungs="0.25:2, 0.5:1", **TOURNAMENT, trainer={"callbacks": [Watch()]})
    state = trainer.competition.state
    per_branch = len(start) // 4
    assert [size[0] for size in sizes] == [per_branch * n for n in [4, 4, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]]
    assert [size[1] for size in sizes] == [size[0] for size in sizes]
    assert sorted(state.retired.values()) == [3, 3, 6] and state.row_passes == 8 * (3 * 4 + 3 * 2 + 6)
    assert [record["step"] for record in state.rungs] == [3, 6]
    assert trainer.determine_winner() not in state.retired
    for branch, rate in enumerate(RATES):
        alone = lora_alone(
            of_branch(start, branch), rate, tmp_path / f"a{branch}", state.retired.get(branch), max_steps=12
        )
        folder = Path(trainer.args.output_dir) / "retired" / f"branch_{branch}"
        folder = folder if branch in state.retired else Path(trainer.args.winner_dir)
        kept = load_file(folder / "adapter_model.safetensors")
        found = {name.replace(".weight", ".default.weight"): value for name, value in kept.items()}
        assert difference(found, alone["adapter"]) < 1e-9
    PeftModel.from_pretrained(
        make_model(), Path(trainer.args.output_dir) / "retired" / f"branch_{next(iter(state.retired))}"
    )
    entries = trainer.state.log_history
    assert [entry["step"] for entry in entries if "eval_comlora/winner" in entry] == [3, 6, 12]
    used = [entry for entry in entries if "comlora/living" in entry]
    assert used[-1]["learning_rate"] == used[-1][f"comlora/learning_rate_{trainer.determine_winner()}"]
    printed = capsys.readouterr().out
    assert "rates 0.005, 0.01, 0.02, 0.04; branches that go on: 2 after step 3, 1 after step 6, by" in printed
    assert "Rung at step 3 of 12" in printed and "goes on" in printed and "retired at step 6" in printed
    summary = json.loads((Path(trainer.args.winner_dir) / "competition.json").read_text())
    assert summary["row_passes"] == state.row_passes and len(summary["rungs"]) == 2
    assert [line["learning_rate"] for line in summary["branches"]] == RATES
    assert all(line["validation_nll"] is not None for line in summary["branches"])


CUTS = [(8, 1, False), (4, 2, False), (1, 8, False), (3, 2, False), (4, 2, True)]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut)))
def test_shared_rows_are_a_literal_deal(train, cut, float64):
    """Each branch's gradient is that of the mean NLL over the rows that (place + step) mod n deals it."""
    rows, accumulation, packed = cut
    recorder, seen = Recorder(), []
    options = {"padding_free": True, "max_length": None} if packed else {}
    options |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    settings = {**TOURNAMENT, "max_steps": 5, "comlora_rungs": "0.4:3", "comlora_rows": "shared"}
    trainer = train(start=False, trainer={"callbacks": [recorder]}, **settings, **options)
    original = trainer.data_collator

    def record(examples):
        if trainer.model.training:
            seen.extend(examples)
        return original(examples)

    trainer.data_collator = record
    trainer.train()
    total = rows * accumulation
    for step, (weights, gradients) in enumerate(recorder.steps):
        living = [branch for branch in range(4) if any(f".branch_{branch}." in name for name in weights)]
        assert len(living) == (4 if step < 2 else 3)
        run = ReferenceRun(make_model().double(), make_lora(), 4, _all_branches(weights))
        examples = [literal_row(example) for example in seen[total * step : total * (step + 1)]]
        for branch in living:
            own = [row for place, row in enumerate(examples) if living[(place + step) % len(living)] == branch]
            tokens = sum(row.supervised for row in own)
            loss = sum(run.row_nll(branch, row) for row in own) / max(tokens, 1)
            expected = of_branch(run.gradients(loss), branch) if own else {}
            found = of_branch(gradients, branch)
            for name, value in expected.items():
                torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=0, atol=1e-9)
    state = trainer.competition.state
    assert state.row_passes == 5 * total


def _all_branches(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With stand-ins for branches that are gone, for the reference has all four."""
    branches = {name.split(".branch_")[1][0] for name in weights}
    first = min(branches)
    own = {name: value for name, value in weights.items() if f".branch_{first}." in name}
    for k in {"0", "1", "2", "3"} - branches:
        weights = weights | {name.replace(f".branch_{first}.", f".branch_{k}."): value for name, value in own.items()}
    return weights


def literal_row(example: dict) -> Row:
    labels = example.get("labels")
    if labels is None:
        mask = example.get("completion_mask", [1] * len(example["input_ids"]))
        labels = [token if kept else -100 for token, kept in zip(example["input_ids"], mask, strict=True)]
    return Row(list(example["input_ids"]), list(labels))


def test_any_cut_of_a_step_is_the_same_tournament(train, float64):
    """1×8 = 2×4 = 8×1, and chunks, over a whole tournament with shared rows."""
    settings = {**TOURNAMENT, "comlora_rungs": "0.25:3,0.5:1", "comlora_rows": "shared"}
    runs = []
    for rows, accumulation, chunk in ((8, 1, None), (4, 2, None), (1, 8, None), (4, 2, 1)):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        runs.append(train(comlora_branch_chunk=chunk, **settings, **options))
    for run in runs[1:]:
        assert run.competition.state.retired == runs[0].competition.state.retired
        assert difference(parameters(run), parameters(runs[0])) < 1e-8


def test_packed_lines_go_to_one_branch_whole(train):
    options = {"packing": True, "max_length": 64, "per_device_train_batch_size": 4, "max_steps": 8}
    settings = {**TOURNAMENT, **options, "comlora_rungs": "0.5:1", "comlora_rows": "shared"}
    together, chunked = train(**settings), train(**settings, comlora_branch_chunk=1)
    assert difference(parameters(together), parameters(chunked)) < 1e-5
    alone = train(comlora_k=1, comlora_selector=False, **options)
    assert together.competition.state.row_passes == alone.competition.state.row_passes > 8 * 4, "one LoRA's cost"


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}, {"task_type": None, "use_rslora": True}],
    ids=["lora", "dora", "embeddings", "no task"],
)
def test_a_branch_is_written_as_peft_would_save_it(lora, tmp_path):
    """At a rung, in a checkpoint and as the winner."""
    model = ComLoRAModel(make_model(), make_lora(**lora), 3)
    for branch, parameter in enumerate(model.trainable_parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(branch))
    PeftModel.save_pretrained(model, str(tmp_path), selected_adapters=["branch_1"])
    snapshot = model.snapshot(1)
    model.drop_branch(1)
    assert model.branch_parameters(1) == [] and list(model.peft_config) == ["branch_0", "branch_2"]
    assert not any("branch_1" in name for name, _ in model.named_parameters())
    (tmp_path / "kept").mkdir()
    snapshot.save(tmp_path / "kept")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        theirs, own = (tmp_path / folder / file for folder in ("branch_1", "kept"))
        if file.endswith("json"):
            theirs, own = ({**json.loads(one.read_text()), "target_modules": None} for one in (theirs, own))
            assert own == theirs
        else:
            theirs, own = load_file(theirs), load_file(own)
            assert own.keys() == theirs.keys()
            assert all(torch.equal(own[name], value) for name, value in theirs.items())


def test_retired_branches_are_written_before_what_relies_on_them(train, monkeypatch):
    """Also when the disk is slow: before the checkpoint of the rung's step, and before training ends."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(sorted(Path(args.output_dir).glob("retired/branch_*/adapter_model.safetensors")))

        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(Path(args.output_dir).glob("retired/branch_*/adapter_model.safetensors")))

    def slowly(*args):
        time.sleep(0.5)
        write_snapshots(*args)

    monkeypatch.setattr("comlora_trl.training.trainer.write_snapshots", slowly)
    settings = {**TOURNAMENT, "max_steps": 4, "comlora_rungs": "0.25:2,0.75:1", "trainer": {"callbacks": [Look()]}}
    trainer = train(save_strategy="steps", save_steps=1, **settings)
    assert list(map(len, seen)) == [0, 2, 2, 2, 2, 3, 3, 3]
    retired = trainer.competition.state.retired
    assert {int(file.parent.name[-1]) for file in seen[-1]} == retired.keys()


def test_a_retired_branch_that_cant_be_written_ends_training(train, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("comlora_trl.training.trainer.write_snapshots", fail)
    with pytest.raises(OSError, match="no space left"):
        train(**{**TOURNAMENT, "max_steps": 4, "comlora_rungs": "0.25:1"})


def test_validation_leaves_each_modules_mode():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 2)).train()
    model[1].eval()
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize("rows", ["all", "shared"])
def test_resumed_in_any_rung_is_uninterrupted(train, rows, tmp_path):
    settings = {**TOURNAMENT, "comlora_rungs": "0.3:2,0.6:1", "comlora_rows": rows, "lora": {"lora_dropout": 0.1}}
    whole = train(save_strategy="steps", save_steps=2, **settings)
    for step in (2, 4, 8):
        checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
        resumed = train(start=False, **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert parameters(resumed).keys() == parameters(whole).keys()
        assert all(torch.equal(value, parameters(whole)[name]) for name, value in parameters(resumed).items())
        assert vars(resumed.competition.state) == vars(whole.competition.state)
    loser = next(iter(whole.competition.state.retired))
    checkpoint = Path(whole.args.output_dir) / "checkpoint-12"
    assert export_checkpoint(checkpoint, loser, tmp_path / "loser") == loser
    kept = load_file(Path(whole.args.output_dir) / "retired" / f"branch_{loser}" / "adapter_model.safetensors")
    found = load_file(tmp_path / "loser" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_the_best_checkpoints_leader_may_have_been_retired_since(train):
    class Spoil(TrainerCallback):
        """Ruins the leader of the first evaluation, so that a rung retires it."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                self.leader = model.branch_names.index(model.active_adapter)
                for parameter in model.branch_parameters(self.leader):
                    parameter.data.mul_(30)
            if state.global_step == 6:
                for branch in range(model.k):
                    for parameter in model.branch_parameters(branch):
                        parameter.data.mul_(30)

    spoil = Spoil()
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    given = {"trainer": {"callbacks": [spoil]}, **TOURNAMENT, **evaluated}
    trainer = train(comlora_rungs="0.5:1", load_best_model_at_end=True, **given)
    assert spoil.leader in trainer.competition.state.retired
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name in ("checkpoint-2", "checkpoint-4") and trainer.determine_winner() == spoil.leader
    kept = load_file(best / f"branch_{spoil.leader}" / "adapter_model.safetensors")
    found = load_file(Path(trainer.args.winner_dir) / "adapter_model.safetensors")
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_a_diverged_branch_is_out_before_its_rung(train):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.branch_parameters(0)[-1].data.fill_(math.inf)

    trainer = train(comlora_rungs="0.5:3", trainer={"callbacks": [Poison()]}, **TOURNAMENT)
    state = trainer.competition.state
    assert state.disqualified == {0: 2} and not state.retired and len(state.living) == 3


@pytest.mark.parametrize("by", ["selector", "validation_accuracy"])
def test_rungs_with_a_selector_and_by_accuracy(train, by):
    trainer = train(comlora_k=3, comlora_rungs="0.5:2", comlora_winner_by=by, max_steps=6)
    state = trainer.competition.state
    record, column = state.rungs[0], {"selector": "scores", "validation_accuracy": "validation_accuracy"}[by]
    assert list(state.retired) == [min(range(3), key=lambda branch: (record[column][branch], -branch))]
    assert {"comlora/probability_0", "comlora/living"} <= trainer.state.log_history[0].keys()


def test_a_second_tournament_begins_with_all_branches(train):
    trainer = train(comlora_rungs="0.25:1", **TOURNAMENT)
    assert len(parameters(trainer)) == 20
    trainer.train()
    state = trainer.competition.state
    assert len(state.retired) == 3 and len(state.rungs) == 1
    assert sum(state.wins) == 3  # afterwards one branch is alone

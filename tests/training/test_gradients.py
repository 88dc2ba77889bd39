"""The trainer owns its loss: its normaliser, its clipping, and what a non-finite gradient may touch."""

import math

import pytest
import torch
from conftest import difference, make_lora, make_model, parameters
from torch import Tensor
from transformers import DataCollatorWithFlattening, TrainerCallback

from comlora_trl.branches.batches import Rows
from comlora_trl.branches.model import BranchModel
from comlora_trl.training.competition import clip_gradients, gradient_norms


class Gradients(TrainerCallback):
    """Keeps every step's gradients, by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        self.steps.append({name: gradient.clone() for name, gradient in own.items()})


@pytest.mark.parametrize("accepts", [True, False], ids=["accepts_loss_kwargs", "does_not"])
def test_any_cut_of_a_step_has_the_same_loss_and_gradients(train, monkeypatch, accepts, float64):
    """Bases whose forward takes no num_items_in_batch (Gemma 3n, custom code) among them."""
    monkeypatch.setattr("transformers.LlamaForCausalLM.accepts_loss_kwargs", accepts, raising=False)
    runs = []
    for rows, accumulation in ((8, 1), (4, 2), (1, 8)):
        kept = Gradients()
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
        trainer = train(comlora_k=2, max_steps=2, max_grad_norm=0.0, trainer={"callbacks": [kept]}, **options)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, kept.steps, parameters(trainer)))
    for losses, steps, values in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-3)  # TRL rounds what it logs
        for one, other in zip(steps, runs[0][1], strict=True):
            assert difference(one, other) < 1e-12
        assert difference(values, runs[0][2]) < 1e-9


def test_each_branch_and_the_selector_are_clipped_by_their_own_norm(train):
    free, clipped = Gradients(), Gradients()
    options = {"comlora_k": 3, "max_steps": 1, "comlora_selector_learning_rate": 1e-3}
    train(trainer={"callbacks": [free]}, max_grad_norm=0.0, **options)
    trainer = train(trainer={"callbacks": [clipped]}, max_grad_norm=0.02, **options)
    scales = []
    for part in ("branch_0", "branch_1", "branch_2", "selector"):
        own = {name: value for name, value in free.steps[0].items() if part in name}
        norm = math.sqrt(sum((value**2).sum().item() for value in own.values()))
        scales.append(min(1.0, 0.02 / (norm + 1e-6)))
        for name, value in own.items():
            torch.testing.assert_close(clipped.steps[0][name], value * scales[-1], rtol=1e-9, atol=0)
    assert len(set(scales)) == 4 and min(scales) < 1
    logged = trainer.state.log_history[0]["grad_norm"]
    adapters = [value for name, value in free.steps[0].items() if "selector" not in name]
    assert logged == pytest.approx(math.sqrt(sum((value**2).sum().item() for value in adapters)), rel=1e-3)


class Replace(TrainerCallback):
    """Makes one gradient of step 2 huge or infinite."""

    def __init__(self, part: str, value: float) -> None:
        self.part, self.value = part, value

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.handles = []
        if state.global_step == 1:
            parameter = next(p for name, p in model.named_parameters() if self.part in name and p.requires_grad)
            self.handles = [parameter.register_hook(lambda gradient: torch.full_like(gradient, self.value))]

    def on_step_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()


def test_a_huge_gradient_of_one_branch_leaves_the_others(train):
    options = {"comlora_k": 3, "comlora_selector": False, "max_grad_norm": 0.1}
    calm = parameters(train(**options))
    hurt = train(**options, trainer={"callbacks": [Replace("branch_1", 1e6)]})
    assert not hurt.competition.state.disqualified
    moved = {name for name, value in parameters(hurt).items() if not torch.equal(value, calm[name])}
    assert moved and all("branch_1" in name for name in moved)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_selectors_non_finite_gradient_is_left_out_for_a_step(train, value, caplog):
    trainer = train(comlora_k=2, trainer={"callbacks": [Replace("selector.encoder", value)]})
    state = trainer.competition.state
    assert not state.disqualified and sum(state.wins) == 8
    assert all(parameter.isfinite().all() for parameter in parameters(trainer).values())
    assert "the selector's gradient is not finite at step 2" in caplog.text


def test_norms_without_gradients_are_zero():
    model = BranchModel(make_model(), make_lora(), 2)
    groups = [model.branch_parameters(0), model.branch_parameters(1), []]
    norms = gradient_norms(groups, torch.device("cpu"))
    assert norms.tolist() == [0.0, 0.0, 0.0]
    clip_gradients(groups, norms, 1.0)
    assert all(parameter.grad is None for group in groups for parameter in group)


def test_neftunes_noise_does_not_reach_the_selector(train):
    trainer = train(start=False, comlora_k=2, neftune_noise_alpha=50.0, max_steps=2)
    scores = []

    class Listener(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.train()
            batch = trainer.data_collator([trainer.train_dataset[0]])
            rows = Rows.of(batch)
            scores.append([model.score(batch["input_ids"], rows, batch["labels"]) for _ in range(2)])
            embedding = model.get_base_model().get_input_embeddings()
            assert not torch.equal(embedding(batch["input_ids"]), embedding(batch["input_ids"]))  # the noise is on

    trainer.add_callback(Listener())
    trainer.train()
    assert all(torch.equal(*pair) for pair in scores)


def test_a_retry_with_a_smaller_batch_counts_wins_once(train, monkeypatch):
    """Out of memory at step 3: `auto_find_batch_size` begins again."""
    trainer = train(start=False, comlora_k=2, max_steps=4, auto_find_batch_size=True)
    original, failed = trainer.compute_loss, []

    def fail_once(*args, **kwargs):
        if trainer.state.global_step == 2 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", fail_once)
    trainer.train()
    assert failed and sum(trainer.competition.state.wins) == 4


def test_the_loss_outside_the_loop_takes_the_batch_for_a_step(train):
    trainer = train(start=False, comlora_k=2)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    again, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss.item() == pytest.approx(again.item(), abs=1e-9) and outputs.logits.size(0) == 3
    loss.backward()
    trainer.train()
    assert sum(trainer.competition.state.wins) == 8


@pytest.mark.parametrize("event", ["on_step_end", "on_substep_end"])
def test_a_callbacks_own_loss_changes_nothing(train, event):
    def ask(self, args, state, control, model, **kwargs):
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
        own.append(trainer.compute_loss(model, batch).item())

    own, options = [], {"comlora_k": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
    calm = train(**options)
    trainer = train(start=False, **options)
    trainer.add_callback(type("Asking", (TrainerCallback,), {event: ask})())
    trainer.train()
    assert len(own) == 4 and difference(parameters(trainer), parameters(calm)) == 0
    assert trainer.competition.state == calm.competition.state
    for entry, expected in zip(trainer.state.log_history[:4], calm.state.log_history[:4], strict=True):
        names = [name for name in expected if name.startswith("comlora/") or name in ("loss", "grad_norm")]
        assert {name: entry[name] for name in names} == {name: expected[name] for name in names}


def test_the_loss_after_an_interrupted_step(train):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = train(start=False, comlora_k=2, gradient_accumulation_steps=2, trainer={"callbacks": [Interrupt()]})
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_a_flattened_line_counts_its_sequences(train):
    """transformers' own collator, without boundaries for flash attention: rows begin at position 0."""
    flattened = DataCollatorWithFlattening()
    batch = flattened([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}, {"input_ids": [3, 4, 5, 6]}])
    rows = Rows.of(batch)
    assert rows.count == 3 and rows.supervised_tokens(batch["labels"]).tolist() == [2, 1, 3]
    options = {"comlora_k": 2, "max_steps": 2, "max_length": None, "completion_only_loss": False}
    trainer = train(trainer={"data_collator": flattened}, **options)
    assert trainer.competition.state.selection["examples"] == 13


def test_a_disqualified_dora_branch_is_the_base(train):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.branch_parameters(1)[-1].data.fill_(math.inf)

    trainer = train(comlora_k=2, lora={"use_dora": True}, trainer={"callbacks": [Poison()]})
    assert trainer.competition.state.disqualified == {1: 3}
    ids = torch.arange(3, 21).view(2, 9)
    model = trainer.comlora_model.eval()
    model.set_adapter("branch_1")
    expected = make_model().double().eval()(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-9)

"""The tiny pass before training: what it tries, leaves as it was, and does where processes share the work."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from plain_loop import make_comlora
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from comlora_trl.branches.passes import INPUTS, LAYERS, SEPARATELY
from comlora_trl.competition import CompetitionSettings
from comlora_trl.training import trial
from comlora_trl.training.model import ComLoRAModel

COLLATOR = DataCollatorForLanguageModeling(pad_token_id=0)


@pytest.fixture
def model() -> ComLoRAModel:
    return make_comlora(CompetitionSettings(k=2), lora={"lora_dropout": 0.1})


def processes(kind: DistributedType = DistributedType.MULTI_CPU, main: bool = True, **state: object) -> Accelerator:
    """Stands for one of two processes."""
    return SimpleNamespace(
        is_main_process=main,
        num_processes=2,
        distributed_type=kind,
        state=SimpleNamespace(**{"deepspeed_plugin": None, **state}),
    )


def test_everything_is_as_before(model):
    model.get_base_model().model.layers[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert trial.try_branches(model, COLLATOR, Accelerator(cpu=True), False, False) == LAYERS
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.competing.current() is None


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_as_in_the_run(model, packed, monkeypatch):
    seen = []
    settle = trial.settle_expansion
    monkeypatch.setattr(
        trial, "settle_expansion", lambda model, batches: seen.extend(batches) or settle(model, batches)
    )
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed, pad_to_multiple_of=16)
    trial.try_branches(model, collator, Accelerator(cpu=True), packed, False)
    assert [batch["input_ids"].size(0) for batch in seen] == ([2, 1, 3, 1] if packed else [2, 3])
    assert ["cu_seq_lens_q" in batch for batch in seen] == ([False, True] * 2 if packed else [False] * 2)
    assert all(batch["input_ids"].size(1) % 16 == 0 for batch in seen if "cu_seq_lens_q" in batch or not packed)
    assert all(
        len(set(batch["attention_mask"].sum(dim=1).tolist())) > 1 for batch in seen if "attention_mask" in batch
    )


def test_a_collator_that_takes_something_else(model):
    def collator(examples):
        return {"pixels": examples[0]["image"]}

    assert trial.try_branches(model, collator, Accelerator(cpu=True), False, False) == LAYERS


def test_the_main_process_decides_for_all(model, monkeypatch):
    sent = []
    monkeypatch.setattr(trial, "broadcast_object_list", lambda found: sent.append(list(found)) or found)
    assert trial.try_branches(model, COLLATOR, processes(), False, False) == LAYERS
    [(place, batched, error)] = sent
    assert place == LAYERS and batched and error is None

    other = make_comlora(CompetitionSettings(k=2)).to("meta")  # as FSDP loads it on all processes but one
    monkeypatch.setattr(trial, "broadcast_object_list", lambda found: [INPUTS, batched, None])
    assert trial.try_branches(other, COLLATOR, processes(main=False), False, False) == INPUTS
    assert other.expansion.place == INPUTS and other.expansion.batched == batched

    monkeypatch.setattr(trial, "broadcast_object_list", lambda found: [None, None, ValueError("of the main process")])
    with pytest.raises(ValueError, match="of the main process"):
        trial.try_branches(other, COLLATOR, processes(main=False), False, False)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MULTI_GPU"])
def test_branches_one_by_one_need_a_backward_each(model, kind, monkeypatch):
    monkeypatch.setattr(trial, "broadcast_object_list", lambda found: [SEPARATELY, None, None])
    accelerator = processes(DistributedType[kind])
    if kind == "MULTI_GPU":
        assert trial.try_branches(model, COLLATOR, accelerator, False, False) == SEPARATELY
        return
    with pytest.raises(ValueError, match=f"which {kind} does not go with"):
        trial.try_branches(model, COLLATOR, accelerator, False, False)


def test_weights_out_of_reach_are_not_tried(model, monkeypatch, caplog):
    monkeypatch.setattr(trial, "settle_expansion", lambda *_: pytest.fail("tried"))
    accelerator = processes(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=3))
    assert trial.try_branches(model, COLLATOR, accelerator, False, False) == LAYERS
    assert "ZeRO-3 partitions the weights: no tiny pass was made" in caplog.text
    nowhere = make_comlora(CompetitionSettings(k=2)).to("meta")
    assert trial.try_branches(nowhere, COLLATOR, Accelerator(cpu=True), False, False) == LAYERS
    assert "the weights are not loaded yet" in caplog.text

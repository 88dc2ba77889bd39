"""What preference trainers are given and can't use ends in one line, before the first step."""

import datasets
import pytest
from conftest import make_lora, make_model
from datasets import Dataset, load_dataset
from kinds import DPO, KINDS, KTO, REWARD
from peft import get_peft_model

from comlora_trl import ComLoRAKTOConfig
from comlora_trl.training.data_checks import check_precomputed

TEXTS = Dataset.from_dict({"text": ["a", "b", "c"]})
PICTURES = Dataset.from_dict({"image": [0], "prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, needed",
    [
        (DPO, "this trainer reads chosen and rejected: rename"),
        (REWARD, "this trainer reads chosen and rejected, or chosen_ids and rejected_ids"),
        (KTO, "this trainer reads prompt, completion and label, or chosen and rejected: rename"),
    ],
    ids=str,
)
def test_columns_that_trl_does_not_read(kind, needed, tmp_path):
    with pytest.raises(ValueError, match="the training dataset has the columns text, but") as error:
        kind.run(tmp_path, given={"train_dataset": TEXTS})
    assert needed in one_line(error)
    with pytest.raises(ValueError, match="the validation dataset has the columns text, but"):
        kind.run(tmp_path, given={"eval_dataset": TEXTS})
    with pytest.raises(ValueError, match="the held dataset has the columns text, but"):
        kind.run(tmp_path, given={"train_dataset": kind.data().to_iterable_dataset(), "eval_dataset": {"held": TEXTS}})


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_images(name, tmp_path):
    with pytest.raises(ValueError, match="dataset has images: competing branches take text only"):
        DPO.run(tmp_path, given={name: PICTURES})


def test_kto_takes_pairs(tmp_path):
    """TRL makes two examples of each pair."""
    trainer = KTO.run(tmp_path, given={"train_dataset": DPO.data(8), "eval_dataset": None}, comlora_k=1, max_steps=1)
    assert len(trainer.train_dataset) == 16


@pytest.mark.parametrize("kind", [DPO, KTO], ids=str)
def test_a_reference_that_trl_can_t_use(kind, tmp_path):
    with pytest.raises(TypeError, match="ref_model='some/model' is a name.*from_pretrained") as error:
        kind.run(tmp_path, given={"ref_model": "some/model"})
    one_line(error)
    with pytest.raises(ValueError, match=r"ref_model is a PeftModel.*merge_and_unload\(\)") as error:
        kind.run(tmp_path, given={"ref_model": get_peft_model(make_model(), make_lora())})
    one_line(error)


def test_an_unknown_loss_of_kto(tmp_path):
    with pytest.raises(ValueError, match="loss_type='sigmoid' is not possible: it must be one of kto, apo_zero"):
        ComLoRAKTOConfig(str(tmp_path), loss_type="sigmoid", use_cpu=True, bf16=False)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activation_offloading_without_a_gpu(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ValueError, match="activation_offloading=True is not possible without a GPU.*leave it out"):
        kind.run(tmp_path, activation_offloading=True)


def test_precomputed_references_without_a_cache(tmp_path):
    """Two processes of TRL end in a FileNotFoundError then, also with data from a file."""
    DPO.data(4).to_json(tmp_path / "data.json")
    stored = load_dataset("json", data_files=str(tmp_path / "data.json"), split="train", cache_dir=str(tmp_path))
    check_precomputed(stored, None, 2)
    datasets.disable_caching()
    try:
        with pytest.raises(ValueError, match=r"while the cache of datasets is off.*enable_caching\(\)") as error:
            check_precomputed(stored, None, 2)
        one_line(error)
    finally:
        datasets.enable_caching()


@pytest.mark.parametrize("kind", [DPO, KTO], ids=str)
def test_precomputed_references_of_data_given_to_evaluate(kind, tmp_path, monkeypatch):
    trainer = kind.run(tmp_path, precompute_ref_log_probs=True, comlora_k=1)
    assert trainer.evaluate(kind.data(6))["eval_loss"] > 0
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(ValueError, match="not possible on 2 processes with eval_dataset in memory"):
        trainer.evaluate(kind.data(6))

"""Wrong input ends in one clear line before any training time is spent."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from conftest import make_arguments, make_dataset, make_lora, make_model
from datasets import Dataset
from peft import PromptTuningConfig

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.arguments import check_parallelism


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("comlora_k", 0, "comlora_k=0 is not possible: it must be 1 or more"),
        ("comlora_top_n", 3, "comlora_top_n=3 is not possible: it must be 1 to comlora_k=2"),
        ("comlora_top_n", 0, "comlora_top_n=0 is not possible"),
        ("comlora_branch_chunk", 3, "comlora_branch_chunk=3 is not possible"),
        ("comlora_annealing", "stepwise", "one of constant, cosine, exponential, linear"),
        ("comlora_annealing_rate", 0.0, "comlora_annealing_rate=0.0 is not possible: it must be above 0"),
        ("comlora_noise", -0.1, "comlora_noise=-0.1 is not possible: it must be 0 or more"),
        ("comlora_winner_by", "luck", "one of selector, validation_loss"),
        ("comlora_selector_input", "answer", "one of sequence, prompt"),
        ("comlora_equation_signs", "both", "one of as_described, as_printed"),
        ("comlora_selector_learning_rate", 0.0, "must be above 0"),
        ("comlora_validation_size", -1, "comlora_validation_size=-1 is not possible"),
    ],
)
def test_settings_out_of_range(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        ComLoRAConfig(**make_arguments(tmp_path, **{field: value}))
    assert "\n" not in str(error.value)


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match="nothing to learn from"):
        ComLoRAConfig(**make_arguments(tmp_path, comlora_lm_weight=0.0, comlora_selector=False))


ADAPTERS = {
    "non-LoRA": (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PromptTuningConfig"),
    "lm_head": (make_lora(target_modules=["q_proj", "lm_head"]), "Remove `'lm_head'` from your `target_modules`"),
    "modules_to_save": (make_lora(modules_to_save=["embed_tokens"]), "leave modules_to_save out"),
    "bias": (make_lora(bias="all"), "leave bias out"),
    "initialisation": (make_lora(init_lora_weights="pissa"), "changes the base weights"),
}


@pytest.mark.parametrize("config, message", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_that_branches_cannot_be(train, config, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(start=False, trainer={"peft_config": config})


DATA = {
    "missing columns": ({"train_dataset": Dataset.from_dict({"question": ["a"]})}, "has the columns question"),
    "no completion": ({"train_dataset": Dataset.from_dict({"prompt": ["a"]})}, "no completion column"),
    "one example": (
        {"train_dataset": make_dataset(1), "eval_dataset": None},
        "a single example, so none can be held out",
    ),
    "empty training set": ({"train_dataset": Dataset.from_dict({"prompt": []})}, "training dataset is empty"),
    "no training set": ({"train_dataset": None}, "`train_dataset` is required: give a Dataset"),
    "no validation set in a dict": ({"eval_dataset": {}}, "eval_dataset is empty"),
    "empty validation set": ({"eval_dataset": make_dataset().select([])}, "eval_dataset is empty"),
}


@pytest.mark.parametrize("given, message", DATA.values(), ids=DATA)
def test_data_that_cannot_train(train, given, message):
    with pytest.raises(ValueError, match=message):
        train(start=False, trainer=given)


@pytest.mark.parametrize(
    "size, given, message",
    [
        (0, None, "comlora_validation_size=0 is not possible"),
        (64, None, "takes all of the 64 training examples"),
        (5, make_dataset(13), "given beside an eval_dataset"),
    ],
)
def test_validation_sizes(train, size, given, message):
    with pytest.raises(ValueError, match=message):
        train(start=False, comlora_validation_size=size, trainer={"eval_dataset": given})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "dft"}, "loss_type='dft' does not work"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor does not work"),
        ({"comlora_selector_heads": 5}, "comlora_selector_heads=5 does not divide"),
    ],
)
def test_options_whose_loss_cannot_be_weighted(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(start=False, **options)


@pytest.mark.parametrize("kind", ["cp_enabled", "sp_enabled", "tp_enabled"])
def test_parallelism_that_splits_rows(tmp_path, kind):
    enabled = {"cp_enabled": False, "sp_enabled": False, "tp_enabled": False, kind: True}
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**enabled))
    with pytest.raises(ValueError, match="use data parallelism"):
        check_parallelism(accelerator, ComLoRAConfig(**make_arguments(tmp_path)))


@pytest.mark.parametrize("distributed", ["FSDP", "DEEPSPEED", "NO"])
def test_chunks_need_whole_weights(tmp_path, distributed):
    accelerator = SimpleNamespace(parallelism_config=None, distributed_type=DistributedType[distributed])
    for chunk, refused in ((1, distributed != "NO"), (None, False), (2, False)):
        config = ComLoRAConfig(**make_arguments(tmp_path, comlora_k=2, comlora_branch_chunk=chunk))
        with pytest.raises(ValueError, match="comlora_branch_chunk=1 works with") if refused else nullcontext():
            check_parallelism(accelerator, config)


def test_checkpoint_of_another_k(train):
    trainer = train(comlora_k=2, max_steps=2, save_strategy="steps", save_steps=2)
    checkpoint = f"{trainer.args.output_dir}/checkpoint-2"
    with pytest.raises(ValueError, match="has 2 branches, but comlora_k=3: resume with --comlora_k 2"):
        train(comlora_k=3, start=False).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="trained with a selector, but comlora_selector=False"):
        train(comlora_k=2, comlora_selector=False, start=False).train(resume_from_checkpoint=checkpoint)


def test_folders_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = ComLoRAConfig(**make_arguments(tmp_path / "file" / "out"))
    with pytest.raises(PermissionError, match="choose another folder with --output_dir"):
        ComLoRASFTTrainer(make_model(), config, train_dataset=make_dataset(130))
    with pytest.raises(OSError, match="comlora_winner_dir"):
        train(start=False, comlora_winner_dir=str(tmp_path / "file"))


def test_examples_that_are_cut_before_what_is_learnt(train):
    with pytest.raises(
        ValueError, match="no example of the training dataset has a token to learn within max_length=4"
    ):
        train(start=False, max_length=4)


def test_a_winner_is_not_overwritten_unasked(train, tmp_path):
    winner = tmp_path / "winner"
    winner.mkdir()
    (winner / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--comlora_overwrite_winner"):
        train(start=False, comlora_winner_dir=str(winner))
    train(comlora_winner_dir=str(winner), comlora_overwrite_winner=True, max_steps=1)
    assert not (winner / "kept.txt").exists() and (winner / "adapter_config.json").is_file()

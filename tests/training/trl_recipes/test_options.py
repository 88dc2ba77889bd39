"""Options of TRL's configuration, each alone: at K = 1 they do what they do in TRL's trainer; those that would do
nothing are refused."""

import re
from typing import Any

import pytest
import torch
from conftest import difference, make_arguments, make_dataset, make_lora, make_model, make_tokenizer, parameters
from test_recipes import logged, train
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from recipes import make_data

BASE = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "per_device_train_batch_size": 2}
EVAL = {"eval_strategy": "steps", "eval_steps": 2}


def _skipped(rows: int) -> dict[str, Any]:
    return {"train_dataset": make_data("labels", rows), "eval_dataset": make_data("labels", 5)}


OPTIONS: dict[str, dict] = {
    "order": {"shuffle_dataset": True, "train_sampling_strategy": "group_by_length", "seed": 3, "data_seed": 4},
    "neftune": {"neftune_noise_alpha": 5.0, "max_grad_norm": 0.01, "average_tokens_across_devices": False},
    "adafactor": {"optim": "adafactor", "learning_rate": 1e-3, "max_grad_norm": 0.0},
    "adamw": {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "optim_args": "eps=1e-3"},
    "warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_length": 16},
    "min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.1}, "eos_token": "~"},
    "eval_packing": {"eval_packing": True, "max_length": 32, "eval_on_start": True, **EVAL},
    "only_train_packing": {"packing": True, "eval_packing": False, "max_length": 32, "eval_delay": 2, **EVAL},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, "rows": 9, "dataloader_drop_last": True},
    "logs": {"logging_steps": 2, "logging_first_step": True, "include_num_input_tokens_seen": "all"},
    "every_n_layers": {"gradient_checkpointing_kwargs": {"every_n_layers": 2}, "remove_unused_columns": False},
    "skip_prepare": {"dataset_kwargs": {"skip_prepare_dataset": True}, "given": _skipped, **EVAL},
    "bf16": {"bf16": True, "tolerance": 1e-3, "eval_accumulation_steps": 1, **EVAL},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_what_they_do_in_trls_trainer(name, tmp_path):
    options = dict(OPTIONS[name])
    rows, tolerance, given = (options.pop(k, d) for k, d in (("rows", 20), ("tolerance", 1e-6), ("given", None)))
    data = given(rows) if given else {"train_dataset": make_dataset(rows), "eval_dataset": make_dataset(5)}
    data |= {"processing_class": make_tokenizer()}
    common = BASE | options
    trl = SFTTrainer(
        make_model(), SFTConfig(**make_arguments(tmp_path / "trl", **common)), peft_config=make_lora(), **data
    )
    expected = train(trl)
    config = ComLoRAConfig(**make_arguments(tmp_path / "ours", comlora_k=1, comlora_selector=False, **common))
    data |= {"processing_class": make_tokenizer()}
    ours = ComLoRASFTTrainer(make_model(), config, peft_config=make_lora(), **data)
    assert train(ours) == pytest.approx(expected, abs=tolerance) and expected
    for figure in ("loss", "grad_norm", "learning_rate", "num_tokens", "num_input_tokens_seen", "eval_loss"):
        theirs = logged(trl, figure)
        assert logged(ours, figure)[: len(theirs)] == pytest.approx(theirs, abs=tolerance), figure
    adapter = {n.replace("default", "branch_0"): p for n, p in trl.model.named_parameters() if p.requires_grad}
    assert difference(adapter, parameters(ours)) < tolerance


def test_selective_checkpointing_trains_as_the_plain_kind(train):
    """TRL's own trainer ends in an error here: it wraps a method that the Trainer does not call on a PEFT model."""
    plain = train(comlora_k=2, max_steps=2)
    selective = train(comlora_k=2, max_steps=2, gradient_checkpointing_kwargs={"selective": True})
    assert difference(parameters(plain), parameters(selective)) < 1e-9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"comlora_selector": False, "comlora_top_n": 1}, "comlora_top_n=1 does nothing with comlora_selector=False"),
        ({"comlora_selector": False, "comlora_selector_dim": 8}, "comlora_selector_dim=8 does nothing"),
        ({"comlora_annealing": "linear", "comlora_annealing_rate": 2.0}, "with comlora_annealing=linear"),
        ({"comlora_alignment_weight": 0.0, "comlora_annealing": "cosine"}, "with comlora_alignment_weight=0"),
        ({"comlora_pairwise_weight": 0.0, "comlora_noise": 0.5}, "comlora_noise=0.5 does nothing"),
    ],
)
def test_settings_that_nothing_reads(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ComLoRAConfig(**make_arguments(tmp_path, **options))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_without_a_gpu_precision_settles_itself(tmp_path, caplog):
    config = ComLoRAConfig(str(tmp_path))
    assert config.use_cpu and not config.bf16
    assert [r.getMessage() for r in caplog.records if "no GPU" in r.getMessage()] == [
        "[RANK 0] no GPU is found: training on the CPU, in float32."
    ]
    assert ComLoRAConfig(str(tmp_path), bf16=True).bf16  # asked for
    caplog.clear()
    for settled in ({"bf16": False}, {"use_cpu": True}):
        ComLoRAConfig(str(tmp_path), **settled)
    assert not caplog.records

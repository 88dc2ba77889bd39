"""The trainer: K = 1 is LoRA, and how a step is cut into micro-batches, chunks or padding changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_compiled_module
from conftest import difference, make_arguments, make_dataset, make_lora, make_model, make_tokenizer, parameters
from datasets import IterableDataset
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.branches.model import BranchModel
from comlora_trl.training.trainer import CompetingTrainer


def test_one_branch_without_selector_is_trl_lora(tmp_path):
    shared = {"max_steps": 20, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    shared |= {"eval_strategy": "steps", "eval_steps": 10}
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(10), "processing_class": make_tokenizer()}
    trl = SFTTrainer(
        make_model(), SFTConfig(**make_arguments(tmp_path / "a", **shared)), peft_config=make_lora(), **given
    )
    trl.train()
    config = ComLoRAConfig(**make_arguments(tmp_path / "b", comlora_k=1, comlora_selector=False, **shared))
    ours = ComLoRASFTTrainer(make_model(), config, peft_config=make_lora(), **given)
    ours.train()

    for figure, count in {"loss": 20, "eval_loss": 2, "grad_norm": 20}.items():
        theirs = [entry[figure] for entry in trl.state.log_history if figure in entry]
        assert len(theirs) == count
        assert [e[figure] for e in ours.state.log_history if figure in e] == pytest.approx(theirs, abs=1e-6)
    adapter = {n.replace("default", "branch_0"): p for n, p in trl.model.named_parameters() if p.requires_grad}
    assert difference(adapter, parameters(ours)) < 1e-6


def test_one_branch_with_dropout_is_trl_lora(tmp_path):
    given = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(10), "processing_class": make_tokenizer()}
    lora = {"lora_dropout": 0.2}
    trl = SFTTrainer(make_model(), SFTConfig(**make_arguments(tmp_path / "a")), peft_config=make_lora(**lora), **given)
    trl.train()
    config = ComLoRAConfig(**make_arguments(tmp_path / "b", comlora_k=1, comlora_selector=False))
    ours = ComLoRASFTTrainer(make_model(), config, peft_config=make_lora(**lora), **given)
    ours.train()
    adapter = {n.replace("default", "branch_0"): p for n, p in trl.model.named_parameters() if p.requires_grad}
    assert difference(adapter, parameters(ours)) < 1e-6


def test_lookups_made_once_train_as_the_trainers_own_do(train, monkeypatch):
    options = {"comlora_k": 2, "max_grad_norm": 0.0}  # ours clips branch by branch, see test_gradients.py
    quick = train(**options)
    assert "_clip_grad_norm" in vars(Trainer), "transformers has moved the seam: gradients are clipped elsewhere"
    monkeypatch.delattr(CompetingTrainer, "_clip_grad_norm")
    monkeypatch.delattr(CompetingTrainer, "floating_point_ops")
    for name in ("train", "zero_grad"):
        monkeypatch.delattr(BranchModel, name)
    slow = train(**options)
    assert difference(parameters(quick), parameters(slow)) < 1e-12
    norms = [[entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry] for run in (quick, slow)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert quick.state.total_flos == pytest.approx(2 * slow.state.total_flos, rel=1e-6)


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(train):
    options = {"comlora_k": 2, "max_steps": 2}
    eager = train(**options)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = train(**options, torch_compile=True, torch_compile_backend="aot_eager")
    torch._dynamo.reset()
    assert is_compiled_module(compiled.model_wrapped)
    assert difference(parameters(eager), parameters(compiled)) < 1e-9


@pytest.mark.parametrize("batch, accumulation", [(2, 4), (1, 8)])
def test_gradient_accumulation_changes_nothing(train, batch, accumulation):
    whole = train(comlora_k=3)
    cut = train(comlora_k=3, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert difference(parameters(whole), parameters(cut)) < 1e-9
    assert whole.competition.state.wins == cut.competition.state.wins


def test_padding_free_equals_padded(train):
    padded = train(comlora_k=2)
    packed = train(comlora_k=2, padding_free=True, max_length=None)
    assert difference(parameters(padded), parameters(packed)) < 1e-9
    results = [run.competition.state.selection for run in (padded, packed)]
    assert results[0]["scores"] == pytest.approx(results[1]["scores"], abs=1e-6)
    assert results[0]["examples"] == results[1]["examples"] == 13


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "max_length": 64},
        {"gradient_checkpointing": False},
        {"bf16": True, "double": False, "optim": "sgd", "learning_rate": 1.0},
        {"lora": {"use_dora": True}},
        {"lora": {"layers_to_transform": [1]}},
        {"lora": {"target_modules": ["embed_tokens", "q_proj"]}},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_options_of_trl_train_and_chunks_agree(train, options):
    together = train(comlora_k=2, max_steps=4, per_device_train_batch_size=2, **options)
    chunked = train(comlora_k=2, max_steps=4, per_device_train_batch_size=2, comlora_branch_chunk=1, **options)
    # TRL's fused LM head computes in float32; bf16's products of more rows add up in another order (with SGD, for Adam
    # makes a whole step of a tiny gradient's sign)
    assert difference(parameters(together), parameters(chunked)) < (1e-3 if options.get("bf16") else 1e-5)
    changed = [name for name, value in parameters(together).items() if "lora_B" in name and value.abs().max() > 0]
    assert any("branch_0" in name for name in changed) and any("branch_1" in name for name in changed)


def test_conversational_assistant_only_and_streamed_data(train):
    def rows():
        for row in make_dataset(48):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            yield {"messages": turns}

    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% else %}A{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    data = {"train_dataset": IterableDataset.from_generator(rows), "eval_dataset": None, "processing_class": tokenizer}
    from comlora_trl.trainers.sft import ComLoRASFTTrainer as Trainer

    base = train(start=False)
    config = ComLoRAConfig(
        **make_arguments(Path(base.args.output_dir) / "stream", assistant_only_loss=True, comlora_validation_size=7)
    )
    trainer = Trainer(make_model(), config, peft_config=make_lora(), **data)
    trainer.train()
    assert trainer.competition.state.selection["examples"] == 7


def test_logs_table_and_competition_file(train, capsys):
    trainer = train(comlora_k=2, eval_strategy="steps", eval_steps=4)
    step = trainer.state.log_history[0]
    wanted = ["eta", "lm_loss", "alignment_loss", "pairwise_loss"]
    wanted += [f"{name}_{branch}" for name in ("loss", "probability", "wins") for branch in (0, 1)]
    assert {f"comlora/{name}" for name in wanted} <= step.keys()
    assert step["loss"] == pytest.approx(
        step["comlora/lm_loss"] + step["comlora/alignment_loss"] + step["comlora/pairwise_loss"], abs=1e-4
    )
    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {"eval_comlora/loss_0", "eval_comlora/score_1", "eval_comlora/winner"} <= evaluation.keys()
    summary = json.loads((Path(trainer.args.winner_dir) / "competition.json").read_text())
    assert summary["winner"] == trainer.competition.state.selection["winner"]
    assert sum(branch["share_of_wins"] for branch in summary["branches"]) == pytest.approx(1)
    assert len([entry for entry in summary["history"] if "comlora/eta" in entry]) == 8
    printed = capsys.readouterr().out
    assert "score" in printed and "winner" in printed and "K=2 branches of rank 4" in printed


def test_wins_in_a_window_are_counted(train):
    trainer = train(comlora_k=2, logging_steps=4)
    first = trainer.state.log_history[0]
    assert first["comlora/wins_0"] + first["comlora/wins_1"] == 4


def test_validation_set_is_held_out_and_reproducible(train):
    first, second = (train(start=False, comlora_validation_size=9, trainer={"eval_dataset": None}) for _ in range(2))
    assert len(first.train_dataset) == 64 - 9 and len(first.eval_dataset) == 9
    assert first.eval_dataset["input_ids"] == second.eval_dataset["input_ids"]


def test_args_none_and_plain_sft_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default, bf16, asks for a GPU or use_cpu, and there are no arguments to say use_cpu with
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    given = {"train_dataset": make_dataset(130), "processing_class": make_tokenizer(), "peft_config": make_lora()}
    model = make_model()
    model.config._name_or_path = "someone/tiny"
    trainer = ComLoRASFTTrainer(model, **given)
    assert isinstance(trainer.args, ComLoRAConfig) and trainer.args.output_dir == "tiny-ComLoRA"
    plain = SFTConfig(**make_arguments(tmp_path / "plain"))
    trainer = ComLoRASFTTrainer(make_model(), plain, **given)
    assert trainer.args.comlora_k == 2 and trainer.args.learning_rate == plain.learning_rate


def test_model_from_a_path_and_default_adapter(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = ComLoRAConfig(**make_arguments(tmp_path / "out", max_steps=1))
    trainer = ComLoRASFTTrainer(str(tmp_path / "base"), config, train_dataset=make_dataset(130))
    lora = trainer.comlora_model.peft_config["branch_1"]
    assert lora.r == 8 and set(lora.target_modules) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


def test_selector_has_its_own_learning_rate(train):
    trainer = train(start=False, comlora_selector_learning_rate=0.5)
    trainer.create_optimizer()
    selector = {id(parameter) for parameter in trainer.comlora_model.selector.parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(id(parameter) in selector, set()).add(group["lr"])
    assert rates == {True: {0.5}, False: {1e-2}}
    counted = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert counted == len([p for p in trainer.model.parameters() if p.requires_grad])


def test_load_best_model_at_end(train):
    trainer = train(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True
    )
    assert Path(trainer.state.best_model_checkpoint).is_dir()
    assert (Path(trainer.args.winner_dir) / "adapter_model.safetensors").is_file()


def test_described_signs_lower_the_preferred_branch_and_printed_signs_raise_it(train):
    described = train(max_steps=12, comlora_annealing="constant", comlora_pairwise_weight=0.0)
    printed = train(
        max_steps=12, comlora_annealing="constant", comlora_pairwise_weight=0.0, comlora_equation_signs="as_printed"
    )
    results = [run.competition.state.selection for run in (described, printed)]
    assert results[0]["winner"] == results[1]["winner"]  # without the pairwise loss the selector stays as it began
    winner = results[0]["winner"]
    untrained = described.state.log_history[0][f"comlora/loss_{winner}"]
    assert results[0]["validation_nll"][winner] < untrained < results[1]["validation_nll"][winner]

"""Preference runs that start from an adapter, and models on which TRL's own adapter needs care."""

import pytest
import torch
from conftest import make_lora, make_model
from kinds import DPO, KTO, SFT, logged
from peft import PeftModel, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}
SIZES = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SAVING = {"save_strategy": "steps", "save_steps": 4, "comlora_overwrite_winner": True}


def make_experts() -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    config._attn_implementation = "eager"
    return GptOssForCausalLM(config)


def adapter_on(model, **lora) -> dict:
    """The trainer's arguments for an adapter to start from."""
    torch.manual_seed(11)
    return {"model": get_peft_model(model, make_lora(init_lora_weights=False, **lora)), "peft_config": None}


def trained(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.comlora_model.named_parameters() if p.requires_grad}


def reference(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.comlora_model.named_parameters() if ".ref." in name}


@pytest.mark.parametrize("kind", [DPO, KTO], ids=str)
@pytest.mark.parametrize("options", [{"comlora_k": 1}, {"comlora_tournament": True, "comlora_rungs": "0.3:2,0.7:1"}])
def test_a_run_from_an_adapter_resumes(kind, options, tmp_path):
    """The checkpoint has the branches. The reference is not in it: it comes from the adapter that is given again."""
    options = {"learning_rate": 1e-2, "max_steps": 8, **SAVING, **kind.of_any_cut, **options}
    if kind is KTO:
        options["per_device_train_batch_size"] = 8
    whole = kind.run(tmp_path, given=adapter_on(make_model()), **options)
    whole.train()
    folders = {path.name for path in (tmp_path / "checkpoint-4").iterdir() if path.is_dir()}
    assert folders and all(name.startswith("branch_") for name in folders)
    resumed = kind.run(tmp_path, given=adapter_on(make_model()), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    first, second = trained(whole), trained(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert reference(whole).keys() == reference(resumed).keys() != set()


def test_the_best_checkpoint_of_a_run_from_an_adapter_is_loaded(tmp_path):
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer = DPO.run(
        tmp_path, given=adapter_on(make_model()), comlora_k=2, learning_rate=1e-2, max_steps=8, **options
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None


@pytest.mark.parametrize("make, lora", [(make_model, {}), (make_experts, EXPERTS)], ids=["layers", "experts"])
def test_a_second_competition_from_an_adapter(make, lora, tmp_path):
    """The retired branches come back beside the reference, which stays as it was."""
    options = {"comlora_tournament": True, "comlora_rungs": "0.3:2,0.7:1", "learning_rate": 1e-2, "max_steps": 6}
    trainer = DPO.run(tmp_path, given=adapter_on(make(), **lora), comlora_overwrite_winner=True, **options)
    kept = reference(trainer)
    for _ in range(2):
        trainer.train()
        assert len(trainer.competition.state.retired) == 3
        assert trainer.comlora_model.active_adapter.startswith("branch_")
    assert kept and all(torch.equal(kept[name], value) for name, value in reference(trainer).items())


def test_an_adapter_on_experts_is_the_reference(tmp_path):
    trainer = DPO.run(tmp_path, given=adapter_on(make_experts(), **EXPERTS), comlora_k=2, max_steps=3)
    assert reference(trainer)
    trainer.train()
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0, abs=1e-3)
    winner = PeftModel.from_pretrained(make_experts(), tmp_path / "winner")
    assert list(winner.peft_config) == ["default"]


def make_nemotron() -> NemotronHForCausalLM:
    torch.manual_seed(0)
    blocks = {"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 8}
    return NemotronHForCausalLM(NemotronHConfig(**SIZES, **blocks, ssm_state_size=8, n_groups=2))


def make_mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "pad_token_id")}
    return MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=2, state_size=4))


@pytest.mark.parametrize("kind, make", [(DPO, make_nemotron), (SFT, make_mamba)], ids=["nemotron", "mamba"])
def test_a_model_with_layers_that_peft_refuses(kind, make, tmp_path):
    """PEFT refuses an adapter on `out_proj` of this type of model, and the branches have none."""
    given = {"model": make(), "peft_config": None}
    trainer = kind.run(tmp_path, given=given, comlora_k=2, comlora_selector=False, max_steps=2)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    assert not any("out_proj" in name for name in after)
    assert all(not torch.equal(before[name], value) for name, value in after.items() if "lora_B" in name)


def test_nothing_is_said_of_the_layers_that_are_left_out(tmp_path, recwarn):
    DPO.run(tmp_path)
    assert not [warning for warning in recwarn if "exclude_modules" in str(warning.message)]

"""Every architecture: batched = in chunks = branch by branch = each branch alone in PEFT, or one clear line."""

import pytest
import torch
from architectures import Architecture
from conftest import TARGETS, make_arguments, make_dataset, make_lora, make_tokenizer
from families import FAMILIES, make_family
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CTRLConfig, CTRLLMHeadModel, GraniteMoeConfig, GraniteMoeForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.branches.passes import INPUTS, LAYERS, SEPARATELY
from comlora_trl.training.adapters import ProposedTargets, complete_lora_config, default_targets

TOLERANCE = 1e-5
AT_INPUTS = {"Gemma 3n text", "Bloom", "StarCoder"}  # batch in the second dimension, or batch times heads in the first
# What keeps packed sequences apart there, in the stock trainer too
NEEDS_FOR_PACKING = dict.fromkeys(("Mamba 2", "Qwen3-Next", "LFM2"), "causal_conv1d")
CAUSAL = [family for family in FAMILIES if family != "T5"]
EXPERTS = ["Qwen3-MoE", "Mixtral", "OLMoE", "gpt-oss", "Qwen3-Next"]  # those with a router's loss


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", CAUSAL)
def test_batched_in_chunks_and_alone_are_the_same(family, packed):
    if packed and family in NEEDS_FOR_PACKING:
        with pytest.raises(ValueError, match=f"can't be trained here.*{NEEDS_FOR_PACKING[family]}") as error:
            Architecture(family, packed)
        assert "\n" not in str(error.value)
        return
    one = Architecture(family, packed)
    assert one.place == (INPUTS if family in AT_INPUTS else LAYERS)
    assert one.has_router == (family in EXPERTS)
    errors = one.errors()
    assert max(errors.values()) < TOLERANCE, errors
    assert all(gradient.any() for gradient in one.run().gradients.values()), "an adapter that does not train"


@pytest.mark.parametrize("family", ["Qwen3-MoE", "Gemma 3n text"])
def test_checkpointing(family):
    one = Architecture(family)
    expected = one.alone()
    for chunk in (None, 1):
        assert one.run(chunk=chunk, checkpointing=True).error(expected) < TOLERANCE


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3", "GLM-4-MoE", "Qwen3-Next"])
def test_all_linear_with_fused_experts(family):
    """PEFT wraps the experts' parameters; where it adapts routers too, their loss needs the branches apart."""
    one = Architecture(family, target_modules="all-linear")
    assert one.place in (LAYERS, SEPARATELY)
    errors = one.errors()
    assert max(errors.values()) < TOLERANCE, errors


def test_experts_by_the_names_they_had(family="Qwen3-MoE"):
    one = Architecture(family, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert one.place == LAYERS
    errors = one.errors()
    assert max(errors.values()) < TOLERANCE, errors


def test_experts_by_parameter(family="gpt-oss"):
    names = ["experts.gate_up_proj", "experts.down_proj"]
    one = Architecture(family, target_modules=["q_proj"], target_parameters=names)
    assert one.place == LAYERS
    errors = one.errors()
    assert max(errors.values()) < TOLERANCE, errors


class _RoutedExperts(nn.Module):
    """A mixture of experts as custom code has it: a list of linear layers, each on the tokens sent to it."""

    def __init__(self, dense: nn.Module, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.dense = dense

    def forward(self, x):
        flat = x.reshape(-1, x.size(-1))
        chosen, output = self.gate(flat).argmax(dim=-1), self.dense(x).reshape(flat.shape)
        for index, expert in enumerate(self.experts):
            own = (chosen == index).nonzero()[:, 0]
            output = output.index_add(0, own, expert(flat[own]))
        return output.view_as(x)


def test_layers_that_see_a_share_of_the_tokens_run_branch_by_branch(monkeypatch):
    """Also where every share happens to be a multiple of K, which the layers could not tell."""

    def with_experts(family):
        model = make_family(family)
        for layer in model.model.layers:
            layer.mlp = _RoutedExperts(layer.mlp, 32)
        torch.manual_seed(7)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
        return model

    monkeypatch.setattr("architectures.make_family", with_experts)
    experts = [f"experts.{index}" for index in range(4)]
    one = Architecture("Llama", target_modules=["q_proj", *experts])
    assert one.place == SEPARATELY
    errors = one.errors()
    assert max(errors.values()) < TOLERANCE, errors
    assert not {"0", "1", "2", "3", "gate"} & set(default_targets(with_experts("Llama")))


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Bloom"])
def test_one_branch_is_the_stock_trainer(family, tmp_path):
    """K = 1 without a selector, three steps, accumulated, the routers' loss among them."""
    losses = []
    for trainer, config, own in (
        (SFTTrainer, SFTConfig, {}),
        (ComLoRASFTTrainer, ComLoRAConfig, {"comlora_k": 1, "comlora_selector": False}),
    ):
        options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **own}
        run = trainer(
            make_family(family),
            config(**make_arguments(tmp_path / trainer.__name__, **options)),
            train_dataset=make_dataset(),
            eval_dataset=make_dataset(3),
            processing_class=make_tokenizer(),
            peft_config=make_lora(target_modules=default_targets(make_family(family))),
        )
        seen = []
        original = run.training_step
        run.training_step = lambda *args, step=original, seen=seen: seen.append(step(*args)) or seen[-1]
        run.train()
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-6)


# ---- One clear line ----


def construct(tmp_path, family: str | PreTrainedModel, lora: object, **options: object) -> ComLoRASFTTrainer:
    return ComLoRASFTTrainer(
        make_family(family) if isinstance(family, str) else family,
        ComLoRAConfig(**make_arguments(tmp_path, **options)),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(3),
        processing_class=make_tokenizer(),
        peft_config=lora,
    )


REFUSED = {
    "encoder and decoder": ("T5", None, "train causal language models only"),
    "AdaLoRA": ("Llama", AdaLoraConfig(total_step=10), "AdaLoraConfig, whose ranks shrink"),
    "activated LoRA": ("Llama", make_lora(alora_invocation_tokens=[5]), "would never train: leave it out"),
    "a fused half": ("Qwen3-MoE", make_lora(target_modules=["up_proj"]), "fused into gate_up_proj"),
    "experts with dropout": ("Mixtral", make_lora(target_modules="all-linear", lora_dropout=0.1), "lora_dropout != 0"),
}


@pytest.mark.parametrize("family, lora, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained(tmp_path, family, lora, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        construct(tmp_path, family, lora)
    assert "\n" not in str(error.value)


def test_a_routers_loss_that_cannot_be_computed(tmp_path):
    """GraniteMoE's configuration calls the number of experts otherwise than TRL expects."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    lora = make_lora(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="set router_aux_loss_coef=0.0 to train without it") as error:
        construct(tmp_path, GraniteMoeForCausalLM(GraniteMoeConfig(**sizes)), lora)
    assert "\n" not in str(error.value)
    construct(tmp_path, GraniteMoeForCausalLM(GraniteMoeConfig(**sizes)), lora, router_aux_loss_coef=0.0, max_steps=1)


def test_layers_that_are_never_called(monkeypatch):
    def with_a_spare(family):
        model = make_family(family)
        model.model.layers[1].spare = nn.Linear(32, 32)
        return model

    monkeypatch.setattr("architectures.make_family", with_a_spare)
    with pytest.raises(ValueError, match="target_modules adapts spare, whose adapters would never train"):
        Architecture("Llama", target_modules=["q_proj", "spare"])


def test_default_targets_fit_and_are_said(tmp_path, caplog):
    trainer = construct(tmp_path, "Phi-3", None)
    assert trainer.comlora_model.peft_config["branch_0"].target_modules >= {"qkv_proj", "gate_up_proj"}
    assert "no peft_config is given: each branch is a LoRA of rank 8 on down_proj, gate_up_proj" in caplog.text
    caplog.clear()
    lora = make_lora(target_modules=ProposedTargets(TARGETS))  # as `scripts/sft.py` gives them
    config = complete_lora_config(lora, make_family("Mixtral"))
    assert config.target_modules == {"q_proj", "k_proj", "v_proj"} and lora.target_modules != config.target_modules
    assert "MixtralForCausalLM does not have all of q_proj" in caplog.text and "adapt q_proj, k_proj" in caplog.text
    mamba = complete_lora_config(LoraConfig(), make_family("Mamba 2"))  # PEFT knows none
    assert mamba.target_modules == {"in_proj"}
    sizes = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}
    numbered = CTRLLMHeadModel(CTRLConfig(**sizes))  # linear layers in lists, without names of their own
    config = complete_lora_config(None, numbered)
    assert config.target_modules == {"Wq", "Wk", "Wv", "dense"} and get_peft_model(numbered, config)
    caplog.clear()
    for given in (LoraConfig(), make_lora(), make_lora(target_modules=["o_proj"])):
        assert complete_lora_config(given, make_family("Llama")) is given
    assert not caplog.text


def test_a_winner_on_experts_loads_in_peft(tmp_path):
    lora = make_lora(target_modules=["gate_proj", "up_proj", "down_proj"])
    trainer = construct(tmp_path, "Qwen3-MoE", lora, max_steps=2)
    trainer.train()
    winner = PeftModel.from_pretrained(make_family("Qwen3-MoE"), trainer.args.winner_dir).eval()
    ids = torch.randint(3, 99, (4, 6))
    with torch.no_grad():
        found, expected = winner(ids).logits, trainer.comlora_model.eval()(ids).logits
        base = make_family("Qwen3-MoE").eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, base, atol=1e-3)


def test_the_start_line_says_where_the_batch_widens(tmp_path, capsys):
    for family, lora, line in (
        ("Bloom", None, "all at once (torch kernels; the batch widens at the inputs)"),
        ("Mixtral", make_lora(target_modules="all-linear"), "branch by branch (torch kernels)"),
    ):
        construct(tmp_path / family, family, lora, max_steps=1).train()
        assert line in capsys.readouterr().out

"""Families of models, tiny and random, made from their configurations."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

VOCABULARY = 99
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GROUPED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
_LINEAR_SIZES = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}

# transformers' model_type, and what differs from `_COMMON` in its configuration; None takes an entry out of it
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Qwen3": ("qwen3", {}),
    "Gemma 3 text": ("gemma3_text", {"num_hidden_layers": 3, "sliding_window": 8, "layer_types": None}),
    "Gemma 3n text": (
        "gemma3n_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 1,
            "laurel_rank": 4,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
    "Phi-3": ("phi3", {}),
    "Falcon": ("falcon", {"head_dim": None, "multi_query": True}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **_NO_DROPOUT}),
    "GPT-NeoX": ("gpt_neox", {}),
    "Bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "StarCoder": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **_NO_DROPOUT}),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "Mamba": ("mamba", {"state_size": 4}),
    "Mamba 2": ("mamba2", {"state_size": 4, "num_heads": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}),
    "Qwen3-MoE": ("qwen3_moe", _EXPERTS),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "DeepSeek-V3": ("deepseek_v3", {**_EXPERTS, **_MLA, **_GROUPED, "num_key_value_heads": 4}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **_EXPERTS,
            **_LINEAR_HEADS,
            **_LINEAR_SIZES,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "GLM-4-MoE": ("glm4_moe", {**_EXPERTS, **_GROUPED}),
    "LFM2": ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "SmolLM3": ("smollm3", {}),
    "T5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
}


def make_family(name: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model of a family, the same random weights each time."""
    model_type, own = FAMILIES[name]
    settings = {key: value for key, value in {**_COMMON, **own, **overrides}.items() if value is not None}
    known = AutoConfig.for_model(model_type)
    settings = {key: value for key, value in settings.items() if key in own or hasattr(known, key)}
    config = AutoConfig.for_model(model_type, **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # a configuration's own spread leaves a narrow model's logits all but flat
            torch.nn.init.normal_(parameter, std=0.2)
    return model

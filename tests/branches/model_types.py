"""Every causal `model_type` of transformers, tiny and random: two branches at once against TRL's trainer on each.

`python tests/branches/model_types.py [MODEL_TYPE ...]` prints a line for each and a count, in about five minutes on a
CPU core. The branches have rates of their own, so each trains as it would alone, router loss included.
"""

import contextlib
import copy
import io
import logging
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import make_arguments, make_dataset, make_tokenizer
from families import VOCABULARY

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer
from comlora_trl.training.adapters import complete_lora_config

LARGEST, SECONDS, TOLERANCE, RATE = 4_000_000, 60, 1e-5, 0.5
# Sizes under all the names that configurations have for them; a name counts where the configuration knows it
_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions max_seq_len max_seqlen n_ctx",
    64: "d_inner",
    48: "intermediate_size n_inner ffn_dim d_ff feed_forward_size shared_intermediate_size ffn_hidden_size "
    "decoder_ffn_dim encoder_ffn_dim",
    32: "hidden_size n_embd d_model dim embed_dim word_embed_proj_dim lru_width attention_hidden_size d_embed",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank expert_ffn_hidden_size "
    "qk_head_dim index_head_dim attention_head_dim",
    8: "head_dim d_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "sliding_window mamba_n_heads mamba_num_heads mamba_head_dim mamba_d_head chunk_size mamba_chunk_size kv_size "
    "attention_window_size d_kv head_size kv_channels index_topk hidden_size_per_layer_input time_mix_extra_dim",
    4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts mamba_d_state state_size mamba_d_conv rotary_dim "
    "mamba_dt_rank time_step_rank laurel_rank rope_dim adapter_rank",
    2: "num_hidden_layers n_layer num_layers n_layers layers decoder_layers encoder_layers num_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk linear_num_key_heads linear_num_value_heads "
    "num_kv_heads index_n_heads mamba_expand",
    1: "n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups n_groups num_logits_to_keep "
    "num_mem_blocks num_memory_blocks bos_token_id",
    0.5: "partial_rotary_factor",
    0: "num_kv_shared_layers zero_expert_num pad_token_id",
}
_DROPOUTS = (
    "attn_pdrop embd_pdrop resid_pdrop dropout attention_dropout activation_dropout hidden_dropout layerdrop "
    "hidden_dropout_prob attention_probs_dropout_prob decoder_layerdrop residual_dropout"
)
_OFTEN_LEFT_OUT = ("q_lora_rank", "sliding_window")
_DROP = object()
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_FULL_HEADS = {"num_key_value_heads": 4}
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": _DROP},
    "phi": {"head_dim": _DROP},
    "mamba2": {"num_heads": 8, "expand": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "bamba": {"attn_layer_indices": [1]},
    "nemotron_h": {"num_hidden_layers": 4, "hybrid_override_pattern": "M*-E", "layers_block_type": _DROP},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": _DROP},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "bailing_hybrid": {"num_hidden_layers": 4},
    "minimax": {**_LINEAR, "block_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"v_head_dim": _DROP, "qk_head_dim": _DROP},
    "electra": {"embedding_size": 32},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "reformer": {"is_decoder": True},
}
_OWN |= dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _LINEAR)
_LATENT = "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 sarvam_mla youtu"
_OWN |= dict.fromkeys(_LATENT.split(), _FULL_HEADS)


def small_config(model_type: str) -> Any:
    """The type's configuration with small sizes; what its checks refuse of them is left at its default."""
    default = AutoConfig.for_model(model_type)
    sizes: dict[str, Any] = {"layer_types": None} if hasattr(default, "layer_types") else {}
    for size, names in (*_SIZES.items(), (0.0, _DROPOUTS)):
        for name in (name for name in names.split() if hasattr(default, name)):
            if name not in _OFTEN_LEFT_OUT or getattr(default, name) is not None:
                sizes[name] = size
    if hasattr(default, "eos_token_id"):
        sizes["eos_token_id"] = 2
    sizes = {name: size for name, size in (sizes | _OWN.get(model_type, {})).items() if size is not _DROP}
    tries = ((), ("layer_types",), ("head_dim",), ("head_dim", "layer_types"), ("partial_rotary_factor",))
    for left_out in tries:
        with contextlib.suppress(Exception):
            return AutoConfig.for_model(
                model_type, **{name: size for name, size in sizes.items() if name not in left_out}
            )
    return AutoConfig.for_model(model_type, **sizes)


def small_model(model_type: str) -> PreTrainedModel | None:
    """A model with random weights, None where it would not be small."""
    config = small_config(model_type)
    with torch.device("meta"):
        if AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters() > LARGEST:
            return None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).float()
    for parameter in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def trainer_of(kind: type[SFTTrainer], model: Any, folder: str, lora: Any = None, **settings: Any) -> SFTTrainer:
    """Three steps of SGD, without checkpointing."""
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": RATE}
    options |= {"lr_scheduler_type": "constant", "gradient_checkpointing": False, **settings}
    config = ComLoRAConfig if kind is ComLoRASFTTrainer else SFTConfig
    given = {"train_dataset": make_dataset(12), "processing_class": make_tokenizer(), "peft_config": lora}
    if kind is ComLoRASFTTrainer:
        given["eval_dataset"] = make_dataset(3)
    return kind(model, config(**make_arguments(folder, **options)), **given)


def adapter(model: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """A copy of an adapter's weights."""
    own = {place: p for place, p in model.named_parameters() if f".{name}" in place and p.requires_grad}
    return {place.replace(f".{name}", ""): p.detach().clone() for place, p in own.items()}


def compare(base: PreTrainedModel, folder: str) -> tuple[str, str]:
    """Trains two branches, then each alone by TRL; a verdict, and what was found."""
    settings = {"comlora_k": 2, "comlora_selector": False, "comlora_branch_learning_rates": [RATE, RATE]}
    try:
        trainer = trainer_of(ComLoRASFTTrainer, copy.deepcopy(base), f"{folder}/ours", **settings)
        model = trainer.comlora_model
        starts = [adapter(model, f"branch_{branch}") for branch in range(2)]
        trainer.train()
    except Exception as error:
        verdict = "REFUSED" if trl_trains(base, f"{folder}/stock") else "nor by TRL"
        return verdict, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    worst = 0.0
    for branch, start in enumerate(starts):
        lora = copy.deepcopy(model.peft_config["branch_0"])
        alone = trainer_of(SFTTrainer, copy.deepcopy(base), f"{folder}/{branch}", lora)
        for place, parameter in alone.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(start[place.replace(".default", "")])
        alone.train()
        expected, own = adapter(alone.model, "default"), adapter(model, f"branch_{branch}")
        worst = max(worst, *((own[place] - value).abs().max().item() for place, value in expected.items()))
    PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/ours/winner")
    targets = ", ".join(sorted(model.peft_config["branch_0"].target_modules))
    return "as alone" if worst < TOLERANCE else "WRONG", f"{model.expansion.place}, {worst:.0e}, {targets}"


def trl_trains(base: PreTrainedModel, folder: str) -> bool:
    """Whether TRL's own trainer gets through."""
    try:
        trainer_of(SFTTrainer, base, folder, complete_lora_config(None, base)).train()
    except Exception:
        return False
    return True


def examine(model_type: str) -> tuple[str, str]:
    """A model type's verdict, and what was found."""
    signal.alarm(SECONDS)
    try:
        base = small_model(model_type)
        if base is None:
            return "not small", "its defaults stay large"
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            return compare(base, folder)
    except TimeoutError:
        return "too slow", f"over {SECONDS} s"
    except Exception as error:
        return "not made", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        signal.alarm(0)


def _give_up(*_: Any) -> None:
    raise TimeoutError


def main(model_types: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("comlora_trl").setLevel(logging.ERROR)
    disable_progress_bars()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _give_up)
    counts: Counter[str] = Counter()
    for model_type in model_types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdict, found = examine(model_type)
        counts[verdict] += 1
        print(f"{model_type:26} {verdict:10} {found}", flush=True)
    print(f"transformers {transformers.__version__}: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])

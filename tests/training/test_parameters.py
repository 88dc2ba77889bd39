"""The paper's parameter counts (Table 3), on a model without storage."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from comlora_trl.competition.selector import SelectorSettings
from comlora_trl.training.adapters import default_lora_config
from comlora_trl.training.model import ComLoRAModel
from comlora_trl.training.report import ParameterCounts, start_line

LAYERS, HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 32, 4096, 14336, 1024, 128256


def make_llama_3_8b(k: int, r: int, selector: SelectorSettings | None = None) -> ComLoRAModel:
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                num_hidden_layers=LAYERS,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=False,
            )
        )
        lora = default_lora_config(base)
        lora.r = r
        return ComLoRAModel(base, lora, k, selector)


def share(line: str, name: str) -> str:
    return re.search(rf"{name} [\d,]+ \(([\d.]+%)", line).group(1)


@pytest.mark.parametrize(
    "k, r, percent",
    [(1, 4, "0.09%"), (2, 4, "0.18%"), (2, 8, "0.35%"), (4, 8, "0.70%"), (4, 32, "2.74%")],
)
def test_adapters_of_table_3(k, r, percent):
    model = make_llama_3_8b(k, r)
    assert share(start_line(model, "torch", None), "adapters") == percent
    query, key_value = HIDDEN + HIDDEN, 2 * (HIDDEN + KEY_VALUE)
    feed_forward = 2 * (HIDDEN + INTERMEDIATE)
    counts = ParameterCounts.of(model)
    assert counts.adapters == k * r * LAYERS * (query + key_value + feed_forward)
    assert counts.base == 8_030_261_248 and counts.selector == 0


def test_start_line_with_the_default_selector():
    line = start_line(make_llama_3_8b(2, 8, SelectorSettings()), "torch", None)
    assert line.startswith("ComLoRA: K=2 branches of rank 8, all at once (torch kernels; the batch widens at")
    assert share(line, "adapters") == "0.35%"
    assert share(line, "selector") == "1.44%"


def test_default_rank_is_the_papers():
    with torch.device("meta"):
        lora = default_lora_config(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1)))
    assert lora.r == 8
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}

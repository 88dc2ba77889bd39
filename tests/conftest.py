"""A tiny model, tokenizer and data set, made on the spot: the suite runs offline and in seconds."""

import gc
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from reference import Row
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from comlora_trl.winner import files

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
CAN_RUN_TRITON = HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RATES = [5e-3, 1e-2, 2e-2, 4e-2]
TOURNAMENT = {"comlora_k": 4, "comlora_selector": False, "comlora_branch_learning_rates": RATES, "max_steps": 12}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers the slow files come first, so that no worker ends with one of them alone."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def exhaustive(*values: Any) -> list[Any]:
    """Values of a parameter that `.ci/run` leaves out; see the mark in `pyproject.toml`."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]


def selected(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """The values of a parameter that the module's selected tests have, for a fixture that runs them all at once."""
    own = [item for item in request.session.items if item.path == request.path]
    parameters = [item.callspec.params for item in own if hasattr(item, "callspec")]
    return list(dict.fromkeys(one[parameter] for one in parameters if parameter in one))


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> Iterator[None]:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    # accelerate collects garbage in every training, which would look at all that the imports made
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of the competition is a fifth of a test's training; the mark `pictures` keeps it."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(files, "_draw_competition", lambda folder: None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data of the paper's evaluations, where a checkout has it beside itself."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("COMLORA_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set COMLORA_TEST_DATA)")
    return folder


def make_model(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
    """A LLaMA of two layers and width 32, the same weights for the same seed."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **overrides}))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_dataset(rows: int = 64, seed: int = 0) -> Dataset:
    """Prompts to reverse a word, of ragged length."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 9))) for _ in range(rows)]
    return Dataset.from_list([{"prompt": f"reverse {word}:", "completion": f" {word[::-1]}"} for word in words])


def make_rows(unsupervised: tuple[int, ...] = (2,), lengths: tuple[int, ...] = (9, 5, 6, 12)) -> list[Row]:
    """Rows of ragged length for one batch, some of them without a supervised token."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 99, (length,), generator=draw).tolist()
        start = length if index in unsupervised else 2 + index
        rows.append(Row(ids, [-100] * start + ids[start:]))
    return rows


def collate(rows: list[Row], packed: bool = False, multiple: int | None = None) -> dict[str, Tensor]:
    """TRL's own collator, padded or padding-free."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed, pad_to_multiple_of=multiple)
    return collator([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])


def make_lora(**overrides: object) -> LoraConfig:
    """Rank 4 on the default targets."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **overrides})


def make_arguments(output_dir: Path | str, **overrides: object) -> dict[str, object]:
    """Arguments that TRL's and our configuration share: a few fast, quiet steps on the CPU."""
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return {**defaults, **overrides}


@pytest.fixture
def train(tmp_path: Path) -> Callable:
    """Trains a small competition and returns its trainer; each call has a folder of its own."""
    from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

    runs = []

    def run(double: bool = True, lora: dict | None = None, start: bool = True, trainer: dict | None = None, **args):
        model = make_model()
        runs.append(tmp_path / f"run-{len(runs)}")
        config = ComLoRAConfig(**make_arguments(runs[-1], **args))
        given = {
            "train_dataset": make_dataset(),
            "eval_dataset": make_dataset(13),
            "processing_class": make_tokenizer(),
            "peft_config": make_lora(**lora or {}),
        }
        given |= trainer or {}
        result = ComLoRASFTTrainer(model.double() if double else model, config, **given)
        if start:
            result.train()
        return result

    return run


class Float64LogProbabilities:
    """Stands in for TRL's log-probability kernel, which computes in float32 whatever the model's type."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        log_probs = logits.log_softmax(dim=-1)
        entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(dim=-1)
        chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        return chosen, entropy, None, None, logits.argmax(dim=-1) == targets


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 from end to end: also where TRL's LM head, LLaMA's norm and eager attention fall back to float32."""
    plain = torch.nn.functional.softmax

    def softmax(values: torch.Tensor, *args, dtype: torch.dtype | None = None, **kwargs) -> torch.Tensor:
        return plain(values, *args, dtype=None if values.dtype == torch.float64 else dtype, **kwargs)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", Float64LogProbabilities)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", norm)
    monkeypatch.setattr("torch.nn.functional.softmax", softmax)


def parameters(trainer: object) -> dict[str, torch.Tensor]:
    """What a trainer has trained: adapters and selector."""
    named = trainer.comlora_model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of parameters."""
    assert first.keys() == second.keys() and first
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels are forced; "traced" for the operations that `torch.compile` is shown in `branch_delta`."""
    if request.param == "traced":
        monkeypatch.setenv("COMLORA_KERNELS", "torch")
        monkeypatch.setattr("comlora_trl.branches.kernels.branches.is_compiling", lambda: True)
        return request.param
    if request.param == "triton" and not CAN_RUN_TRITON:
        pytest.skip("Triton's kernels need CUDA, or triton installed and TRITON_INTERPRET=1")
    monkeypatch.setenv("COMLORA_KERNELS", request.param)
    return request.param

"""The models, data and timers of `run.py`."""

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from shapes import LLAMA_8B, TARGETS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from comlora_trl.competition import CompetitionSettings
from comlora_trl.training.competition import Competition
from comlora_trl.training.model import ComLoRAModel

FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")  # as SFTTrainer asks for


@dataclass(frozen=True)
class Shape:
    """What is measured.

    Attributes:
        config: of the base model.
        tokens, supervised: tokens in a row, and how many of them (the last) are supervised.
        rows: rows a branch in the large batch; the small batch has a quarter.
        rounds: timed runs of each arm, after two for warm-up.
        device: where.
    """

    config: LlamaConfig
    tokens: int
    supervised: int
    rows: int
    rounds: int
    device: torch.device

    @classmethod
    def of(cls, layers: int | None, rounds: int) -> "Shape":
        """LLaMA-3-8B's shape on a GPU, a small one elsewhere."""
        if torch.cuda.is_available():
            config = LlamaConfig(**LLAMA_8B | {"num_hidden_layers": layers or LLAMA_8B["num_hidden_layers"]})
            return cls(config, 128, 8, 16, rounds, torch.device("cuda"))
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=448,
            num_hidden_layers=layers or 4,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
        return cls(config, 32, 8, 4, rounds, torch.device("cpu"))


class Bench:
    """One frozen base, and the models that share its weights."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        torch.manual_seed(0)
        with torch.device(shape.device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                self._base = LlamaForCausalLM(shape.config).requires_grad_(False)
            finally:
                torch.set_default_dtype(before)

    def base(self) -> LlamaForCausalLM:
        """A model of its own that shares the frozen weights."""
        shared = {id(t): t for t in (*self._base.parameters(), *self._base.buffers())}
        return copy.deepcopy(self._base, memo=shared).train()

    def lora_config(self, **changes: Any) -> LoraConfig:
        """r = 8 on q, k, v, up, down."""
        return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})

    def four_bit_base(self) -> LlamaForCausalLM:
        """The base with every linear layer but the head in bitsandbytes' nf4, computing in bfloat16."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        base = self.base()
        for parent in list(base.model.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    own = Linear4bit(
                        layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta"
                    )
                    own.compute_dtype, own.compute_type_is_set = torch.bfloat16, True
                    own.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                    setattr(parent, name, own.to(self.shape.device))  # which quantises it
        base.is_loaded_in_4bit = True
        return base

    def competing(self, k: int, base: LlamaForCausalLM | None = None, **lora: Any) -> ComLoRAModel:
        """K branches without a selector, ready to run."""
        base = base or self.base()
        add_fused_lm_head(base, outputs=FUSED_OUTPUTS)
        return with_delta(ComLoRAModel(base, self.lora_config(**lora), k)).train()

    def peft(self, base: LlamaForCausalLM | None = None) -> nn.Module:
        """A single PEFT LoRA."""
        base = base or self.base()
        add_fused_lm_head(base, outputs=FUSED_OUTPUTS)
        return with_delta(get_peft_model(base, self.lora_config())).train()

    def frozen(self) -> nn.Module:
        """The base alone."""
        base = self.base()
        add_fused_lm_head(base, outputs=FUSED_OUTPUTS)
        return base

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Random tokens, the last few supervised."""
        size = (rows, self.shape.tokens)
        ids = torch.randint(self.shape.config.vocab_size, size, device=self.shape.device)
        labels = ids.clone()
        labels[:, : -self.shape.supervised] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def frozen_step(self, model: nn.Module, rows: int) -> Callable[[], None]:
        """Forward and backward of the frozen model on `rows` rows, with gradients to the embeddings."""
        batch = self.batch(rows)
        ids = batch.pop("input_ids")

        def step() -> None:
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            self._backward(model(inputs_embeds=embeddings, fused_lm_head=True, **batch))

        return self._autocast(step)

    def lora_step(self, model: nn.Module, rows: int, **kwargs: Any) -> Callable[[], None]:
        """Forward and backward of an adapted model on a batch of `rows` rows."""
        batch, parameters = self.batch(rows), [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            self._backward(model(fused_lm_head=True, **batch, **kwargs))

        return self._autocast(step)

    def branch_step(self, model: ComLoRAModel, rows: int, chunk: int | None = None) -> Callable[[], None]:
        """[`lora_step`] of all branches, `rows` rows each."""
        competition = Competition(model, CompetitionSettings(k=model.k), chunk=chunk)
        return self.lora_step(model, rows, branch_pass=competition.branch_pass(eta=0.5))

    def _backward(self, output: Any) -> None:
        with torch.autocast(self.shape.device.type, enabled=False):
            (-output.log_probs.sum() / 100).backward()

    def _autocast(self, step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(self.shape.device.type, torch.bfloat16):
                step()

        return run

    def alternate(self, arms: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
        """Median milliseconds, spread and peak GiB of each arm; the arms take turns, each turn another one first.

        Each runs twice in its turn and the second run is timed. A GPU at its power limit runs the slower the harder
        it has just worked, so an arm's time would tell as much of the arm before it.
        """
        times: dict[str, list[float]] = {name: [] for name in arms}
        peaks = dict.fromkeys(arms, 0.0)
        for turn in range(self.shape.rounds + 2):
            for name in rotated(arms, turn):
                arms[name]()
                elapsed, peak = self._timed(arms[name])
                peaks[name] = max(peaks[name], peak)
                if turn >= 2:
                    times[name].append(elapsed)
        return {name: summary(values) | {"peak_gib": peaks[name]} for name, values in times.items()}

    def _timed(self, arm: Callable[[], Any]) -> tuple[float, float]:
        if self.shape.device.type != "cuda":
            start = time.perf_counter()
            arm()
            return 1e3 * (time.perf_counter() - start), 0.0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        arm()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), torch.cuda.max_memory_allocated() / 2**30


def rotated(arms: Iterable[str], turn: int) -> list[str]:
    """The arms' names, in each turn another one first."""
    names = [*arms]
    first = turn % len(names)
    return names[first:] + names[:first]


def summary(times: list[float]) -> dict[str, float]:
    """An arm's median milliseconds and their spread."""
    return {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def with_delta(model: nn.Module) -> nn.Module:
    """Gives every B random values, so that no product runs on zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model


@contextmanager
def forced_kernels(name: str) -> Iterator[None]:
    """`COMLORA_KERNELS` set to `name` for a while."""
    before = os.environ.get("COMLORA_KERNELS")
    os.environ["COMLORA_KERNELS"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["COMLORA_KERNELS"]
        else:
            os.environ["COMLORA_KERNELS"] = before


def release() -> None:
    """Gives freed memory back, so that one measurement does not weigh on the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""The host's work in one training step, counted: TRL's trainer and ours, on any machine.

    python benchmarks/host.py                  # 30 layers, 4 rows a step
    python benchmarks/host.py --layers 8 --output host.json

A small model's step is bound by the host, and a host's time differs by 10% from run to run. Counts do not. This script
counts calls of Python functions, calls of C functions from Python, and operators that PyTorch dispatches (views left
out), in the forward, the backward, the clipping and the optimizer. The step is an eager one on a CPU, so CUDA graphs
do not shorten it. The layers are narrow, because a count does not depend on the width.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import about
import torch
from datasets import Dataset
from peft import LoraConfig
from shapes import SMOLLM_135M, TARGETS
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import quiet, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

ARMS: dict[str, tuple[type[SFTTrainer], type[SFTConfig], dict[str, Any]]] = {
    "TRL, LoRA": (SFTTrainer, SFTConfig, {}),
    "K = 1": (ComLoRASFTTrainer, ComLoRAConfig, {"comlora_k": 1}),
    "tournament of 4, shared rows": (
        ComLoRASFTTrainer,
        ComLoRAConfig,
        {"comlora_k": 4, "comlora_branch_learning_rates": [1e-4, 2e-4, 4e-4, 8e-4], "comlora_rows": "shared"},
    ),
    "K = 4, no selector": (ComLoRASFTTrainer, ComLoRAConfig, {"comlora_k": 4, "comlora_selector": False}),
    "K = 4": (ComLoRASFTTrainer, ComLoRAConfig, {"comlora_k": 4}),
}
COUNTED_STEP = 3  # the first ones make the optimizer's state and compile kernels
NARROW = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


class CountOperators(TorchDispatchMode):
    """Counts what PyTorch dispatches, the autograd engine's too."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += not function.is_view
        return function(*args, **(kwargs or {}))


class CountStep(TrainerCallback):
    """Counts one step, from `on_step_begin` to `on_step_end`: calls in one run, operators in another.

    Either would count itself in the other.
    """

    def __init__(self, calls: bool) -> None:
        self.calls = calls
        self.counts: Counter[str] = Counter()
        self.mode = CountOperators()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 != COUNTED_STEP:
            return
        if self.calls:
            sys.setprofile(lambda frame, event, argument: self.counts.update([event]))
        else:
            self.mode.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != COUNTED_STEP:
            return
        if self.calls:
            sys.setprofile(None)
        else:
            self.mode.__exit__(None, None, None)
            self.counts["operator"] = self.mode.operators


def count(arm: str, layers: int, rows: int) -> dict[str, int]:
    """Calls and operators of one step of an arm."""
    trainer_class, config, settings = ARMS[arm]
    counts: Counter[str] = Counter()
    for calls in (True, False):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**{**SMOLLM_135M, **NARROW, "num_hidden_layers": layers}))
        ids = torch.randint(3, 99, (rows * (COUNTED_STEP + 1) + 8, 24)).tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        step = CountStep(calls)
        with tempfile.TemporaryDirectory() as folder, quiet():
            trainer_class(
                base,
                config(
                    output_dir=folder,
                    per_device_train_batch_size=rows,
                    max_steps=COUNTED_STEP + 1,  # the last one has the winner's selection in it
                    logging_steps=100,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                    dataset_kwargs={"skip_prepare_dataset": True},
                    **settings,
                ),
                train_dataset=data.select(range(len(data) - 8)),
                eval_dataset=data.select(range(len(data) - 8, len(data))),
                processing_class=tokenizer(),
                peft_config=LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
                callbacks=[step],
            ).train()
        counts += step.counts
    return {"python calls": counts["call"], "C calls": counts["c_call"], "operators": counts["operator"]}


def table(results: dict[str, dict[str, int]]) -> str:
    """A Markdown table."""
    lines = [
        "| a step | Python calls | C calls | operators | Python calls, relative to TRL |",
        "|---|---|---|---|---|",
    ]
    for arm, found in results.items():
        relative = found["python calls"] / results["TRL, LoRA"]["python calls"]
        lines.append(f"| {arm} | " + " | ".join(f"{value:,}" for value in found.values()) + f" | {relative:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SMOLLM_135M["num_hidden_layers"], help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=4, help="rows a step (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for the counts")
    options = parser.parse_args()
    results = {arm: count(arm, options.layers, options.rows) for arm in ARMS}
    print(table(results))
    if options.output:
        content = {"layers": options.layers, "rows": options.rows, "counts": results}
        content |= {"commit": about.commit(), "versions": about.versions()}
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

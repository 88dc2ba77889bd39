"""Replayed decoder layers against the layers as they are, on a GPU: loss, gradients, time and memory of a pass.

SmolLM2-135M's shape with random weights. In float32 the two must agree to rounding; in bfloat16 both are compared with
float32, and the replayed layers must not be farther from it than the layers as they are.

    python benchmarks/check_graphs.py --output check_graphs.json
"""

import argparse
import copy
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import FUSED_OUTPUTS, with_delta
from peft import LoraConfig
from shapes import SMOLLM_135M, TARGETS
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from comlora_trl.branches.batches import Rows
from comlora_trl.branches.graphs import CudaGraphs, LayerGraphs
from comlora_trl.training.graphing import compile_regionally
from comlora_trl.training.model import ComLoRAModel

DEVICE = torch.device("cuda")


def make(k: int, layers: int, dtype: torch.dtype) -> ComLoRAModel:
    torch.manual_seed(0)
    with DEVICE:
        base = LlamaForCausalLM(LlamaConfig(**{**SMOLLM_135M, "num_hidden_layers": layers})).to(dtype)
        add_fused_lm_head(base, outputs=FUSED_OUTPUTS)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        return with_delta(ComLoRAModel(base, lora, k)).train()


def batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SMOLLM_135M["vocab_size"], (rows, length), generator=draw)
    sizes = torch.randint(length - 60, length + 1, (rows,), generator=draw)
    mask = (torch.arange(length)[None] < sizes[:, None]).long()
    labels = ids.where((torch.arange(length)[None] >= sizes[:, None] - 16) & mask.bool(), torch.tensor(-100))
    own = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: value.to(DEVICE) for name, value in own.items()}


def one(model: ComLoRAModel, inputs: dict[str, Tensor], autocast: bool, dealt: bool) -> tuple[Tensor, list[Tensor]]:
    rows = Rows.of(inputs)
    weights = torch.ones(model.k, rows.count, device=DEVICE)
    living = [branch for branch in range(model.k) if f"branch_{branch}" in model.peft_config]
    owners = [living[line % len(living)] for line in range(rows.count)] if dealt else None
    parameters = [p for branch in living for p in model.branch_parameters(branch)]
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        own = {**inputs, "fused_lm_head": True, "use_cache": False}
        output = model.run_branches(own, rows, weights, None if dealt else living, owners=owners)
    loss = -output.log_probs.sum() / output.tokens.sum()
    loss.backward()
    return loss.detach(), [p.grad for p in parameters]


def error(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """Relative Frobenius errors of all gradients together, and the worst one's."""
    parts = [((a.double() - b.double()).norm(), b.double().norm()) for a, b in zip(found, expected, strict=True)]
    whole = torch.stack([d for d, _ in parts]).norm() / torch.stack([n for _, n in parts]).norm()
    return whole.item(), max((d / n.clamp(min=1e-30)).item() for d, n in parts)


def graphs_of(model: ComLoRAModel, said: list[str], compiled: bool = True) -> LayerGraphs:
    model.competing.graphs = LayerGraphs(
        model.competing,
        model.expansion.layers,
        CudaGraphs(DEVICE),
        said.append,
        compile_regionally if compiled else None,
    )
    return model.competing.graphs


def milliseconds(work: Any, turns: int = 10) -> float:
    times = []
    for _ in range(turns):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def exact(found: dict[str, Any], ways: tuple[str, ...] = ("k1", "k4", "k4 shared", "k4 checkpointing")) -> None:
    """Float32, few layers: every way to run against the layers as they are."""
    for name in ways:
        k, dealt, checkpointing = int(name[1]), "shared" in name, "checkpointing" in name
        padding = k > 1
        model, said = make(k, 4, torch.float32), []
        model.expansion.ignores_padding = padding
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batches = [batch(8, length, seed) for seed, length in enumerate((128, 128, 192, 128, 192, 192))]
        expected = [one(model, inputs, False, dealt) for inputs in batches]
        graphs = graphs_of(model, said)
        worst = []
        for inputs, (loss, gradients) in zip(batches, expected, strict=True):
            own, its = one(model, inputs, False, dealt)
            worst.append((abs((own - loss) / loss).item(), *error(its, gradients)))
        first = one(model, batches[0], False, dealt)
        held = one_forward(model, batches[0])  # its backward never comes: the next pass can't be replayed
        before = graphs.replays
        second = one(model, batches[0], False, dealt)
        eager_while_held = graphs.replays == before
        del held
        worst.append((abs((second[0] - first[0]) / first[0]).item(), *error(second[1], first[1])))
        if k > 1:
            model.drop_branch(1)
            kept, model.competing.graphs = model.competing.graphs, None
            alone = one(model, batches[0], False, False)
            model.competing.graphs = kept
            for _ in range(3):
                fewer = one(model, batches[0], False, False)
            worst.append((abs((fewer[0] - alone[0]) / alone[0]).item(), *error(fewer[1], alone[1])))
        result = {
            "captures": graphs.captures,
            "replays": graphs.replays,
            "seconds": graphs.capture_seconds,
            "eager while a forward is held": eager_while_held,
            "errors (loss, gradients, worst gradient)": worst,
            "said": said,
        }
        found[f"float32 {name}"] = result
        print(f"float32 {name}:", json.dumps(result), flush=True)


def one_forward(model: ComLoRAModel, inputs: dict[str, Tensor]) -> Any:
    rows = Rows.of(inputs)
    weights = torch.ones(model.k, rows.count, device=DEVICE)
    return model.run_branches({**inputs, "fused_lm_head": True, "use_cache": False}, rows, weights)


def half(found: dict[str, Any], layers: int) -> None:
    """Bfloat16, the whole model: both against float32; time and memory of a pass."""
    for name, k, rows, dealt in (("k1", 1, 32, False), ("k4", 4, 32, False), ("k4 shared", 4, 32, True)):
        single = make(k, layers, torch.float32)
        single.expansion.ignores_padding = True
        inputs = batch(rows, 256, 0)
        reference = copy.deepcopy([p.clone() for p in one(single, inputs, False, dealt)[1]])
        state = {n: p.detach().clone() for n, p in single.named_parameters()}
        del single
        torch.cuda.empty_cache()
        model, said = make(k, layers, torch.bfloat16), []
        model.load_state_dict({n: p for n, p in state.items()}, strict=False)
        del state
        result: dict[str, Any] = {}
        for way in ("as is", "without mask", "graphs"):
            model.expansion.ignores_padding = way != "as is"
            if way == "graphs":
                graphs_of(model, said)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(3):
                loss, gradients = one(model, inputs, True, dealt)
            result[way] = {"loss": loss.item(), "error": error(gradients, reference)}
            result[way]["ms"] = milliseconds(partial(one, model, inputs, True, dealt))
            result[way]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        graphs = model.competing.graphs
        result |= {"captures": graphs.captures, "seconds": graphs.capture_seconds, "said": said}
        for _ in range(2):
            one(model, batch(rows, 320, 1), True, dealt)
        result["seconds of two captures"] = graphs.capture_seconds
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            one(model, inputs, True, dealt)
            torch.cuda.synchronize()
        averages = sorted(profile.key_averages(), key=lambda own: -own.self_device_time_total)
        result["kernels"] = [[own.key[:90], own.count, own.self_device_time_total] for own in averages[:40]]
        result["busy_ms"] = sum(own.self_device_time_total for own in averages) / 1e3
        found[f"bfloat16 {name}"] = result
        print(f"bfloat16 {name}:", json.dumps({key: value for key, value in result.items() if key != "kernels"}))
        for key, count, micros in result["kernels"][:18]:
            print(f"   {micros / 1e3:8.2f} ms {count:5d} {key}", flush=True)
        model = graphs = gradients = reference = None
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=["exact", "half"], choices=["exact", "half", "checkpointing"])
    parser.add_argument("--output", default="check_graphs.json")
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__}
    for part in options.only:
        if part == "exact":
            exact(found)
        elif part == "checkpointing":
            exact(found, ("k4 checkpointing",))
        else:
            half(found, options.layers)
        Path(options.output).write_text(json.dumps(found))
    bad = [name for name, own in found.items() if isinstance(own, dict) and (own["said"] or not own["captures"])]
    print("not captured as meant: " + ", ".join(bad) if bad else "all captured")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

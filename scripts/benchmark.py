"""Measures what K branches cost, against the frozen model and TRL's SFTTrainer; prints a table and writes JSON.

On a GPU: LLaMA-3-8B's shape with random weights, bf16, q/k/v/up/down, r = 8, 128 tokens a row of which 8 supervised,
forward and backward; medians of alternating runs. Elsewhere a small shape, which shows that everything runs and no
more.

    python scripts/benchmark.py --output benchmark.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmark_cases import Bench, Shape, forced_kernels, release
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from comlora_trl import layer_groups
from comlora_trl.kernels import branch_delta, branch_linears, selected_kernels, stack_branches


class Results:
    """Rows of the table, and every figure behind them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    def row(self, name: str, value: float, goal: float, detail: str = "") -> None:
        self.rows.append({"row": name, "value": value, "goal": goal, "met": value <= goal, "detail": detail})

    def missing(self, name: str, reason: str) -> None:
        self.rows.append({"row": name, "value": None, "goal": None, "met": None, "detail": reason})


def check_gradients(bench: Bench, results: Results) -> None:
    """Output and gradients of every path against float64, and PEFT's products on the same input."""
    width, out_width, k, rows = bench.shape.config.hidden_size, bench.shape.config.intermediate_size // 2, 4, 4
    device = bench.shape.device
    torch.manual_seed(1)
    x = torch.randn(k * rows, bench.shape.tokens, width, device=device).bfloat16()
    weight = (torch.randn(out_width, width, device=device) / width**0.5).bfloat16()
    a = [torch.randn(8, width, device=device) / width**0.5 for _ in range(k)]
    b = [torch.randn(out_width, 8, device=device) for _ in range(k)]
    grad = torch.randn(*x.shape[:-1], out_width, device=device).bfloat16()

    def one_by_one(x: Tensor, a: list[Tensor], b: list[Tensor], weight: Tensor) -> Tensor:
        pairs = zip(x.chunk(k), a, b, strict=True)
        return torch.cat([F.linear(r, weight) + F.linear(F.linear(r, a_k), b_k) * 2.0 for r, a_k, b_k in pairs])

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, *a, *b)]
        w, g = weight.to(dtype or weight.dtype), grad.to(dtype or grad.dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is None):
            output = function(leaves[0], leaves[1 : 1 + k], leaves[1 + k :], w)
        return [output.detach(), *torch.autograd.grad(output, leaves, g)]

    def fused(x: Tensor, a: list[Tensor], b: list[Tensor], weight: Tensor) -> Tensor:
        [stacked] = stack_branches([[[m] for m in a]], [[[m] for m in b]], 2.0, x.dtype)
        return branch_linears(x, [weight], [None], stacked.a, stacked.b)[0]

    def delta(x: Tensor, a: list[Tensor], b: list[Tensor], weight: Tensor) -> Tensor:
        [stacked] = stack_branches([[[m] for m in a]], [[[m] for m in b]], 2.0, x.dtype)
        return branch_delta(x, F.linear(x, weight), stacked.a, *stacked.b)

    expected = run(one_by_one, torch.float64)

    def errors(found: list[Tensor]) -> dict[str, float]:
        each = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]
        return {"output": each[0], "dx": each[1], "dA": max(each[2 : 2 + k]), "dB": max(each[2 + k :])}

    paths = {"peft": errors(run(one_by_one))}
    for path in ("torch", "triton") if device.type == "cuda" else ("torch",):
        with forced_kernels(path):
            paths[f"{path}, fused base"], paths[f"{path}, delta"] = errors(run(fused)), errors(run(delta))
    results.figures["gradient_errors"] = paths
    for name, found in paths.items():
        worst = max(found[key] / paths["peft"][key] for key in found)
        if name != "peft":
            detail = ", ".join(f"{key} {value:.1e}" for key, value in found.items())
            results.row(f"error against float64 / PEFT's: {name}", worst, 1.02, detail)


def floors(bench: Bench, results: Results) -> None:
    """K = 4 against the frozen model on four times the rows, and what else that shape can be compared with."""
    large = bench.shape.rows
    frozen, four, single = bench.frozen(), bench.competing(4), bench.peft()
    for rows, checkpointing, goal in ((large, False, 1.04), (large // 4, False, 1.06), (large, True, 1.08)):
        for model in (frozen, four.get_base_model(), single.get_base_model()):
            model.gradient_checkpointing_disable()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        arms = {"floor": bench.floor_step(frozen, 4 * rows), "peft": bench.lora_step(single, rows)}
        step = bench.branch_step(four, rows)
        for path in _paths(bench):
            arms[path] = _forced(step, path)
        name = f"{rows} rows" + (", checkpointing" if checkpointing else "")
        found = results.figures[f"K=4, {name}"] = bench.alternate(arms)
        chosen = found[selected_kernels(bench.shape.device)]
        detail = "; ".join(f"{arm} {one['ms']:.0f} ms, {one['peak_gib']:.1f} GiB" for arm, one in found.items())
        results.row(f"K=4 / floor, {name}", chosen["ms"] / found["floor"]["ms"], goal, detail)


def dropout(bench: Bench, results: Results) -> None:
    """LoRA dropout."""
    arms = {}
    for p in (0.0, 0.05):
        step = bench.branch_step(bench.competing(4, lora_dropout=p), bench.shape.rows)
        arms |= {f"{p} {path}": _forced(step, path) for path in _paths(bench)}
    found = results.figures["dropout"] = bench.alternate(arms)
    path = selected_kernels(bench.shape.device)
    detail = "; ".join(f"{arm} {one['ms']:.0f} ms" for arm, one in found.items())
    results.row("dropout 0.05 / none, K=4", found[f"0.05 {path}"]["ms"] / found[f"0.0 {path}"]["ms"], 1.03, detail)


def many_branches(bench: Bench, results: Results) -> None:
    """K = 8 against K = 1 on as many rows: time, and kernels launched."""
    rows = 4 * bench.shape.rows
    steps = {k: bench.branch_step(bench.competing(k), rows // k) for k in (1, 8)}
    found = results.figures["K=8, K=1"] = bench.alternate({f"K={k}": step for k, step in steps.items()})
    detail = "; ".join(f"{arm} {one['ms']:.0f} ms" for arm, one in found.items())
    results.row("K=8 / K=1, same rows in all", found["K=8"]["ms"] / found["K=1"]["ms"], 1.03, detail)
    if bench.shape.device.type != "cuda":
        results.missing("kernels launched, K=8 / K=1", "needs a GPU")
        return
    counts = {}
    for k, step in steps.items():
        with torch.profiler.profile(activities=_profiled()) as profile:
            step()
            torch.cuda.synchronize()
        averages = profile.key_averages()
        # a stack of one tensor is a copy, of several a kernel: both are work launched on the device
        counts[k] = [sum(one.count for one in averages if part in one.key) for part in ("LaunchKernel", "Memcpy DtoD")]
        by_time = sorted(averages, key=lambda one: -one.self_device_time_total)[:60]
        results.figures[f"profile K={k}"] = {one.key: [one.count, one.self_device_time_total] for one in by_time}
    detail = "; ".join(f"K={k}: {kernels} kernels, {copies} copies" for k, (kernels, copies) in counts.items())
    results.row("kernels launched, K=8 / K=1", counts[8][0] / counts[1][0], 1.0, detail)


def saved_bytes(bench: Bench, results: Results) -> None:
    """What the adapted layers keep for the backward pass, each storage once, weights apart."""
    model, rows = bench.competing(4), bench.shape.rows
    saved: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    thin = 0

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    original = layer_groups.kernels.branch_linears

    def watched(x: Tensor, frozen: list[Tensor], biases: list[Any], a: Tensor, b: list[Tensor], p: float) -> Any:
        nonlocal thin
        weights.update(t.untyped_storage().data_ptr() for t in (a, *b))
        inputs[x.untyped_storage().data_ptr()] = x
        thin += 2 * x.numel() // x.size(-1) * a.size(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return original(x, frozen, biases, a, b, p)

    layer_groups.kernels.branch_linears = watched
    try:
        bench.branch_step(model, rows)()
    finally:
        layer_groups.kernels.branch_linears = original
    found = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    least = sum(2 * tensor.numel() for tensor in inputs.values()) + thin
    detail = f"{found / 2**30:.3f} / {least / 2**30:.3f} GiB"
    results.row("bytes saved by adapted layers / (inputs + xA)", found / least, 1.05, detail)


def chunk_memory(bench: Bench, results: Results) -> None:
    """Peak memory of one branch at a time."""
    if bench.shape.device.type != "cuda":
        results.missing("peak memory, branch_chunk=1 / a single PEFT LoRA", "needs a GPU")
        return
    peaks = {}
    for name in ("peft", "chunk 1"):
        rows = bench.shape.rows
        if name == "peft":
            step = bench.lora_step(bench.peft(), rows)
        else:
            step = bench.branch_step(bench.competing(4), rows, chunk=1)
        peaks[name] = bench.alternate({name: step})[name]["peak_gib"]
        del step
        release()
    detail = "; ".join(f"{name} {peak:.2f} GiB" for name, peak in peaks.items()) + "; forward and backward"
    results.row("peak memory, branch_chunk=1 / a single PEFT LoRA", peaks["chunk 1"] / peaks["peft"], 1.03, detail)


def trainer_steps(bench: Bench, results: Results) -> None:
    """Whole trainer steps against TRL's, optimizer, logging and collation included."""
    large = bench.shape.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rows, goal in ((large, 0.75), (large // 4, 0.30)):
            trainers = {
                "TRL": bench.trainer("trl", rows, folder),
                "K=4": bench.trainer("comlora", rows, folder, comlora_k=4),
                "K=4, no selector": bench.trainer("comlora", rows, folder, comlora_k=4, comlora_selector=False),
                "K=1, no selector": bench.trainer("comlora", rows, folder, comlora_k=1, comlora_selector=False),
            }
            found = results.figures[f"trainer steps, {rows} rows"] = bench.alternate_trainers(trainers)
            ms = {arm: one["ms"] for arm, one in found.items()}
            detail = "; ".join(f"{arm} {value:.0f} ms" for arm, value in ms.items())
            results.row(f"K=4 trainer step / (4 x TRL's), {rows} rows", ms["K=4"] / (4 * ms["TRL"]), goal, detail)
            results.row(f"K=1 without selector / TRL step, {rows} rows", ms["K=1, no selector"] / ms["TRL"], 0.92)
            share = 1 - ms["K=4, no selector"] / ms["K=4"]
            results.row(f"selector's share of the step, {rows} rows", share, 0.02)
            del trainers
            release()


def upper_half(bench: Bench, results: Results) -> None:
    """Adapters on the upper half only: the lower half runs once on B rows."""
    layers = bench.shape.config.num_hidden_layers
    upper = list(range(layers // 2, layers))
    rows, models = bench.shape.rows, [bench.competing(4, layers_to_transform=upper) for _ in range(3)]
    late, whole, frozen_below = models
    whole.expansion.start = frozen_below.expansion.start = None  # expand the model's inputs
    whole.get_base_model().get_input_embeddings().register_forward_hook(lambda *seen: seen[-1].requires_grad_())
    names = ("late", "full, gradients to the embeddings as in the floor", "full, no gradient below")
    arms = {
        name: bench.branch_step(model, rows) for name, model in zip(names, (late, whole, frozen_below), strict=True)
    }
    found = results.figures["upper half"] = bench.alternate(arms)
    detail = "; ".join(f"{arm} {one['ms']:.0f} ms, {one['peak_gib']:.1f} GiB" for arm, one in found.items())
    ratio = found["late"]["ms"] / found[names[1]]["ms"]
    results.row("adapters on the upper half, K=4 / full expansion", ratio, 0.65, detail)


SECTIONS = (
    check_gradients,
    floors,
    trainer_steps,
    dropout,
    many_branches,
    saved_bytes,
    chunk_memory,
    upper_half,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="decoder layers (32 on a GPU)")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each arm")
    parser.add_argument("--output", default="benchmark.json", help="JSON file to write")
    parser.add_argument("--only", nargs="*", help="names of sections", choices=[s.__name__ for s in SECTIONS])
    arguments = parser.parse_args()
    console, start = Console(width=None if sys.stdout.isatty() else 180), time.perf_counter()
    shape = Shape.of(arguments.layers, arguments.rounds)
    if shape.device.type != "cuda":
        console.print("No GPU here: a small shape on the CPU, whose figures say nothing about speed.")
    results = Results()
    results.figures["environment"] = _environment(shape)
    bench = Bench(shape)
    for section in SECTIONS:
        if arguments.only and section.__name__ not in arguments.only:
            continue
        begun = time.perf_counter()
        try:
            section(bench, results)
        except Exception as error:  # the other sections still count
            traceback.print_exc()
            results.missing(section.__name__, f"failed: {type(error).__name__}: {error}"[:200])
        release()
        console.print(f"{section.__name__}: {time.perf_counter() - begun:.0f} s", highlight=False)
        _write(results, arguments.output)
    console.print(_table(results, shape))
    console.print(f"{time.perf_counter() - start:.0f} s in all; every figure in {arguments.output}", highlight=False)
    return 1 if any("failed" in row["detail"] for row in results.rows) else 0


def _paths(bench: Bench) -> tuple[str, ...]:
    return ("torch", "triton") if bench.shape.device.type == "cuda" else ("torch",)


def _forced(step: Callable[[], None], path: str) -> Callable[[], None]:
    def run() -> None:
        with forced_kernels(path):
            step()

    return run


def _profiled() -> list[Any]:
    return [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]


def _environment(shape: Shape) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "accelerate")}
    cuda = shape.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "commit": commit or os.environ.get("GIT_COMMIT", "unknown"),
        "layers": shape.config.num_hidden_layers,
        "rows": shape.rows,
        "tokens": shape.tokens,
        "kernels": selected_kernels(shape.device),
        "cuda": torch.version.cuda,
        "triton": version("triton") if cuda else None,
        **packages,
    }


def _table(results: Results, shape: Shape) -> Table:
    environment = results.figures["environment"]
    table = Table(title=", ".join(f"{key} {value}" for key, value in environment.items()))
    for column in ("", "measured", "goal", "verdict", "detail"):
        table.add_column(column, overflow="fold")
    for row in results.rows:
        if row["value"] is None:
            table.add_row(row["row"], "", "", "not measured", row["detail"])
        else:
            verdict = ("met" if row["met"] else "not met") if shape.device.type == "cuda" else "no GPU"
            table.add_row(row["row"], f"{row['value']:.3f}", f"{row['goal']:.2f}", verdict, row["detail"])
    return table


def _write(results: Results, output: str) -> None:
    content = {"rows": results.rows, "figures": results.figures}
    Path(output).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

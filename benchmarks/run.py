"""Measures what K branches cost, against the frozen model and TRL's SFTTrainer; prints a table and writes JSON.

On a GPU: LLaMA-3-8B's shape with random weights, bf16, q/k/v/up/down, r = 8, 128 tokens a row of which 8 supervised,
forward and backward; medians of alternating runs. Elsewhere a small shape, which shows that everything runs and no
more.

    python benchmarks/run.py --output benchmark.json
"""

import argparse
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy import check_gradients
from cases import Bench, Shape, forced_kernels, release
from report import Results
from rich.console import Console
from stacked import stacked_parameters
from torch import Tensor
from tournament import tournaments
from trainers import alternate_trainers, make_trainer

from comlora_trl.branches import layers
from comlora_trl.branches.kernels import selected_kernels
from comlora_trl.branches.passes import INPUTS


def against_frozen(bench: Bench, results: Results) -> None:
    """K = 4 against the frozen model on four times the rows, and what else that shape can be compared with."""
    large = bench.shape.rows
    frozen, four, single = bench.frozen(), bench.competing(4), bench.peft()
    for rows, checkpointing, goal in ((large, False, 1.04), (large // 4, False, 1.06), (large, True, 1.08)):
        for model in (frozen, four.get_base_model(), single.get_base_model()):
            model.gradient_checkpointing_disable()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        arms = {
            "frozen model": bench.frozen_step(frozen, 4 * rows),
            "K=4": bench.branch_step(four, rows),
            "single PEFT LoRA": bench.lora_step(single, rows),
        }
        name = f"{rows} rows" + (", checkpointing" if checkpointing else "")
        found = results.figures[f"K=4, {name}"] = bench.alternate(arms)
        detail = "; ".join(f"{arm} {one['ms']:.0f} ms, {one['peak_gib']:.1f} GiB" for arm, one in found.items())
        results.row(f"K=4 / frozen model, {name}", found["K=4"]["ms"] / found["frozen model"]["ms"], goal, detail)


def compiled(bench: Bench, results: Results) -> None:
    """The small batch with every decoder layer compiled, the frozen model's too: fewer launches by the host."""
    if bench.shape.device.type != "cuda":
        results.missing("K=4 / frozen model, compiled layers", "needs a GPU")
        return
    rows, frozen, four = bench.shape.rows // 4, bench.frozen(), bench.competing(4)
    for model in (frozen, four.get_base_model()):
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    arms = {"frozen model": bench.frozen_step(frozen, 4 * rows), "K=4": bench.branch_step(four, rows)}
    found = results.figures["compiled layers"] = bench.alternate(arms)
    detail = "; ".join(f"{arm} {one['ms']:.0f} ms" for arm, one in found.items())
    seen = torch._dynamo.utils.counters
    detail += f"; {seen['stats']['unique_graphs']} graphs, {seen['graph_break'].total()} graph breaks in all"
    name = f"K=4 / frozen model, {rows} rows, both with compiled decoder layers"
    results.row(name, found["K=4"]["ms"] / found["frozen model"]["ms"], None, detail)


def dropout(bench: Bench, results: Results) -> None:
    """LoRA dropout."""
    none, some = (bench.branch_step(bench.competing(4, lora_dropout=p), bench.shape.rows) for p in (0.0, 0.05))
    arms = {"none": none} | {path: _forced(some, path) for path in _paths(bench)}
    found = results.figures["dropout"] = bench.alternate(arms)
    detail = "; ".join(f"{arm} {one['ms']:.0f} ms" for arm, one in found.items())
    ratio = found[selected_kernels(bench.shape.device, 0.05)]["ms"] / found["none"]["ms"]
    results.row("dropout 0.05 / none, K=4", ratio, 1.03, detail)


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
    original = layers.kernels.branch_linears

    def watched(x: Tensor, frozen: list[Tensor], biases: list[Any], a: Tensor, b: list[Tensor], p: float) -> Any:
        nonlocal thin
        weights.update(t.untyped_storage().data_ptr() for t in (a, *b))
        inputs[x.untyped_storage().data_ptr()] = x
        thin += 2 * x.numel() // x.size(-1) * a.size(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return original(x, frozen, biases, a, b, p)

    layers.kernels.branch_linears = watched
    try:
        bench.branch_step(model, rows)()
    finally:
        layers.kernels.branch_linears = original
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
                "TRL": make_trainer(bench, "trl", rows, folder),
                "K=4": make_trainer(bench, "comlora", rows, folder, comlora_k=4),
                "K=4, no selector": make_trainer(bench, "comlora", rows, folder, comlora_k=4, comlora_selector=False),
                "K=1, no selector": make_trainer(bench, "comlora", rows, folder, comlora_k=1, comlora_selector=False),
            }
            found = results.figures[f"trainer steps, {rows} rows"] = alternate_trainers(bench.shape.device, trainers)
            ms = {arm: one["ms"] for arm, one in found.items()}
            detail = "; ".join(f"{arm} {value:.0f} ms" for arm, value in ms.items())
            results.row(f"K=4 trainer step / (4 x TRL's), {rows} rows", ms["K=4"] / (4 * ms["TRL"]), goal, detail)
            results.row(f"K=1 without selector / TRL's step, {rows} rows", ms["K=1, no selector"] / ms["TRL"], 0.92)
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
    whole.expansion.place = frozen_below.expansion.place = INPUTS
    whole.get_base_model().get_input_embeddings().register_forward_hook(lambda *seen: seen[-1].requires_grad_())
    names = ("late", "full, gradients to the embeddings as in the frozen model", "full, no gradient below")
    arms = {
        name: bench.branch_step(model, rows) for name, model in zip(names, (late, whole, frozen_below), strict=True)
    }
    found = results.figures["upper half"] = bench.alternate(arms)
    detail = "; ".join(f"{arm} {one['ms']:.0f} ms, {one['peak_gib']:.1f} GiB" for arm, one in found.items())
    ratio = found["late"]["ms"] / found[names[1]]["ms"]
    results.row("adapters on the upper half, K=4 / full expansion", ratio, 0.65, detail)


def four_bit(bench: Bench, results: Results) -> None:
    """K = 4 on a 4-bit base against four of PEFT's LoRA on it (QLoRA), one after the other."""
    name = "K=4 / (4 x PEFT's QLoRA), nf4 base"
    if importlib.util.find_spec("bitsandbytes") is None:
        results.missing(name, "needs bitsandbytes")
        return
    single, four = bench.peft(bench.four_bit_base()), bench.competing(4, bench.four_bit_base())
    for rows in (bench.shape.rows, bench.shape.rows // 4):
        arms = {"PEFT": bench.lora_step(single, rows), "K=4": bench.branch_step(four, rows)}
        found = results.figures[f"nf4 base, {rows} rows"] = bench.alternate(arms)
        detail = "; ".join(f"{arm} {one['ms']:.0f} ms, {one['peak_gib']:.1f} GiB" for arm, one in found.items())
        results.row(f"{name}, {rows} rows", found["K=4"]["ms"] / (4 * found["PEFT"]["ms"]), None, detail)


SECTIONS = (
    check_gradients,
    against_frozen,
    compiled,
    trainer_steps,
    dropout,
    many_branches,
    saved_bytes,
    chunk_memory,
    upper_half,
    four_bit,
    stacked_parameters,
    tournaments,
)
GROUPS = {"steps": (trainer_steps,), "tournament": (tournaments,)}
GROUPS["kernels"] = tuple(section for section in SECTIONS if section not in (trainer_steps, tournaments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="decoder layers (32 on a GPU)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each arm")
    parser.add_argument("--output", default="benchmark.json", help="JSON file to write")
    names = [*GROUPS, *(section.__name__ for section in SECTIONS)]
    parser.add_argument("--only", nargs="*", help="names of sections, or of groups of them", choices=names)
    arguments = parser.parse_args()
    console, start = Console(width=None if sys.stdout.isatty() else 180), time.perf_counter()
    shape = Shape.of(arguments.layers, arguments.rounds)
    if shape.device.type != "cuda":
        console.print("No GPU here: a small shape on the CPU, whose figures say nothing about speed.")
    results, bench = Results(shape, arguments.output), Bench(shape)
    wanted = set(arguments.only or (section.__name__ for section in SECTIONS))
    wanted |= {section.__name__ for group in wanted & GROUPS.keys() for section in GROUPS[group]}
    for section in SECTIONS:
        if section.__name__ not in wanted:
            continue
        begun = time.perf_counter()
        try:
            section(bench, results)
        except Exception as error:  # the other sections still count
            traceback.print_exc()
            results.missing(section.__name__, f"failed: {type(error).__name__}: {error}"[:200])
        release()
        console.print(f"{section.__name__}: {time.perf_counter() - begun:.0f} s", highlight=False)
        results.write()
    console.print(results.table())
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


if __name__ == "__main__":
    sys.exit(main())

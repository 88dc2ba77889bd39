"""Whole training runs of a small model: TRL's trainer beside ours, each in a process of its own; writes JSON.

SmolLM2-135M's shape with random weights (or an 8B's, `--shape 8b`), bf16, LoRA of rank 8 on q, k, v, up and down,
synthetic rows as long as CONVAI2's (up to 320 tokens, of which the reply's 8 to 24 are supervised), without
checkpointing. In DPO a pair is two such rows with the same prompt. A run counts from `train()` to its end, with the
winner's export. Needs a GPU; `--shape tiny` shows elsewhere that everything runs.

    python benchmarks/small.py --rows 32 --output small.json
    python benchmarks/small.py --arms k1 tournament --rotations 2 --warm --output warm.json
    python benchmarks/small.py --arms trl_dpo dpo_tournament dpo_k4 --output dpo.json
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shapes import LLAMA_8B, SMOLLM_135M, TARGETS

ARMS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl_compiled": {"torch_compile": True, "pad_to_multiple_of": 64},
    "k1": {"comlora_k": 1, "comlora_selector": False},
    "k1_without_graphs": {"comlora_k": 1, "comlora_selector": False, "comlora_graphs": False},
    "tournament": {"comlora_tournament": True},
    "k4": {"comlora_k": 4, "comlora_selector": False},
    "k4_selector": {"comlora_k": 4},
    "k4_without_graphs": {"comlora_k": 4, "comlora_selector": False, "comlora_graphs": False},
    "trl_liger": {"use_liger_kernel": True},
    "trl_dpo": {},
    "dpo_k1": {"comlora_k": 1},
    "dpo_tournament": {"comlora_tournament": True},
    "dpo_k4": {"comlora_k": 4},
    "dpo_k4_chunked": {"comlora_k": 4, "comlora_branch_chunk": 2},
    "dpo_tournament_without_graphs": {"comlora_tournament": True, "comlora_graphs": False},
}
DEFAULT = ("trl", "k1", "tournament", "k4", "k4_selector")
LENGTH = {"max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": SMOLLM_135M | LENGTH,
    "8b": LLAMA_8B | LENGTH,
    "8b_8": LLAMA_8B | LENGTH | {"num_hidden_layers": 8},
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **LENGTH,
    },
}


PROFILED = 5  # steps that the profiler watches


def run(
    arm: str,
    shape: str,
    rows: int,
    steps: int,
    validation: int,
    longest: int,
    profiled: bool = False,
    folder: Path | None = None,
) -> dict[str, Any]:
    """One arm's run in this process.

    Args:
        profiled: whether the profiler watches some steps, which it makes slower.
        folder: where to say that the run is ready, and to wait for its turn.
    """
    import about
    import torch
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from comlora_trl import ComLoRAConfig, ComLoRADPOConfig, ComLoRADPOTrainer, ComLoRASFTTrainer

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with device:
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    vocabulary = SHAPES[shape]["vocab_size"]

    class Profile(TrainerCallback):
        """Watches some steps of the second half."""

        def __init__(self, steps: int) -> None:
            kinds = torch.profiler.ProfilerActivity
            self.first = max(0, min(2 * steps // 3, steps - PROFILED))
            self.profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])

        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == self.first:
                self.profiler.start()

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == self.first + PROFILED:
                if on_gpu:
                    torch.cuda.synchronize()
                self.profiler.stop()

        def found(self) -> dict[str, Any]:
            averages = self.profiler.key_averages()
            # an operator's device time is that of its kernels, which are listed by themselves as well
            kernels = [own for own in averages if own.device_type != torch.autograd.DeviceType.CPU]
            on_device = sorted(kernels, key=lambda own: -own.self_device_time_total)
            on_host = sorted(averages, key=lambda own: -own.self_cpu_time_total)
            return {
                "gpu_busy_ms": sum(own.self_device_time_total for own in kernels) / 1e3 / PROFILED,
                "host_ms": sum(own.self_cpu_time_total for own in averages) / 1e3 / PROFILED,
                "on_gpu": [(own.key[:90], own.count, own.self_device_time_total) for own in on_device[:25]],
                "on_host": [(own.key[:90], own.count, own.self_cpu_time_total) for own in on_host[:25]],
            }

    class Timer(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    trl, preferences = arm.startswith("trl"), "dpo" in arm
    config, trainer_class = {
        (True, False): (SFTConfig, SFTTrainer),
        (False, False): (ComLoRAConfig, ComLoRASFTTrainer),
        (True, True): (DPOConfig, DPOTrainer),
        (False, True): (ComLoRADPOConfig, ComLoRADPOTrainer),
    }[trl, preferences]
    make, lines = (pairs, rows // 2) if preferences else (data, rows)
    with tempfile.TemporaryDirectory() as output:
        args = config(
            output_dir=output,
            per_device_train_batch_size=lines,
            max_steps=steps,
            logging_steps=10,
            learning_rate=1e-4,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({} if preferences else {"dataset_kwargs": {"skip_prepare_dataset": True}}),
            **ARMS[arm],
        )
        trainer = trainer_class(
            base,
            args=args,
            train_dataset=make(lines * steps, vocabulary, longest, 0),
            eval_dataset=make(validation, vocabulary, longest, 1),
            processing_class=tokenizer(vocabulary if preferences else 0),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
        )
        trainer.remove_callback(PrinterCallback)
        if profiled:
            trainer.add_callback(profile := Profile(steps))
        timer, selections, averages = Timer(), [], []  # seconds of rungs and selections, retirement included
        trainer.add_callback(timer)
        if not trl:
            # without a rung, `reach_rung` only averages the weights
            rungs = timed(trainer, "reach_rung", on_gpu, averages, lambda: trainer.competition.rung is None)
            selections = [rungs, timed(trainer, "select", on_gpu)]
        printed = io.StringIO()
        if folder is not None:
            (folder / "ready").touch()
            while not (folder / "go").exists():
                time.sleep(0.2)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with contextlib.redirect_stdout(printed):
            trainer.train()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    marks = [start, *timer.marks]
    times = [1e3 * (later - earlier) for earlier, later in zip(marks, marks[1:], strict=False)]
    late = times[len(times) // 2 :]
    found: dict[str, Any] = {
        **about.origin(),
        "arm": arm,
        "shape": shape,
        "rows": rows,
        "steps": steps,
        "seconds": seconds,
        "step_ms": statistics.median(late),
        "step_ms_all": statistics.median(times),
        "slowest_after_ten_ms": max(times[10:], default=0.0),
        "over_three_medians_after_ten": sum(one > 3 * statistics.median(late) for one in times[10:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
        "averages_s": sum(averages),
        "selections_s": [round(one, 3) for kind in selections for one in kind if one > 1e-3],
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "times_ms": [round(one, 1) for one in times],
        "said": [line for line in printed.getvalue().splitlines() if "comlora_graphs" in line or "padded" in line],
    }
    if profiled:
        found["profile"] = profile.found()
    if not trl and trainer.comlora_model.competing.graphs is not None:
        graphs = trainer.comlora_model.competing.graphs
        found |= {"captures": graphs.captures, "replays": graphs.replays, "capture_s": graphs.capture_seconds}
    return found


def timed(
    owner: Any,
    name: str,
    on_gpu: bool,
    others: list[float] | None = None,
    is_other: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Seconds of each call of a method, from now on.

    Args:
        owner, name: the method.
        on_gpu: whether to wait for the GPU.
        others: a list for the seconds of calls before which `is_other` is true. The result does not have them.
        is_other: tells one kind of calls from the other.
    """
    import torch

    original, seconds = getattr(owner, name), []

    def measured(*args: Any, **kwargs: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        into = others if is_other() else seconds
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            if on_gpu:
                torch.cuda.synchronize()
            into.append(time.perf_counter() - start)

    setattr(owner, name, measured)
    return seconds


def data(rows: int, vocabulary: int, longest: int, seed: int) -> Any:
    """Rows of random tokens, as long as CONVAI2's prompts and replies."""
    from datasets import Dataset

    draw = random.Random(seed)
    ids, labels = [], []
    for _ in range(rows):
        reply = draw.randint(8, 24)
        prompt = min(longest - reply, max(40, int(draw.gauss(170, 60))))
        tokens = [draw.randrange(3, vocabulary) for _ in range(prompt + reply)]
        ids.append(tokens)
        labels.append([-100] * prompt + tokens[prompt:])
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def pairs(rows: int, vocabulary: int, longest: int, seed: int) -> Any:
    """Pairs of replies of random words to a prompt of random words, as long as the rows of `data`."""
    from datasets import Dataset

    draw = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(count))

    columns: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for _ in range(rows):
        reply = draw.randint(8, 24)
        columns["prompt"].append(words(min(longest - reply, max(40, int(draw.gauss(170, 60))))) + " ")
        columns["chosen"].append(words(reply - 1))
        columns["rejected"].append(words(draw.randint(8, reply) - 1))
    return Dataset.from_dict(columns)


def tokenizer(words: int = 0) -> Any:
    """A tokenizer with the special tokens that a trainer asks for, and words w3, w4, … up to a number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>"])}
    vocabulary |= {f"w{index}": index for index in range(3, words)}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", default=list(DEFAULT), choices=list(ARMS))
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=32, help="rows of a step; in DPO two make a pair")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--validation", type=int, default=120, help="rows of the validation set")
    parser.add_argument("--longest", type=int, default=320, help="tokens of the longest row")
    parser.add_argument("--rotations", type=int, default=1, help="runs of each arm")
    parser.add_argument("--warm", action="store_true", help="an arm's later runs find its compilers' caches filled")
    parser.add_argument("--output", default="small.json")
    parser.add_argument("--queue", nargs="*", default=[], help="runs as ARM:SHAPE:ROWS:STEPS, in this order")
    parser.add_argument("--profile", action="store_true", help="also profile some steps of each run (in the JSON)")
    parser.add_argument("--ahead", action="store_true", help="all processes prepare at once; they still run in turn")
    parser.add_argument("--one", help=argparse.SUPPRESS, choices=list(ARMS))
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.shape, options.rows, options.steps, options.validation, options.longest, options.profile)
    if options.one:
        place = Path(options.place)
        try:
            (place / "found").write_text(json.dumps(run(options.one, *sizes, folder=place)))
        except BaseException:
            (place / "failed").touch()
            raise
        return 0
    queue = [entry.split(":") for entry in options.queue] or [
        (arm, options.shape, options.rows, options.steps)
        for turn in range(options.rotations)
        for arm in rotated(options.arms, turn)
    ]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        waiting: list[tuple[str, bool, Path, Any]] = []
        for number, (arm, shape, rows, steps) in enumerate(queue):
            place = Path(folder) / str(number)
            place.mkdir()
            command = [sys.executable, __file__, "--one", arm, "--shape", shape, "--rows", str(rows)]
            command += ["--steps", str(steps), "--validation", str(options.validation)]
            command += ["--longest", str(options.longest), "--place", str(place)]
            command += ["--profile"] if options.profile else []
            # compilers' caches of its own, without --warm: each run compiles as a first one does
            caches = Path(folder) / arm if options.warm else place
            own = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
            log = (place / "log").open("w")
            start = partial(subprocess.Popen, command, stdout=log, stderr=log, env=os.environ | own)
            warm = options.warm and any(arm == earlier for earlier, *_ in waiting)
            waiting.append((arm, warm, place, start() if options.ahead else start))
        for arm, warm, place, process in waiting:
            process = process if options.ahead else process()
            # nothing is timed while another process still prepares
            prepared = [other for _, _, other, _ in waiting] if options.ahead else [place]
            while process.poll() is None and not all((other / "ready").exists() for other in prepared):
                time.sleep(0.2)
                prepared = [other for other in prepared if not (other / "failed").exists()]
            (place / "go").touch()
            process.wait()
            if (place / "found").exists():
                found = json.loads((place / "found").read_text()) | {"warm": warm}
                print(line(found), flush=True)
            else:
                found = {"arm": arm, "error": (place / "log").read_text()[-3000:]}
                print(f"{arm}: failed\n{found['error']}", flush=True)
            results.append(found)
            Path(options.output).write_text(json.dumps(results))
    print(table(results))
    return 1 if any("error" in found for found in results) else 0


def rotated(arms: list[str], turn: int) -> list[str]:
    """The arms, in each turn another one first."""
    first = turn % len(arms)
    return arms[first:] + arms[:first]


def line(found: dict[str, Any]) -> str:
    """An arm's figures."""
    parts = [
        f"{found['arm']}, {found['shape']}, {found['rows']} rows: step {found['step_ms']:.1f} ms",
        f"run {found['seconds']:.1f} s",
        f"slowest after ten {found['slowest_after_ten_ms']:.0f} ms",
        f"{found['peak_gib']:.2f} GiB",
        f"selections {found['selections_s']}",
        f"last loss {found['loss'][-1] if found['loss'] else None}",
    ]
    if "captures" in found:
        parts.append(f"{found['captures']} captures in {found['capture_s']:.1f} s")
    return "; ".join(parts + found["said"])


def table(results: list[dict[str, Any]]) -> str:
    """Medians of each arm, and their ratio to TRL's."""
    good = [found for found in results if "error" not in found]
    medians = {}
    names = {id(found): (found["arm"], found["shape"], found["rows"], found["warm"]) for found in good}
    for key in dict.fromkeys(names.values()):
        own = [found for found in good if names[id(found)] == key]
        medians[key] = {
            name: statistics.median(one[name] for one in own) for name in ("step_ms", "seconds", "peak_gib")
        }
    lines = [
        "| arm | shape, rows | step, ms | run, s | peak, GiB | step / TRL | run / TRL |",
        "|---|---|---|---|---|---|---|",
    ]
    for (arm, shape, rows, warm), own in medians.items():
        trl = medians.get(("trl_dpo" if "dpo" in arm else "trl", shape, rows, False))
        ratios = ["", ""] if trl is None else [f"{own[key] / trl[key]:.2f}" for key in ("step_ms", "seconds")]
        cells = [
            arm + (", caches filled" if warm else ""),
            f"{shape}, {rows}",
            f"{own['step_ms']:.1f}",
            f"{own['seconds']:.1f}",
            f"{own['peak_gib']:.2f}",
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

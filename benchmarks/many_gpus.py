"""Measures training on two GPUs against one, K branches beside TRL's LoRA, and checks that both give the same result.

One process and two run the same steps on the same rows: with DDP, FSDP2, ZeRO-2 and ZeRO-3, at two shapes with random
weights. Each run ("arm") leaves a JSON line when it ends, so that a call that is cut keeps what it had.

    python benchmarks/many_gpus.py --output many_gpus.jsonl           # one GPU, or two if there are two (NCCL)
    python benchmarks/many_gpus.py --report docs/performance.md --output many_gpus.jsonl

Without a GPU two gloo processes run small shapes in float32. This shows that everything works, and no more.
"""

import argparse
import gc
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import about
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from shapes import LLAMA_8B, SMOLLM_135M, TARGETS
from trainers import StepTimer, quiet, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer

from comlora_trl import ComLoRAConfig, ComLoRASFTTrainer

CUDA = torch.cuda.is_available()

SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-3-8B, 4 layers": LLAMA_8B | {"num_hidden_layers": 4},
    "SmolLM2-135M": SMOLLM_135M,
}
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
RESUMED_SHAPE = "SmolLM2-135M"  # its checkpoints are small

# None is TRL's own trainer. The rungs are late, so that most steps have four branches
METHODS: dict[str, dict[str, Any] | None] = {
    "K=4, selector": {"comlora_k": 4},
    "TRL's LoRA": None,
    "tournament of 4, shared rows": {"comlora_tournament": True, "comlora_rungs": "0.5:2,0.75:1"},
    "K=1": {"comlora_k": 1, "comlora_selector": False},
}
RESUMED = ("K=4, selector", "tournament of 4, shared rows")


def _zero(stage: int) -> dict[str, Any]:
    optimization = {"stage": stage} | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {})
    auto = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    return {
        "deepspeed": {"zero_optimization": optimization, "bf16": {"enabled": "auto"}, **dict.fromkeys(auto, "auto")}
    }


FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
BACKENDS = {"DDP": {}, "FSDP2": FSDP2, "ZeRO-2": _zero(2), "ZeRO-3": _zero(3)}


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        shape, method: keys of `SHAPES` and `METHODS`.
        backend: a key of `BACKENDS`; "" for one process without any.
        processes: how many run it.
        rows: of a step, on all processes together.
        resumed: whether it continues the run of two processes from the checkpoint at half of its steps. Its backend is
            that run's.
    """

    shape: str
    method: str
    backend: str
    processes: int
    rows: int
    resumed: bool = False


def arms_of(processes: int, options: argparse.Namespace) -> list[Arm]:
    """The arms of a launch, the most important ones first."""
    kinds = [(shape, method) for shape in options.shapes for method in options.methods]
    if processes > 1:
        return [Arm(*kind, backend, processes, options.rows) for backend in options.backends for kind in kinds]
    whole, half = ([Arm(*kind, "", 1, rows) for kind in kinds] for rows in (options.rows, options.rows // 2))
    # DeepSpeed's checkpoints belong to as many processes as wrote them
    resumed = [
        Arm(RESUMED_SHAPE, method, backend, 1, options.rows, True)
        for backend in options.backends
        for method in RESUMED
        if not backend.startswith("ZeRO") and (RESUMED_SHAPE, method) in kinds
    ]
    return whole + resumed + half


# ---- One arm ----


def make_base(shape: str) -> LlamaForCausalLM:
    """The base with random weights, the same in every process: bfloat16 on the GPU, float32 and small on a CPU."""
    config = LlamaConfig(**SHAPES[shape] | ({} if CUDA else SMALL), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    try:
        with torch.device("cuda" if CUDA else "cpu"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def make_rows(count: int, seed: int) -> Dataset:
    """Rows of 32 to 128 tokens (on a CPU 8 to 32), the last 4 to 16 of which are supervised.

    The tokens are 64 of the vocabulary, so there is something to learn.
    """
    draw, longest = random.Random(seed), 128 if CUDA else 32
    rows = []
    for _ in range(count):
        ids = [draw.randrange(3, 67) for _ in range(draw.randint(longest // 4, longest))]
        prompt = len(ids) - draw.randint(4, min(16, len(ids) - 1))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def make_trainer(arm: Arm, folder: Path, options: argparse.Namespace) -> SFTTrainer:
    """TRL's trainer or ours, with the same arguments but for the competition's."""
    saves = (arm.shape, arm.method in RESUMED, arm.processes > 1) == (RESUMED_SHAPE, True, True)
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "-".join((arm.shape, arm.method, arm.backend)).replace(" ", "_")),
        "per_device_train_batch_size": arm.rows // arm.processes,
        "max_steps": options.steps,
        "logging_steps": 1,
        "learning_rate": 1e-3 if CUDA else 1e-2,  # a narrow base needs more to learn
        "bf16": CUDA,
        "gradient_checkpointing": False,
        "save_strategy": "steps" if saves else "no",
        "save_steps": options.steps // 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "pad_to_multiple_of": 64 if CUDA else 8,  # ours would do it by itself, TRL's would not
        "use_cpu": not CUDA and arm.backend in ("", "DDP"),
        **BACKENDS.get(arm.backend, {}),
    }
    settings = METHODS[arm.method]
    kind, config = SFTTrainer, SFTConfig
    if settings is not None:
        kind, config = ComLoRASFTTrainer, ComLoRAConfig
        arguments |= settings | {"comlora_overwrite_winner": True}
        if not options.graphs:
            arguments["comlora_graphs"] = False  # they are off with several processes, and would not be with one
    trainer = kind(
        make_base(arm.shape),
        config(**arguments),
        train_dataset=make_rows(options.rows * options.steps, seed=0),
        eval_dataset=make_rows(16, seed=1),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Timer(StepTimer):
    """Ends of steps, and the peak memory from the end of the first one on."""

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, *rest, **kwargs)
        if CUDA and len(self.marks) == 1:
            torch.cuda.reset_peak_memory_stats()


def run(arm: Arm, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm.

    Returns:
        ms: the median step, without the first three (warm-up) and the last (which selects the winner).
        peak_gib: the largest peak memory of any process after the first step.
        losses: of every step. decided: wins and winner.
    """
    began = time.perf_counter()
    trainer = make_trainer(arm, folder, options)
    timer = Timer(trainer.args.device)
    trainer.add_callback(timer)
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{options.steps // 2}" if arm.resumed else None
    with quiet():
        trainer.train(resume_from_checkpoint=checkpoint)
    steps = timer.intervals()
    found: dict[str, Any] = {
        "ms": statistics.median(steps[2:-1] or steps),
        "steps_ms": [round(step, 2) for step in steps],
        "peak_gib": largest(torch.cuda.max_memory_allocated() / 2**30) if CUDA else None,
        "seconds": round(time.perf_counter() - began, 1),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if isinstance(trainer, ComLoRASFTTrainer):
        state = trainer.competition.state
        scores = {name: state.selection[name] for name in ("scores", "validation_nll")}
        found["decided"] = {"winner": state.selection["winner"], "wins": state.wins, "retired": [*state.retired]}
        found |= json.loads(json.dumps(scores))
    return found


@contextmanager
def backend_of(arm: Arm) -> Iterator[None]:
    """Lets accelerate take up the arm's backend, and forget it afterwards."""
    sharded = arm.backend not in ("", "DDP")
    if arm.processes == 1 and sharded:  # one process of a group
        group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        environment = patch.dict(os.environ, group)
    else:
        environment = patch.dict(os.environ)
    with environment, pretended_gpus() if sharded and not CUDA else nullcontext():
        try:
            yield
        finally:
            unset_hf_deepspeed_config()
            for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
                del os.environ[name]
            if arm.processes == 1 and dist.is_initialized():
                dist.destroy_process_group()


@contextmanager
def pretended_gpus() -> Iterator[None]:
    """accelerate takes up FSDP and DeepSpeed where it sees several GPUs: here it sees them in CPU processes."""

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    def backend(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    with (
        patch.multiple(PartialState, _prepare_backend=backend, set_device=set_device),
        patch("comlora_trl.training.config.settled_without_gpu", nullcontext),
    ):
        yield


# ---- One launch: a process, or one of several, that runs all arms in turn ----


def work(options: argparse.Namespace) -> None:
    """Runs the arms until the launch's time is over."""
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if processes > 1:
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # CPU tensors too: full state dicts are gathered there
        dist.init_process_group("cuda:nccl,cpu:gloo" if CUDA else "gloo")
    for arm in arms_of(processes, options):
        if largest(time.time()) > options.until:
            result: dict[str, Any] = {"skipped": "no time was left"}
        else:
            try:
                with backend_of(arm):
                    result = run(arm, Path(options.folder), options)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"[:500]}
        gc.collect()  # trainers hold themselves in circles
        if CUDA:
            torch.cuda.empty_cache()
        if rank == 0:
            write(options, asdict(arm) | result)
    if dist.is_initialized():
        dist.destroy_process_group()


def largest(value: float) -> float:
    """The largest value of any process."""
    # accelerate begins the group of a single sharded process itself, for GPUs alone
    tensor = torch.tensor(value, dtype=torch.float64, device="cuda" if CUDA else "cpu")
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Appends a line to the results."""
    conditions = {"machine": about.machine(), "commit": options.commit, "steps": options.steps}
    conditions["versions"] = about.versions("deepspeed")
    with open(options.output, "a", encoding="utf-8") as file:
        file.write(json.dumps(result | conditions) + "\n")
    outcome = result.get("error") or result.get("skipped") or f"{result['ms']:.1f} ms, {result['seconds']} s in all"
    print(" | ".join(str(result[name]) for name in Arm.__dataclass_fields__), "|", outcome, flush=True)


def launch(processes: int, options: argparse.Namespace, folder: str) -> None:
    """One process, or several by torchrun, over the same arguments."""
    until = time.time() + options.seconds
    script = [__file__, "--worker", *sys.argv[1:], "--folder", folder, "--until", str(until)]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if not CUDA:
        environment["DS_ACCELERATOR"] = "cpu"
    if processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    process = subprocess.Popen([sys.executable, *(several if processes > 1 else []), *script], env=environment)
    try:
        process.wait(options.seconds + 60)  # the arm that runs when time is over may end
    except subprocess.TimeoutExpired:
        print(f"the launch of {processes} processes did not end and is stopped", flush=True)
        process.terminate()
        process.wait()


# ---- The report ----

BEGIN, END = "<!-- two GPUs: begin -->", "<!-- two GPUs: end -->"


def report(results: Path) -> str:
    """The section of docs/performance.md, from the result lines; a later line of an arm replaces an earlier one."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line]
    found = {Arm(**{name: line[name] for name in Arm.__dataclass_fields__}): line for line in lines}
    found = dict(sorted(found.items(), key=lambda pair: _order(pair[0])))
    done = {arm: line for arm, line in found.items() if "ms" in line}
    rows = max(arm.rows for arm in found)
    text = [_conditions(lines, rows)]
    for shape in SHAPES:
        table = [_cost(arm, done, rows) for arm in done if arm.shape == shape and not arm.resumed]
        if table:
            heads = ["method", "processes", "step, ms", "/ TRL's", "faster than one, same rows in all"]
            text += [f"**{shape}**", _table([*heads, "same rows each", "peak GiB"], table)]
    equal = [_same(arm, done, rows) for arm in done if arm.processes > 1 or arm.resumed]
    heads = ["shape", "method", "backend", "largest relative difference of a loss", "TRL's", "wins, retired, winner"]
    text += ["**Two processes against one, and resumed on one**", _table(heads, [row for row in equal if row])]
    missing = [_missing(arm, line) for arm, line in found.items() if arm not in done]
    return "\n\n".join([*text, *([_table(["not measured", "why"], missing)] if missing else [])])


def _conditions(lines: list[dict[str, Any]], rows: int) -> str:
    machine, steps = lines[-1]["machine"], lines[-1]["steps"]
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    numbers = {name: number for line in lines for name, number in line["versions"].items()}
    text = (
        f"{machine}, commit {commits}, {', '.join(f'{name} {number}' for name, number in numbers.items())}. "
        f"Random weights, {steps} steps on {rows} rows of 32 to 128 tokens unless said otherwise, on all processes "
        "together; adapters on q, k, v, up and down, r = 8; no CUDA graphs. A step is the median without warm-up. "
        "Most steps of the tournament have four branches. Peak memory is the largest of any process after the first "
        f"step. *Same rows in all*: the step of one process with {rows} rows divided by this one; 2 is perfect. "
        f"*Same rows each*: the step of one process with {rows // 2} rows divided by this one; 1 is perfect."
    )
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def _order(arm: Arm) -> tuple[int, ...]:
    backends = ["", *BACKENDS]
    places = [*SHAPES].index(arm.shape), [*METHODS].index(arm.method), backends.index(arm.backend)
    return *places[:2], arm.resumed, arm.processes, places[2], -arm.rows


def _cost(arm: Arm, done: dict[Arm, dict[str, Any]], rows: int) -> list[str]:
    one, half = (done.get(Arm(arm.shape, arm.method, "", 1, count)) for count in (rows, rows // 2))
    trl = done.get(Arm(arm.shape, "TRL's LoRA", arm.backend, arm.processes, arm.rows))
    ms, peak = done[arm]["ms"], done[arm]["peak_gib"]
    where = f"{arm.processes}, {arm.backend}" if arm.backend else f"1, {arm.rows} rows"
    several = arm.processes > 1
    faster = [f"{other['ms'] / ms:.2f}" if several and other else "" for other in (one, half)]
    relative = f"{ms / trl['ms']:.2f}" if trl else ""
    return [arm.method, where, f"{ms:.1f}", relative, *faster, "" if peak is None else f"{peak:.2f}"]


def _same(arm: Arm, done: dict[Arm, dict[str, Any]], rows: int) -> list[str] | None:
    """A run of two processes beside that of one; a resumed one beside the run of two that wrote its checkpoint."""
    other = Arm(arm.shape, arm.method, arm.backend if arm.resumed else "", 2 if arm.resumed else 1, rows)
    trl = [Arm(arm.shape, "TRL's LoRA", *kind, rows) for kind in ((arm.backend, 2), ("", 1))]
    if other not in done:
        return None
    theirs = f"{difference(*(done[one] for one in trl)):.1e}" if all(one in done for one in trl) else ""
    decided = _decisions(done[arm].get("decided"), done[other].get("decided"))
    backend = f"{arm.backend}, resumed on one" if arm.resumed else arm.backend
    return [arm.shape, arm.method, backend, f"{difference(done[arm], done[other]):.1e}", theirs, decided]


def _decisions(one: dict[str, Any] | None, two: dict[str, Any] | None) -> str:
    if one is None or two is None:  # TRL's LoRA decides nothing
        return ""
    if one == two:
        return "equal"
    return "winner equal, wins differ" if {**one, "wins": two["wins"]} == two else "**differ**"


def difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest relative difference of two runs' losses."""
    pairs = zip(one["losses"], two["losses"], strict=True)
    return max(abs(first - second) / abs(second) for first, second in pairs)


def _missing(arm: Arm, line: dict[str, Any]) -> list[str]:
    name = ", ".join(filter(None, (arm.shape, arm.method, arm.backend, f"{arm.processes} processes, {arm.rows} rows")))
    return [name + ", resumed" * arm.resumed, (line.get("error") or line["skipped"]).split("\n")[0].replace("|", "/")]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def write_report(page: Path, results: Path) -> None:
    """Writes the report between the markers of a page.

    Raises:
        ValueError: if the page has no markers.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no place for the report: add the lines {BEGIN} and {END}.")
    before, rest = text.split(BEGIN, 1)
    page.write_text(f"{before}{BEGIN}\n\n{report(results)}\n\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = [2, 1] if not CUDA or torch.cuda.device_count() > 1 else [1]
    parser.add_argument("--processes", type=int, nargs="+", default=several, help="launches, in this order")
    parser.add_argument("--output", default="many_gpus.jsonl", help="file that a line is appended to after each arm")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=[*BACKENDS])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--steps", type=int, default=16, help="of each arm")
    parser.add_argument("--rows", type=int, default=16, help="of a step, on all processes together")
    parser.add_argument("--seconds", type=float, default=600, help="no arm of a launch begins later")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs where they are the default: on one GPU")
    parser.add_argument("--commit", default=about.commit(), help="the code's, for the results (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="page to write the results' tables into, instead of a run")
    for internal in ("--folder", "--until"):
        parser.add_argument(internal, type=float if internal == "--until" else str, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs, or reports."""
    options = parse()
    if options.report:
        write_report(options.report, Path(options.output))
        return
    if importlib.util.find_spec("deepspeed") is None:
        if not options.worker:
            print("ZeRO-2 and ZeRO-3 are left out: deepspeed is not installed")
        options.backends = [name for name in options.backends if not name.startswith("ZeRO")]
    if options.worker:
        work(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            launch(processes, options, folder)


if __name__ == "__main__":
    main()

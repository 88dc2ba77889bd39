"""A training run of another package, with the data and the shapes of `small.py`; writes JSON with `small.py`'s keys.

It measures the time of a step and the memory of TRL, of Transformers' Trainer with Liger's kernels, of Unsloth and of
MoE-PEFT. Each run is a process of its own, which trains LoRA of rank 8 in bf16 and starts with empty compilers'
caches. Take each ratio to a run of the arm `trl` in the same session, on the same GPU.

Each package gets a folder of its own, which PYTHONPATH names, because Unsloth 2026.10 needs trl<=1.15,
transformers<=5.17 and datasets<5, and ComLoRA-TRL needs trl>=1.16. `--no-deps` keeps the environment's torch. The
environment also needs transformers<=5.17, torchvision, sentencepiece, einops, scikit-learn and tiktoken. Unsloth is
installed without xformers here; the JSON says which attention it finds.

    pip install --target LIGER --no-deps liger-kernel
    pip install --target UNSLOTH --no-deps unsloth unsloth_zoo trl==1.15.0 'datasets<5' 'dill<0.4.2' \\
        'multiprocess<0.70.19' bitsandbytes cut_cross_entropy torchao tyro typeguard docstring_parser hf_transfer \\
        msgspec nest_asyncio importlib_metadata pydantic pydantic_core annotated_types typing_inspection
    pip install --target MOE --no-deps moe_peft evaluate 'datasets<5' 'dill<0.4.2' 'multiprocess<0.70.19'

    python benchmarks/peers.py --prepare                # once for a shape: the random base as a folder of weights
    PYTHONPATH=LIGER python benchmarks/peers.py --one trl --output trl.json
    PYTHONPATH=LIGER python benchmarks/peers.py --one trainer_liger --output trainer_liger.json
    PYTHONPATH=UNSLOTH python benchmarks/peers.py --one unsloth_padded --output unsloth_padded.json
    PYTHONPATH=MOE python benchmarks/peers.py --one moe_peft --output moe_peft.json

The exit status is 1 after an error and 3 at the limit; the JSON then has "error".
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from shapes import TARGETS
from small import SHAPES, data, line, tokenizer


@dataclass(frozen=True)
class Arm:
    """What an arm runs."""

    package: str  # whose training loop runs
    config: dict[str, Any] = field(default_factory=dict)  # fields of the trainer's configuration
    environment: dict[str, str] = field(default_factory=dict)  # set before the package is imported
    own_checkpointing: bool = False  # the package's default for checkpointing stays; otherwise there is none
    micro_batches: int = 1  # of a step; each has --rows rows
    loras: int = 1
    shared: bool = False  # the LoRAs divide the rows of a step; otherwise every row goes through each of them


# Transformers' own defaults. Unsloth rewrites SFTConfig's (gradient_accumulation_steps=2, optim="adamw_8bit",
# warmup_steps=0.1, weight_decay=0.001, seed=3407), so a step of its defaults has twice the rows
ONE_BATCH = {"gradient_accumulation_steps": 1}
PLAIN = ONE_BATCH | {"optim": "adamw_torch_fused", "weight_decay": 0.0, "warmup_steps": 0, "seed": 42}
PADDED = PLAIN | {"padding_free": False}
ARMS = {
    "trl": Arm("trl"),
    # all of Liger: TRL 1.16 switches its fused linear cross-entropy off, so this is Transformers' Trainer
    "trainer_liger": Arm("trainer", {"use_liger_kernel": True}),
    # Unsloth chooses between padding-free and padded batches
    "unsloth": Arm("unsloth", PLAIN),
    # Unsloth compiles each decoder layer, but only for padded batches
    "unsloth_padded": Arm("unsloth", PADDED),
    # each compiled layer as CUDA graphs, one for a length; multiples of 64 keep the lengths few
    "unsloth_graphs": Arm("unsloth", PADDED | {"pad_to_multiple_of": 64}, {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}),
    # Unsloth's defaults: its checkpointing, 8-bit AdamW and two micro-batches a step
    "unsloth_untouched": Arm("unsloth", own_checkpointing=True, micro_batches=2),
    "moe_peft": Arm("moe_peft", loras=4),
    "moe_peft_shared": Arm("moe_peft", loras=4, shared=True),
}


@dataclass
class Run:
    """The state of a run, from the start of the process to its end."""

    options: argparse.Namespace
    arm: Arm
    phase: str = "start"
    settings: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # means of ten steps
    marks: list[float] = field(default_factory=list)  # when training starts, and after each step
    seconds: float = 0.0  # of training, once it has ended
    peak: float = 0.0
    reserved: float = 0.0
    born: float = field(default_factory=time.perf_counter)
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="peers_")))
    ending: Any = field(default_factory=threading.Lock)

    def mark(self, phase: str = "train") -> None:
        """Notes the time: when training starts, after each step, and when training is done."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if not self.marks:
                torch.cuda.reset_peak_memory_stats()
            # read here, because at the limit this thread may hang inside CUDA
            self.peak = torch.cuda.max_memory_allocated() / 2**30
            self.reserved = torch.cuda.max_memory_reserved() / 2**30
        self.phase, now = phase, time.perf_counter()
        if phase == "done":
            self.seconds = now - self.marks[0]
        else:
            self.marks.append(now)

    def watch(self) -> None:
        """Ends the process at its limit, with what was measured until then."""

        def stop() -> None:
            stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
            error = f"{''.join(stack[-8:])}limit of {self.options.limit} s reached in phase {self.phase}"
            self.end(3, error=error[-2000:], partial=True)

        timer = threading.Timer(self.options.limit, stop)
        timer.daemon = True
        timer.start()

    def end(self, code: int = 0, **more: Any) -> NoReturn:
        """Writes what was measured and ends the process."""
        with self.ending:  # never both the watchdog and the main thread
            found = self.found() | more
            self.options.output.write_text(json.dumps(found, default=str))
            print(found["error"] if "error" in found else line(found), flush=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            os._exit(code)  # some packages leave threads that keep the interpreter alive

    def found(self) -> dict[str, Any]:
        """What was measured until now, with `small.py`'s keys."""
        marks = list(self.marks)
        times = [1e3 * (later - earlier) for earlier, later in zip(marks, marks[1:], strict=False)]
        found = {name: getattr(self.options, name) for name in ("shape", "rows", "steps")}
        found |= {"arm": self.options.one, "phase": self.phase, "settings": self.settings}
        found["rows"] *= self.arm.micro_batches
        found["process_seconds"] = time.perf_counter() - self.born
        if times:
            typical = median(times[len(times) // 2 :])
            found |= {
                "seconds": self.seconds or marks[-1] - marks[0],
                "step_ms": typical,
                "step_ms_all": median(times),
                "slowest_after_ten_ms": max(times[10:], default=0.0),
                "over_three_medians_after_ten": sum(one > 3 * typical for one in times[10:]),
                "selections_s": [],
                "peak_gib": self.peak,
                "reserved_gib": self.reserved,
                "loss": self.losses,
                "times_ms": [round(one, 1) for one in times],
                "said": [],
            }
        return found


def train_sft(run: Run) -> None:
    """Trains with TRL's SFTTrainer, as it is or as Unsloth changes it, or with Transformers' Trainer."""
    arm, options, unsloth = run.arm, run.options, run.arm.package == "unsloth"
    if unsloth:
        from unsloth import FastLanguageModel  # first, because it changes the packages below
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    class Timer(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            run.mark()

    run.phase = "model"
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if unsloth:
        more: dict[str, Any] = {} if arm.own_checkpointing else {"use_gradient_checkpointing": False}
        load = {"dtype": dtype, "load_in_4bit": False, "max_seq_length": max(512, options.longest)} | more
        load |= {"local_files_only": True} if on_gpu else {"local_files_only": True, "device_map": {"": "cpu"}}
        model, words = FastLanguageModel.from_pretrained(str(options.base), **load)
        more |= {"r": 8, "lora_alpha": 16, "lora_dropout": 0, "target_modules": list(TARGETS), "random_state": 0}
        model, lora = FastLanguageModel.get_peft_model(model, **more), None
    else:
        model, words = LlamaForCausalLM.from_pretrained(options.base, dtype=dtype), tokenizer()
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    run.phase = "trainer"
    config = {"output_dir": str(run.scratch / "output"), "bf16": on_gpu, "use_cpu": not on_gpu, "learning_rate": 1e-4}
    config |= {"per_device_train_batch_size": options.rows, "max_steps": options.steps}
    config |= {"logging_steps": min(10, options.steps), "save_strategy": "no"}
    config |= {"report_to": "none", "disable_tqdm": True}
    config |= arm.config if arm.own_checkpointing else arm.config | {"gradient_checkpointing": False}
    rows, vocabulary = options.rows * arm.micro_batches * options.steps, SHAPES[options.shape]["vocab_size"]
    given = {"train_dataset": data(rows, vocabulary, options.longest, 0), "processing_class": words}
    if arm.package == "trainer":
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        given["data_collator"] = DataCollatorForLanguageModeling(pad_token_id=0)
        trainer = Trainer(get_peft_model(model, lora), TrainingArguments(**config), **given)
    else:
        config["dataset_kwargs"] = {"skip_prepare_dataset": True}
        trainer = SFTTrainer(model, args=SFTConfig(**config), peft_config=lora, **given)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Timer())
    names = "optim weight_decay warmup_steps gradient_accumulation_steps gradient_checkpointing padding_free"
    run.settings = {name: getattr(trainer.args, name, None) for name in names.split()}
    run.settings |= {"config": arm.config, "environment": arm.environment, **described(trainer.model.parameters())}
    if unsloth:
        from unsloth.utils import attention_dispatch

        attentions = ("HAS_XFORMERS", "HAS_FLASH_ATTENTION", "_TORCH_VARLEN_ATTN")
        run.settings["attention"] = [name for name in attentions if getattr(attention_dispatch, name)]
        forwards = [type(module).forward for module in model.modules()]
        run.settings["compiled_blocks"] = sum(hasattr(forward, "_unsloth_block_compiled") for forward in forwards)
    if trainer.args.gradient_accumulation_steps != arm.micro_batches:
        raise RuntimeError(f"a step has {trainer.args.gradient_accumulation_steps} micro-batches")
    run.mark()
    trainer.train()
    run.mark("done")
    run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_moe_peft(run: Run) -> None:
    """Trains with MoE-PEFT's model, adapters, optimisers and loss, in the loop of its `train` but on given rows."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import LlamaConfig

    # it reads Transformers 4's names of two fields; these values are the shapes'
    LlamaConfig.rope_theta, LlamaConfig.rope_scaling = 10000.0, None
    import moe_peft
    from moe_peft.common import LLMBatchConfig, LLMModelInput
    from moe_peft.trainer import _compute_loss

    arm, options = run.arm, run.options
    own, rest = divmod(options.rows, arm.loras) if arm.shared else (options.rows, 0)
    if rest:
        raise ValueError(f"{arm.loras} LoRAs cannot divide {options.rows} rows equally")
    run.phase = "model"
    device, dtype = ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    # its `train` recommends this attention
    model = moe_peft.LLMModel.from_pretrained(str(options.base), device=device, attn_impl="eager", load_dtype=dtype)
    # it refuses a dropout of 0
    lora = {"task_name": "casual", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": list(TARGETS)}
    sizes = {"num_epochs": 1, "batch_size": own, "micro_batch_size": own, "learning_rate": 1e-4}
    configs, batches = {}, []
    for index in range(arm.loras):
        name = f"lora_{index}"
        model.init_adapter(moe_peft.LoraConfig.from_config(lora | {"name": name}))
        configs[name] = config = moe_peft.TrainConfig(adapter_name=name, **sizes)
        config.prepare(model.get_adapter_weight_dict(name))
        config.prepare_lr_scheduler(own * options.steps)
        batches.append(LLMBatchConfig(name, index * own, (index + 1) * own))
    trained = [one for config in configs.values() for one in config.optimizer_.param_groups[0]["params"]]
    run.settings = {"optim": type(config.optimizer_).__name__, "weight_decay": config.weight_decay}
    run.settings |= {"gradient_accumulation_steps": int(config.accumulation_step_), "gradient_checkpointing": False}
    run.settings |= {"padding_free": False, "attention": "eager", "compiled_blocks": 0, "lora": lora}
    run.settings |= {"loras": arm.loras, "rows_each": own, **described(trained)}
    rows = data(options.rows * options.steps, SHAPES[options.shape]["vocab_size"], options.longest, 0)
    ids, labels, losses = rows["input_ids"][:], rows["labels"][:], []
    run.mark()
    for first in range(0, len(ids), options.rows):
        chosen = slice(first, first + options.rows)
        tokens = pad_sequence([torch.tensor(one) for one in ids[chosen]], batch_first=True)
        targets = pad_sequence([torch.tensor(one) for one in labels[chosen]], batch_first=True, padding_value=-100)
        if not arm.shared:
            tokens, targets = tokens.repeat(arm.loras, 1), targets.repeat(arm.loras, 1)
        masks = (tokens != 0).long()  # no row has a token 0
        batch = {"batch_tokens_": tokens, "batch_labels_": targets.to(device), "batch_masks_": masks}
        # its `train` always recomputes activations; the other arms do not
        outputs = model.forward(LLMModelInput(batch_configs_=batches, gradient_checkpoint_="none", **batch))
        loss = _compute_loss(configs, outputs)
        loss.backward()
        for output in outputs:
            configs[output.adapter_name].step()
        losses.append(loss.detach() / arm.loras)
        run.mark()
    for config in configs.values():
        config.finish()
    run.mark("done")
    run.losses = [float(ten.mean()) for ten in torch.stack(losses).split(10)]


def described(trained: Any) -> dict[str, Any]:
    """The number of trained values, and what a result says of its run."""
    from about import machine, versions  # not earlier: it imports torch, which Unsloth has to prepare

    packages = versions("datasets", "liger_kernel", "unsloth", "unsloth_zoo", "moe_peft")
    count = sum(one.numel() for one in trained if one.requires_grad)
    return {"trainable": count, "machine": machine(), "versions": packages}


def prepare(shape: str, folder: Path) -> None:
    """Saves a random base and a tokenizer with its vocabulary, because Unsloth and MoE-PEFT load a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], pad_token_id=0))
    base.to(torch.bfloat16).save_pretrained(folder)
    words = tokenizer(base.config.vocab_size)
    words.unk_token, words.model_max_length = "<s>", base.config.max_position_embeddings
    words.save_pretrained(folder)
    (folder / "whole").touch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=list(ARMS), help="the arm that runs")
    parser.add_argument("--prepare", action="store_true", help="only make the base's folder")
    parser.add_argument("--base", type=Path, help="the base's folder, made where it is missing")
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--longest", type=int, default=320, help="tokens of the longest row")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which the process ends")
    parser.add_argument("--output", type=Path, default=Path("peer.json"))
    options = parser.parse_args()
    # absolute, because a run changes its working directory
    options.base = (options.base or Path(tempfile.gettempdir()) / f"peers_base_{options.shape}").resolve()
    options.output = options.output.resolve()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    whole = (options.base / "whole").exists()
    if options.prepare:
        if not whole:
            prepare(options.shape, options.base)
        return 0
    if options.one is None:
        parser.error("--one or --prepare is needed")
    run = Run(options, ARMS[options.one])
    run.watch()
    try:
        if not whole:
            # in a process of its own, because Unsloth has to be imported before Transformers
            command = [sys.executable, __file__, "--prepare", "--shape", options.shape, "--base", str(options.base)]
            subprocess.run(command, check=True)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
            os.environ.setdefault(name, "1")
        # in a container that has chosen GPUs, Unsloth would compile in one process
        os.environ.setdefault("UNSLOTH_FORCE_SINGLE_COMPILE_WORKER", "0")
        # compilers' caches of its own: each run compiles as a first one does
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION", "UNSLOTH_MEGA_CACHE_DIR")
        for name in caches:
            os.environ[name] = str(run.scratch / name.lower())
        os.environ.update(run.arm.environment)
        os.chdir(run.scratch)  # Unsloth writes into the working directory
        run.phase = "import"
        (train_moe_peft if run.arm.package == "moe_peft" else train_sft)(run)
    except BaseException:
        run.end(1, error=traceback.format_exc()[-2000:])
    run.end()


if __name__ == "__main__":
    sys.exit(main())

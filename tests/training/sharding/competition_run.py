"""A competition of a few steps as every backend runs it; `python competition_run.py FOLDER MODE...` is one process.

Started with RANK and WORLD_SIZE in the environment it is one of several. Modes run one after the other, for most of
such a test's time goes into imports. The reference is the same function in one process with the doubled batch.
"""

import json
import os
import shutil
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from conftest import make_arguments, make_lora, make_model, make_tokenizer
from kinds import KINDS, SFT, make_classifier
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from comlora_trl.training.trainer import CompetingTrainer

STEPS, SAVED, HURT_STEP, HURT_BRANCH = 10, 5, 2, 2


def fsdp(version: int, state: str = "FULL_STATE_DICT", **config: Any) -> dict[str, Any]:
    return {"fsdp": True, "fsdp_config": {"version": version, "state_dict_type": state, **config}}


def zero(stage: int, **config: Any) -> dict[str, Any]:
    batch = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
    }
    optimization = {"stage": stage, **config}
    if stage == 3:
        optimization.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return {"deepspeed": {"zero_optimization": optimization, **batch, "gradient_clipping": "auto"}}


CHECKPOINTED = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
TRAINERS = {str(kind): kind for kind in [SFT, *KINDS]}
# A preference trainer's run has no selector. Its leader changes between the selections, so that one branch's loss says
# which checkpoint is the best. With an epsilon of 1e-8 Adam divides the rounding of some gradients by itself
PREFERENCES = {
    "comlora_branch_learning_rates": [3e-3, 7e-3, 1e-2],
    "comlora_selector_learning_rate": None,
    "metric_for_best_model": "comlora/loss_1",
    "adam_epsilon": 1e-4,
}

# A rung after the checkpoint at half time, so that the averages of the weights go through it
RUNGS = {
    "comlora_selector": False,
    "comlora_winner_by": "validation_loss",
    "comlora_branch_learning_rates": [3e-3, 7e-3, 1e-2],
    "comlora_selector_learning_rate": None,
    "comlora_rungs": "0.7:1",
    "adam_epsilon": 1e-4,
}

# Arguments of a mode; "dtype" is the base model's, "trainer" one of `TRAINERS`, "rungs" adds `RUNGS`. DeepSpeed keeps
# float32 copies of what it trains, FSDP1 takes norms in float32, and DPO's and KTO's log-probabilities are in float32
MODES: dict[str, dict[str, Any]] = {
    "ddp": {"use_cpu": True, "dtype": "float64"},
    "fsdp1": {**fsdp(1, sync_module_states=False), "dtype": "float32"},
    "fsdp1_flat": {
        **fsdp(1, "SHARDED_STATE_DICT", use_orig_params=False, sync_module_states=False),
        "dtype": "float32",
    },
    "fsdp2": {**fsdp(2), "dtype": "float64"},
    "fsdp2_sharded": {**fsdp(2, "SHARDED_STATE_DICT"), "dtype": "float64"},
    "fsdp2_efficient": {**fsdp(2, cpu_ram_efficient_loading=True), **CHECKPOINTED, "dtype": "float64"},
    "fsdp2_gathered_once": {
        **fsdp(2, "SHARDED_STATE_DICT", reshard_after_forward=False, cpu_ram_efficient_loading=True),
        "gradient_accumulation_steps": 2,
        "dtype": "float64",
    },
    "fsdp2_bf16": {**fsdp(2, "SHARDED_STATE_DICT"), "bf16": True, "dtype": "bfloat16"},
    "fsdp2_rungs": {**fsdp(2), "dtype": "float64", "rungs": True},
    "zero2": {**zero(2), **CHECKPOINTED},
    "zero2_rungs": {**zero(2), **CHECKPOINTED, "rungs": True},
    "zero3": {**zero(3, stage3_param_persistence_threshold=0), **CHECKPOINTED},
    "zero3_persistent": zero(3),
    "zero3_bf16": {**zero(3, stage3_param_persistence_threshold=0), "bf16": True, "dtype": "bfloat16"},
}
for kind in map(str, KINDS):
    MODES[f"fsdp2_{kind}"] = {**fsdp(2, cpu_ram_efficient_loading=kind == "dpo"), "trainer": kind}
    MODES[f"zero2_{kind}"] = {**MODES["zero2"], "trainer": kind}
MODES["zero3_reward"] = {**MODES["zero3"], "trainer": "reward"}
# Those that `.ci/run` leaves out
MORE_MODES = ["fsdp1", "fsdp2_sharded", "fsdp2_gathered_once", "fsdp2_bf16", "zero3_persistent", "zero3_bf16"]
MORE_MODES += ["fsdp2_reward", "fsdp2_kto", "zero2_dpo", "zero2_reward", "zero2_kto"]


def run(folder: Path, settings: dict[str, Any], batch: int, resume: bool = False) -> CompetingTrainer:
    """Ten steps of three branches, one of which diverges; from the checkpoint at the fifth when `resume`.

    The higher loss counts as the better one, so that at the end the fifth step's checkpoint is loaded.
    """
    settings = dict(settings)
    base, kind = settings.pop("dtype", "float32"), TRAINERS[settings.pop("trainer", "sft")]
    rungs = RUNGS if settings.pop("rungs", False) else {}
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "eval_strategy": "steps",
        "eval_steps": SAVED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "learning_rate": 5e-3,
        "max_grad_norm": 0.1,
        "comlora_selector_learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "use_cpu": False,
        "comlora_k": 3,
        "comlora_overwrite_winner": True,
        "model_init_kwargs": {"dtype": "auto"},
        **({} if kind is SFT else PREFERENCES),
        **kind.of_any_cut,
        **rungs,
        **settings,
    }
    trainer = kind.ours(
        str(folder.parent / f"{'classifier' if kind.name == 'reward' else 'model'}-{base}"),
        args=kind.config(**make_arguments(folder, **arguments)),
        train_dataset=kind.data(),
        eval_dataset=kind.data(13),
        processing_class=make_tokenizer(),
        peft_config=make_lora(**kind.lora),
    )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1:
        # On a CPU "offloaded" is where the tensor was already, and FSDP1 frees or overwrites it then; TRL's trainer
        # ends with exp_avg equal to exp_avg_sq, or in a segmentation fault
        plugin.optim_state_dict_config.offload_to_cpu = plugin.state_dict_config.offload_to_cpu = False
    hurt(trainer)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    return trainer


class _Infinite(torch.autograd.Function):
    """The identity, whose gradient is infinite on the rows of one of several branches."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, branches: int, hurt: int) -> torch.Tensor:
        ctx.branches, ctx.hurt = branches, hurt
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad = grad.clone()
        grad.chunk(ctx.branches)[ctx.hurt].fill_(float("inf"))
        return grad, None, None


def hurt(trainer: CompetingTrainer) -> None:
    """A gradient (not a loss) that is infinite for one branch at one step, on one process."""
    layer = trainer.comlora_model.adapted_layers[-1]
    name = f"branch_{HURT_BRANCH}"

    def after(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        names = module.competing.names
        if trainer.state.global_step == HURT_STEP and name in names and trainer.args.process_index == 0:
            return _Infinite.apply(output, len(names), names.index(name))
        return None

    layer.register_forward_hook(after)


def outcome(trainer: CompetingTrainer) -> dict[str, Any]:
    """What a run has logged and decided."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "state": json.loads(json.dumps(vars(trainer.competition.state)))}


def prepare(folder: Path) -> None:
    """The base models in folders, as `from_pretrained` reads them."""
    for name in ("float32", "float64", "bfloat16"):
        make_model().to(getattr(torch, name)).save_pretrained(folder / f"model-{name}")
    make_classifier().save_pretrained(folder / "classifier-float32")


def run_and_resume(folder: Path, settings: dict[str, Any], batch: int) -> None:
    """A run, and a second one from its checkpoint at half time; what each decided is left in JSON files."""
    main = int(os.environ.get("RANK", 0)) == 0
    found = outcome(run(folder, settings, batch))
    if main:
        (folder / "outcome.json").write_text(json.dumps(found))
        (folder / f"checkpoint-{STEPS}").rename(folder / "whole")
        shutil.move(folder / "winner", folder / "whole-winner")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    resumed = outcome(run(folder, settings, batch, resume=True))
    if main:
        (folder / "resumed.json").write_text(json.dumps(resumed))


def main(folder: Path, modes: list[str]) -> None:
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import training_args

    from comlora_trl.training import config

    ordinary = PartialState._prepare_backend, PartialState.set_device

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    for mode in modes:
        settings = MODES[mode]
        # accelerate takes up FSDP and DeepSpeed where it sees GPUs
        if not settings.get("use_cpu"):
            PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
            PartialState.set_device = set_device
            training_args.is_torch_bf16_gpu_available = lambda: True
            config.settled_without_gpu = nullcontext
        try:
            run_and_resume(folder / mode, settings, batch=4 // settings.get("gradient_accumulation_steps", 1))
        except Exception:
            (folder / f"{mode}-{os.environ['RANK']}.error").write_text(traceback.format_exc())
            os._exit(1)  # the other process may be waiting for this one
        finally:
            PartialState._prepare_backend, PartialState.set_device = ordinary
            unset_hf_deepspeed_config()
            for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
                del os.environ[name]
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])

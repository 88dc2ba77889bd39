"""What happens before training: the base model, the trainer's options and the validation set, each checked.

A wrong value ends here, in one line, before any training time is spent.
"""

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import create_model_from_path

from comlora_trl.training.adapters import check_lora_config, check_model, complete_lora_config
from comlora_trl.training.config import ComLoRAConfig
from comlora_trl.training.model import ComLoRAModel

_DATA_COLUMNS = ("text", "messages", "conversations", "prompt", "input_ids")


def load_base_model(model: str, args: ComLoRAConfig, quantization_config: Any = None) -> PreTrainedModel:
    """Loads a model id or path as TRL's SFTTrainer does, `model_init_kwargs` and quantisation included."""
    kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError("quantization_config is given twice, as an argument and in model_init_kwargs: drop one.")
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each process holds the whole model
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **kwargs)


def build_comlora_model(model: PreTrainedModel, peft_config: PeftConfig | None, args: ComLoRAConfig) -> ComLoRAModel:
    """The base model with K branches and the selector.

    Args:
        peft_config: configuration of every branch; None for the default one.

    Raises:
        TypeError: if `peft_config` is not a LoRA configuration.
        ValueError: if the model or the configuration can't be trained as competing branches.
    """
    if isinstance(model, ComLoRAModel):
        return model
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model has adapters already (PeftModel), and the branches need a base without any: pass the base "
            "model with peft_config=LoraConfig(...), or merge_and_unload() the adapter first."
        )
    check_model(model)
    peft_config = complete_lora_config(peft_config, model)
    check_lora_config(peft_config, args.comlora_k)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    # ZeRO-3 gathers parameters of one dtype at a time; see huggingface/trl#6089
    kwargs = {"autocast_adapter_dtype": False} if zero3 and not quantized else {}
    return ComLoRAModel(model, peft_config, args.competition_settings, args.selector_settings, **kwargs)


def check_trainer_arguments(args: ComLoRAConfig, compute_loss_func: Any, optimizer: Any) -> None:
    """Refuses options of TRL whose loss can't be a row-weighted sum of log-probabilities.

    Raises:
        ValueError: naming the option, the reason and the fix.
    """
    refused = {
        "loss_type='dft'": (args.loss_type == "dft", "its token weights depend on the branch's own probabilities"),
        "label_smoothing_factor": (args.label_smoothing_factor > 0, "it needs the full logits of every branch"),
        "compute_loss_func": (compute_loss_func is not None, "it needs the full logits of every branch"),
        "gradient_checkpointing_kwargs={'use_reentrant': True}": (
            args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
            "reentrant checkpointing can't follow the batch as it widens to K branches",
        ),
        "chat_template_path to a tokenizer": (
            args.chat_template_path is not None and not os.path.isfile(args.chat_template_path),
            "it may add tokens, whose embeddings no branch trains; give a Jinja file",
        ),
        "optimizers": (
            optimizer is not None and args.comlora_selector_learning_rate is not None,
            "comlora_selector_learning_rate needs the optimizer to be made here",
        ),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise ValueError(f"{option} does not work with competing branches: {reason}. Leave it out.")


def check_parallelism(accelerator: Accelerator, args: ComLoRAConfig) -> None:
    """Refuses ways to spread the work that the competition does not go with."""
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
        raise ValueError(
            "context, sequence and tensor parallelism split the rows that the selector scores: use data "
            "parallelism (DDP, FSDP or DeepSpeed) instead."
        )
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    chunked = (args.comlora_branch_chunk or args.comlora_k) < args.comlora_k
    if chunked and sharded:
        raise ValueError(
            f"comlora_branch_chunk={args.comlora_branch_chunk} works with a single process or DDP: leave it out."
        )


def check_columns(dataset: Dataset | IterableDataset, name: str, formatting_func: Any) -> None:
    """Refuses a data set without a column that TRL's SFT trainer can read.

    Raises:
        ValueError: naming the columns found and those allowed.
    """
    columns = list(next(iter(dataset), {}))
    if not columns:
        raise ValueError(f"the {name} dataset is empty: give it at least one example.")
    if {"image", "images"} & set(columns):
        raise ValueError(f"the {name} dataset has images: competing branches take text only.")
    if formatting_func is None and not set(_DATA_COLUMNS) & set(columns):
        raise ValueError(
            f"the {name} dataset has the columns {', '.join(columns)}, none of which is known: name a column text, "
            "messages, prompt (with completion) or input_ids, or pass formatting_func."
        )
    if "prompt" in columns and "completion" not in columns and formatting_func is None:
        raise ValueError(f"the {name} dataset has a prompt column but no completion column: add completion.")

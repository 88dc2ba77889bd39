"""What happens before training: the base model, the trainer's options and the validation set, each checked.

A wrong value ends here, in one line, before any training time is spent.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import trl
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from packaging.version import Version
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from trl.models import enable_selective_activation_checkpointing

from comlora_trl.branches.layers import BranchLayer
from comlora_trl.training.adapters import check_lora_config, check_model, complete_lora_config
from comlora_trl.training.config import ComLoRAConfig
from comlora_trl.training.model import ComLoRAModel
from comlora_trl.training.starting import (
    base_revision,
    check_same_shape,
    continue_branches,
    load_model,
    load_processing_class,
    start_branches,
    take_apart,
)

TESTED_TRL = (1, 16)
_CHECKPOINTING_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")

logger = get_logger(__name__)


def build_comlora_model(model: PreTrainedModel, peft_config: PeftConfig | None, args: ComLoRAConfig) -> ComLoRAModel:
    """The base model with K branches and the selector.

    Args:
        model: the base model, a `PeftModel` with one LoRA adapter to start from (it is taken apart), or the branches
            of an earlier trainer.
        peft_config: configuration of every branch; None for the default one, or the adapter's to start from.

    Raises:
        TypeError: if `peft_config` is not a LoRA configuration.
        ValueError: if the model or the configuration can't be trained as competing branches.
    """
    if isinstance(model, ComLoRAModel):
        return continue_branches(model, peft_config, args)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model was loaded with an adapter by transformers itself: give the adapter's folder or hub id as "
            "model, or load it with peft.PeftModel.from_pretrained."
        )
    given, start = model, None
    if isinstance(model, PeftModel):
        existing = model.active_peft_config
        check_lora_config(existing, k=1)
        if peft_config is not None:
            check_same_shape(peft_config, existing)
        model, start = take_apart(model)
        peft_config = replace(peft_config or existing, init_lora_weights=True, inference_mode=False)
    if any(isinstance(module, BranchLayer) for module in model.modules()):
        raise ValueError(
            "the model is the base of another trainer's branches, which are still in it: call unload() or "
            "merge_and_unload() on that trainer's model and give what comes back, or give that trainer's model itself."
        )
    check_model(model)
    _keep_differentiable(model)
    peft_config = complete_lora_config(peft_config, model)
    check_lora_config(peft_config, args.comlora_k)
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    # ZeRO-3 gathers parameters of one dtype at a time; see huggingface/trl#6089
    kwargs = {"autocast_adapter_dtype": False} if zero3 and not is_quantized(model) else {}
    branches = ComLoRAModel(model, peft_config, args.competition_settings, args.selector_settings, **kwargs)
    if zero3 and branches.selector is not None:
        branches.selector.to(model.dtype)  # and trains by float32 masters, whatever its own type
    if start is not None:
        start_branches(branches, start)
        given.save_pretrained = branches.save_pretrained  # its layers are theirs now, by names that no adapter has
    return branches


def is_quantized(model: nn.Module) -> bool:
    """Whether TRL takes a base for a quantised one, whose adapters it makes bfloat16."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def _keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU, which it does for good at the first evaluation.

    Its product with repacked weights has no gradient, and training would go on without the layers' own.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def check_trainer_arguments(args: ComLoRAConfig, compute_loss_func: Any, optimizer: Any) -> None:
    """Refuses options of TRL that the selector, or rates of the branches' own, can't go with.

    Raises:
        ValueError: naming the option, the reason and the fix.
    """
    losses = {
        "loss_type='dft'": args.loss_type == "dft",
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "compute_loss_func": compute_loss_func is not None,
    }
    for option, given in losses.items():
        if given and args.comlora_selector and args.comlora_k > 1:
            raise ValueError(
                f"{option} does not work with the selector of K={args.comlora_k} branches, which weighs each row's "
                "negative log-likelihood (eq. 5-9): leave it out, or set comlora_selector=False."
            )
    refused = {
        "optimizers": (
            optimizer is not None
            and (args.comlora_selector_learning_rate is not None or args.comlora_branch_learning_rates is not None),
            "comlora_selector_learning_rate and comlora_branch_learning_rates need the optimizer to be made here",
        ),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise ValueError(f"{option} does not work with competing branches: {reason}. Leave it out.")


def prepare_model(
    model: str | PreTrainedModel,
    args: ComLoRAConfig,
    processing_class: Any,
    quantization_config: Any,
    peft_config: PeftConfig | None,
) -> tuple[ComLoRAModel, Any, list[str]]:
    """The branches, loaded if need be, and the tokenizer that goes with them.

    Returns:
        the model, its tokenizer or processor, and the options that have been seen to here.
    """
    name, done = None, []
    if isinstance(model, str):
        name, model, done = model, load_model(model, args, quantization_config), ["model_init_kwargs"]
    branches = build_comlora_model(model, peft_config, args)
    if name is not None and (revision := base_revision(name, branches, args)) is not None:
        for config in branches.peft_config.values():
            config.revision = revision
    template = args.chat_template_path
    adopted = template is not None and not os.path.isfile(template)
    if processing_class is None and (adopted or name is not None):
        processing_class = load_processing_class(name, branches, args)
    if adopted:
        adopt_chat_template(template, branches, processing_class)
        done.append("chat_template_path")
    if checkpointing_kwargs(args).get("selective"):
        # TRL wraps the method of the PEFT model, and the Trainer calls the base model's
        enable_selective_activation_checkpointing(branches.get_base_model())
    return branches, processing_class, done


def use_plain_checkpointing(args: ComLoRAConfig) -> None:
    """Takes the non-reentrant kind of checkpointing where the reentrant one is asked for, and says so.

    Both give the same gradients; the reentrant kind can't follow the batch as it widens to K branches.
    """
    kwargs = checkpointing_kwargs(args)
    if args.gradient_checkpointing and kwargs.get("use_reentrant"):
        logger.warning("reentrant checkpointing is asked for: the non-reentrant kind runs, with the same gradients.")
        for name in _CHECKPOINTING_KWARGS:
            if hasattr(args, name):
                setattr(args, name, {**kwargs, "use_reentrant": False})


def checkpointing_kwargs(args: ComLoRAConfig) -> dict[str, Any]:
    """The options of checkpointing, by the newer of transformers' names for it where there are both."""
    return next((getattr(args, name) for name in _CHECKPOINTING_KWARGS if getattr(args, name, None)), {})


def adopt_chat_template(path: str, model: PreTrainedModel, processing_class: Any) -> None:
    """Gives a tokenizer the chat template and end-of-turn token of another one, named by TRL's `chat_template_path`.

    Raises:
        ValueError: if these hold tokens the model does not know, for no branch trains their embeddings.
    """
    source = AutoTokenizer.from_pretrained(path)
    template = source.get_chat_template()
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    known = tokenizer.get_vocab()
    # Reserved tokens are in no text; some templates put theirs together from pieces, which only a conversation shows
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    written = template + source.apply_chat_template(conversation, tokenize=False) + (source.eos_token or "")
    if unknown := [t for t in map(str, source.added_tokens_decoder.values()) if t in written and t not in known]:
        raise ValueError(
            f"chat_template_path={path} brings tokens the model does not know ({', '.join(unknown[:3])}), and no "
            "branch trains embeddings: choose a tokenizer whose tokens it knows, or give a Jinja file."
        )
    processing_class.chat_template = template
    tokenizer.eos_token = source.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def warn_of_newer_trl() -> None:
    """Says in a line when TRL is newer than the one that this was tested with."""
    if Version(trl.__version__).release[:2] > TESTED_TRL:
        tested = ".".join(map(str, TESTED_TRL))
        logger.warning(f"trl {trl.__version__} is newer than {tested}, with which comlora-trl was tested.")


@contextmanager
def without(args: ComLoRAConfig, *names: str) -> Iterator[None]:
    """Leaves out options that have been seen to already, for as long as the block runs."""
    given = {name: getattr(args, name) for name in names}
    for name in names:
        setattr(args, name, None)
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(args, name, value)


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

"""Checks of a trainer's arguments before TRL builds anything. An argument that branches don't support is an error."""

from typing import Any

import torch
import trl
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from packaging.version import Version
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import get_config_model_id

from comlora_trl.training.config import CompetitionConfig
from comlora_trl.training.export import check_target, check_writable

TESTED_TRL = (1, 16)
_CHECKPOINTING_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")

logger = get_logger(__name__)


def settle_arguments(
    args: TrainingArguments | None,
    config: type[CompetitionConfig],
    model: str | PreTrainedModel,
    name: str,
    train_dataset: Any,
    optimizer: Any = None,
    compute_loss_func: Any = None,
) -> CompetitionConfig:
    """Completes and checks a trainer's arguments before anything is built.

    Args:
        args: the given arguments: an instance of `config`, a configuration of TRL, or None for the defaults.
        config: the class of the trainer's configuration.
        model: the model or its name, for the default folder.
        name: the trainer's name, for the default folder.
        train_dataset: the training set.
        optimizer: the optimizer that the user made, or None.
        compute_loss_func: the user's loss function, or None.

    Returns:
        the arguments as an instance of `config`.

    Raises:
        ValueError: if an argument does not work with branches.
        OSError: if a folder can't be written, or the winner's folder is not empty.
    """
    if args is None:
        base = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config(f"{base.rstrip('/').split('/')[-1] or 'model'}-{name.replace(' ', '-')}")
    elif not isinstance(args, config):
        args = config.from_arguments(args)
    warn_of_newer_trl()
    check_trainer_arguments(args, compute_loss_func, optimizer)
    use_plain_checkpointing(args)
    if args.should_save:
        check_writable(args.output_dir, "output_dir")
        check_target(args.winner_dir, args.comlora_overwrite_winner)
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: give a Dataset or an IterableDataset to train on.")
    return args


def check_trainer_arguments(args: CompetitionConfig, compute_loss_func: Any, optimizer: Any) -> None:
    """Checks options of TRL that don't work without a GPU, with a selector, or with different rates of the branches.

    Raises:
        ValueError: if there is one; the message names the option, the reason and the fix.
    """
    losses = {
        "loss_type='dft'": getattr(args, "loss_type", None) == "dft",
        "label_smoothing_factor": args.label_smoothing_factor > 0,
        "compute_loss_func": compute_loss_func is not None,
    }
    for option, given in losses.items():
        if given and args.comlora_selector and args.comlora_k > 1:
            raise ValueError(
                f"{option} does not work with the selector of K={args.comlora_k} branches, which weighs each row's "
                "negative log-likelihood (eq. 5-9): leave it out, or set comlora_selector=False."
            )
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError(
            "activation_offloading=True is not possible without a GPU, from which it moves activations to the CPU: "
            "leave it out."
        )
    refused = {
        "optimizers": (
            optimizer is not None
            and (args.comlora_selector_learning_rate is not None or args.comlora_branch_learning_rates is not None),
            "comlora_selector_learning_rate, comlora_tournament and comlora_branch_learning_rates need the optimizer "
            "to be made here",
        ),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise ValueError(f"{option} does not work with competing branches: {reason}. Leave it out.")


def use_plain_checkpointing(args: CompetitionConfig) -> None:
    """Replaces reentrant gradient checkpointing by the non-reentrant kind, with a warning.

    Both give the same gradients. The reentrant kind does not work if the batch is repeated for K branches in between.
    """
    kwargs = checkpointing_kwargs(args)
    if args.gradient_checkpointing and kwargs.get("use_reentrant"):
        logger.warning(
            "reentrant checkpointing is asked for: the non-reentrant kind runs, and gives the same gradients."
        )
        for name in _CHECKPOINTING_KWARGS:
            if hasattr(args, name):
                setattr(args, name, {**kwargs, "use_reentrant": False})


def checkpointing_kwargs(args: CompetitionConfig) -> dict[str, Any]:
    """The options of gradient checkpointing. transformers has two names for them; the newer one comes first."""
    return next((getattr(args, name) for name in _CHECKPOINTING_KWARGS if getattr(args, name, None)), {})


def warn_of_newer_trl() -> None:
    """Logs a warning if TRL is newer than the version that this package was tested with."""
    if Version(trl.__version__).release[:2] > TESTED_TRL:
        tested = ".".join(map(str, TESTED_TRL))
        logger.warning(f"trl {trl.__version__} is newer than {tested}, with which comlora-trl was tested.")


def check_parallelism(accelerator: Accelerator, args: CompetitionConfig) -> None:
    """Checks the kind of parallelism.

    Raises:
        ValueError: if the competition does not support it.
    """
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

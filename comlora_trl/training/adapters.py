"""The LoRA configuration of the branches: the default, and checks of a given configuration.

A configuration that does not work with branches raises an error here, before training starts.
"""

import copy
from collections.abc import Collection

from accelerate.logging import get_logger
from peft import LoraConfig, PeftConfig, PeftType, TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from comlora_trl import compat

DEFAULT_RANK = 8
DEFAULT_ALPHA = 16
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
# PEFT's names for the head of a classifier
HEADS = ("classifier", "score")
_ATTENTION = {"q_proj", "k_proj", "v_proj"}
# Initialisations that change the base weights for each adapter, so that K adapters can't share the base
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Initialisations that compute a matrix from the base or the data, which would be the same for every branch
_FIXED_INITIALISATIONS = {"eva": "takes its A from the data", "mica": "takes its B from the base"}
# Names of layers that PEFT treats as experts and routers if a model has these in fused parameters
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}

logger = get_logger(__name__)


class ProposedTargets(set[str]):
    """Target modules that are only a proposal, such as the default of a command.

    If a model does not have all of them, other modules are used. Target modules in any other collection were chosen by
    the user and are not changed.
    """


def complete_lora_config(config: PeftConfig | None, model: PreTrainedModel) -> PeftConfig:
    """The given configuration or the default one, with target modules that the model has.

    Args:
        config: the configuration; None for [`default_lora_config`]. If it has no target modules, PEFT's choice for the
            model is used. If PEFT has no choice for it, or if the model does not have all [`ProposedTargets`], the
            targets are [`default_targets`].
        model: the base model.
    """
    if config is None:
        config = default_lora_config(model)
        targets = ", ".join(sorted(config.target_modules))
        logger.warning(
            f"no peft_config is given: each branch is a LoRA of rank {config.r} on {targets} (TRL would train the "
            "whole model)."
        )
        return config
    if not isinstance(config, LoraConfig) or config.target_parameters:
        return config
    proposed = config.target_modules
    if proposed is None:
        known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        lacks = "is a model that PEFT proposes no target modules for"
    else:
        known = not isinstance(proposed, ProposedTargets) or _linear_layers(model).keys() >= proposed
        lacks = (
            f"does not have all of {', '.join(name for name in DEFAULT_TARGETS if name in proposed)}"
            if not known
            else ""
        )
    if known:
        return config
    targets = default_targets(model)
    logger.warning(
        f"{type(model).__name__} {lacks}: the branches adapt {', '.join(targets)} instead; choose others with "
        "target_modules (scripts/sft.py: --lora_target_modules)."
    )
    config = copy.deepcopy(config)
    config.target_modules = set(targets)
    return config


def default_lora_config(model: PreTrainedModel) -> LoraConfig:
    """Rank 8 and alpha 16 on the paper's q, k, v, up and down projections, or on the model's [`default_targets`]."""
    targets = default_targets(model)
    return LoraConfig(r=DEFAULT_RANK, lora_alpha=DEFAULT_ALPHA, target_modules=targets, task_type="CAUSAL_LM")


def default_targets(model: PreTrainedModel) -> list[str]:
    """The names of the layers to adapt by default. The first of these choices that fits the model:

    1. The paper's five names, as far as the model has them, if q, k and v are among them.
    2. PEFT's choice for this type of model.
    3. All linear layers that see every token.

    The first two must adapt something in every decoder layer. Routed experts, routers and the LM head are never
    adapted.

    Raises:
        ValueError: if the model has no such layer.
    """
    found = _linear_layers(model)
    everywhere = set().union(*found.values())
    of_the_paper = [name for name in DEFAULT_TARGETS if name in found]
    by_peft = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
    for names in (of_the_paper if set(of_the_paper) >= _ATTENTION else [], by_peft):
        fits = names and isinstance(names, list) and found.keys() >= set(names)
        if fits and set().union(*(found[name] for name in names)) == everywhere:
            return names
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layers in a stack of layers, which the branches adapt by default: "
            "pass peft_config=LoraConfig(target_modules=[...])."
        )
    return list(found)


def _linear_layers(model: nn.Module) -> dict[str, set[str]]:
    """The names of the linear layers that see every token, each with the paths of the decoder layers that have it."""
    found: dict[str, set[str]] = {}
    widest: dict[str, int] = {}
    unfit = _EXPERT_NAMES.copy() if _has_fused_experts(model) else set()
    for path, module in model.named_modules():
        sizes = _sizes(module)
        *parents, name = path.split(".")
        numbers = [place for place, part in enumerate(parents) if part.isdigit()]
        if not sizes or not numbers or name.isdigit():  # a number as target would also match the decoder layers
            continue
        if len(numbers) > 1:  # a list inside a decoder layer holds experts
            unfit.add(name)
        # The kernels of a state-space block read the weights of all layers but in_proj without calling the layers
        if hasattr(model.get_submodule(".".join(parents)), "A_log") and not name.startswith("in_proj"):
            continue
        found.setdefault(name, set()).add(".".join(parents[: numbers[0] + 1]))
        widest[name] = max(widest.get(name, 0), min(sizes))
    found = {name: layers for name, layers in found.items() if name not in unfit}
    # Layers as narrow as an adapter, such as gates, are left out; in a very small model all layers are that narrow
    wide = {name: found[name] for name in found if name in DEFAULT_TARGETS or widest[name] > DEFAULT_RANK}
    return wide or found


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _has_fused_experts(model: nn.Module) -> bool:
    """Whether a parameter of the model holds the matrices of several experts."""
    for module in model.modules():
        shapes = [getattr(p, "ds_shape", p.shape) for p in module.parameters(recurse=False)]
        if any(len(shape) > 2 for shape in shapes) and not compat.is_convolution(module):
            return True
    return False


def check_model(model: PreTrainedModel) -> None:
    """Checks that a model is not an encoder-decoder model.

    Raises:
        ValueError: if it is.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder: competing branches, like TRL's SFT, train causal "
            "language models only."
        )


def classifier_config(config: PeftConfig | None, model: PreTrainedModel) -> PeftConfig:
    """The configuration of an adapter that also trains a classifier's head, as PEFT does for `task_type="SEQ_CLS"`.

    The adapter's files must contain the head, because its initial weights are random and differ in every run.
    """
    config = copy.copy(complete_lora_config(config, model))
    given = list(getattr(config, "modules_to_save", None) or ())
    config.task_type = TaskType.SEQ_CLS
    config.modules_to_save = given + [name for name in HEADS if name not in given]
    return config


def check_lora_config(config: PeftConfig, k: int, heads: Collection[str] = ()) -> None:
    """Checks that K branches can have a configuration.

    Args:
        config: the configuration of each branch.
        k: number of branches.
        heads: modules that are allowed in `modules_to_save`; each branch trains a copy of them.

    Raises:
        TypeError: if it is not a LoRA configuration.
        ValueError: if a field does not work with branches; the message names it and says what to do.
    """
    if config.peft_type == PeftType.ADALORA:
        raise TypeError(
            "peft_config is an AdaLoraConfig, whose ranks shrink only by calls that TRL's trainers don't make: pass a "
            "LoraConfig with the rank you want."
        )
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"peft_config is a {type(config).__name__}: the branches are LoRA adapters, pass a LoraConfig."
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "LoraConfig(alora_invocation_tokens=...) makes an activated LoRA. PEFT's own forward activates it, which "
            "branches do not use, so it would never train: leave it out."
        )
    shared = (
        {}
        if k == 1
        else {
            "modules_to_save": [name for name in config.modules_to_save or () if name not in heads],
            "trainable_token_indices": config.trainable_token_indices,
            "layer_replication": config.layer_replication,
            "bias": config.bias if config.bias != "none" else None,
        }
    )
    for name, value in shared.items():
        if value:
            raise ValueError(
                f"LoraConfig({name}={value!r}) trains more than the LoRA matrices, but {k} branches can only have "
                f"separate LoRA matrices: leave {name} out, or use comlora_k=1."
            )
    method = str(config.init_lora_weights).lower()
    reasons = {**dict.fromkeys(_BASE_CHANGING, "changes the base weights"), **_FIXED_INITIALISATIONS}
    for name, reason in reasons.items():
        if k > 1 and method.startswith(name):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} {reason}, which {k} branches share: use True, "
                "'gaussian' or 'orthogonal', or comlora_k=1."
            )
    if config.target_parameters and method.startswith(_BASE_CHANGING):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, and an adapter on "
            "target_parameters can't be converted to the original base weights: use True or 'gaussian'."
        )

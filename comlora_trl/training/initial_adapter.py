"""An existing adapter that the branches start from: it is loaded, taken out of its model, and copied into the
branches.

Branch 0 starts with the adapter's weights. The other branches start with the same weights and small noise on A
([`START_NOISE`]). Without noise, equal branches would stay equal in a run without a selector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.utils import create_model_from_path

from comlora_trl.training.config import CompetitionConfig
from comlora_trl.training.model import ComLoRAModel
from comlora_trl.training.saved import matrix_names, redone_at_loading, takes_part_out

# Standard deviation of the noise, as a fraction of the standard deviation of the matrix A
START_NOISE = 0.01
# Two float32 weights count as equal if they differ by at most this fraction of their norm
_SAME = 1e-5
# Fields in which a peft_config may differ from the adapter to start from, because they don't change how the weights
# act
_FREE = {"lora_dropout", "init_lora_weights", "inference_mode", "base_model_name_or_path", "revision", "task_type"}


@dataclass(frozen=True)
class Start:
    """An adapter to start from.

    Attributes:
        config: the adapter's configuration.
        weights: the adapter's weights, by their names in PEFT's files.
        taken: the low-rank part that the adapter's initialisation took out of the base, by the names of the weights;
            empty if there is none.
        saved_config: fields of the configuration that must be in saved files. The base is already changed by them, so
            they are not in the configuration of the branches.
    """

    config: LoraConfig
    weights: dict[str, Tensor]
    taken: dict[str, Tensor]
    saved_config: dict[str, Any]


def load_adapter(name: str, config: PeftConfig, args: CompetitionConfig, quantization_config: Any = None) -> PeftModel:
    """Loads an adapter and the base model that it names. The base is loaded as TRL loads a model.

    Args:
        name: the adapter's hub id or folder.
        config: the result of [`adapter_config`].
        args: the training arguments.
        quantization_config: the quantisation of the base, or None.

    Raises:
        ValueError: if the quantisation is given twice.
    """
    kwargs = dict(args.model_init_kwargs or {})
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ValueError("quantization_config is given twice, as an argument and in model_init_kwargs: drop one.")
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each process holds the whole model
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    revision = kwargs.pop("revision", None)  # this is the revision of the adapter, not of the base
    base = create_model_from_path(config.base_model_name_or_path, **kwargs, revision=config.revision or "main")
    options = {} if revision is None else {"revision": revision}
    place = next(path for path, module in base.named_modules() if module is base.get_input_embeddings())
    rows = load_peft_weights(name, device="cpu", **options).get(f"base_model.model.{place}.weight")
    if rows is not None and len(rows) != base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(rows), mean_resizing=False)  # the adapter was trained on a resized vocabulary
    return PeftModel.from_pretrained(base, name, **options)


def load_processing_class(name: str, config: PeftConfig, args: CompetitionConfig) -> Any:
    """The tokenizer or processor of an adapter, or of its base if the adapter's folder has none."""
    source, revision = name, (args.model_init_kwargs or {}).get("revision")
    if Path(name).is_dir() and not (Path(name) / "tokenizer_config.json").is_file():
        source, revision = config.base_model_name_or_path, config.revision
    return AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)


def adapter_config(name: str, revision: str | None = None) -> PeftConfig | None:
    """The configuration of the adapter in a hub repository or folder; None if there is no adapter."""
    options = {} if revision is None else {"revision": revision}
    if find_adapter_config_file(name, **options) is None:
        return None
    return PeftConfig.from_pretrained(name, **options)


def take_apart(model: PeftModel) -> tuple[PreTrainedModel, Start]:
    """Separates a model with one adapter into the base model and the adapter to start from.

    Raises:
        ValueError: if the model has several adapters, or if the initialisation's change of the base can't be found.
    """
    if len(model.peft_config) != 1:
        raise ValueError(
            f"the model has the adapters {', '.join(model.peft_config)}, and the branches start from one: remove the "
            "others with delete_adapter(...)."
        )
    ((name, config),) = model.peft_config.items()
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: value.detach().clone() for key, value in weights.items()}
    layers = model.get_base_model().named_modules()
    scaling = {place: layer.scaling[name] for place, layer in layers if isinstance(layer, LoraLayer)}
    base = model.unload()
    again: dict[str, Any] = {"layer_replication": config.layer_replication} if config.layer_replication else {}
    if redone_at_loading(config, base):
        again |= {"init_lora_weights": config.init_lora_weights, "loftq_config": config.loftq_config}
    taken = part_taken_out(base, config, weights, scaling) if takes_part_out(config, base) else {}
    return base, Start(config, weights, taken, again)


def part_taken_out(
    base: PreTrainedModel, config: LoraConfig, weights: Mapping[str, Tensor], scaling: Mapping[str, float]
) -> dict[str, Tensor]:
    """The low-rank part that an adapter's initialisation took out of the base, as matrices A0 and B0.

    The part is the difference between the given base and the base that the adapter names, which is loaded to compute
    it. If the base has no name, the adapter's weights must still be the initial ones, and are themselves the part;
    this can be tested for PiSSA and OLoRA.

    Args:
        base: the base model, without the adapter.
        config: the adapter's configuration.
        weights: the adapter's weights, by their names in PEFT's files.
        scaling: the scaling of each adapted layer, by the layer's name in the base.

    Returns:
        the matrices by the names of the adapter's weights; empty if the base was not changed.

    Raises:
        ValueError: if the part can't be determined.
    """
    method, name = config.init_lora_weights, config.base_model_name_or_path or base.name_or_path
    advice = (
        "convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) and start from "
        "what that saves, or start from the base model."
    )
    changed = f"the adapter to start from was initialised by {method!r}, which changed its base, and"
    if any(hasattr(p, "ds_id") or p.is_meta for p in base.parameters()):
        raise ValueError(f"{changed} the base given here is sharded, so the change can't be found: {advice}")
    named = None
    if name:
        try:
            named = type(base).from_pretrained(name, revision=config.revision, dtype=base.dtype)
        except (OSError, ValueError) as error:
            found = type(error).__name__
            raise ValueError(f"{changed} {name} can't be loaded to find the change ({found}): {advice}") from error
    taken = {}
    for layer, factor in scaling.items():
        keys = matrix_names(layer)
        a, b = (weights[key].detach().float().cpu() for key in keys)
        here = _as_matrix(base.get_submodule(layer))
        if named is None:
            known = _is_as_initialised(str(method).lower(), a, b, here, factor)
        else:
            there = _as_matrix(named.get_submodule(layer))
            known = there.shape == here.shape
            if known:
                a, b, rest = _low_rank((there - here) / factor, a.size(0))
                size = max(there.norm(), here.norm())
                known = rest * factor <= size * max(_SAME, 2 * torch.finfo(base.dtype).eps)
        if not known:
            what = f"differs from {name} by more than that" if name else "has no name to compare it with"
            raise ValueError(f"{changed} the base given here {what} ({layer}): {advice}")
        taken |= dict(zip(keys, (a, b), strict=True))
    # If PEFT did not repeat the initialisation when it loaded the adapter, the base is unchanged and all matrices are
    # 0
    return taken if any(matrix.count_nonzero() for matrix in taken.values()) else {}


def _is_as_initialised(method: str, a: Tensor, b: Tensor, weight: Tensor, factor: float) -> bool:
    """Whether A and B are still the matrices that an initialisation took out of a weight.

    Returns False for initialisations for which this can't be tested.
    """
    if method.startswith("pissa"):  # the columns of B are singular vectors that are no longer part of the weight
        return bool((b.T @ weight).norm() <= _SAME * b.norm() * weight.norm())
    if method.startswith("olora"):  # B is orthonormal, and A is its product with the original weight
        return bool((b.T @ (weight + factor * b @ a) - a).norm() <= _SAME * a.norm())
    return False


def _as_matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or Conv1D as a float32 matrix on the CPU, [out, in]."""
    weight = layer.weight.detach().float().cpu()
    return weight.T if isinstance(layer, Conv1D) else weight


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices A [rank, in] and B [out, rank] with B·A closest to a matrix, and the norm of the remainder."""
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws random numbers, which must not change the branches
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 8, *matrix.shape), niter=4)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:, :rank].T, u[:, :rank] * root
    return a, b, (matrix - b @ a).norm()


def check_same_shape(given: PeftConfig, start: LoraConfig) -> None:
    """Checks that a `peft_config` describes the same adapter as the one to start from.

    Raises:
        ValueError: if it does not; the message names the first difference.
    """
    for field in fields(start):
        wanted, found = _comparable(getattr(given, field.name, None)), _comparable(getattr(start, field.name))
        if field.name not in _FREE and wanted != found:
            raise ValueError(
                f"peft_config asks for {field.name}={wanted!r}, but the adapter to start from has {found!r}: leave "
                "peft_config out (scripts/sft.py: the --lora_ flags), or start from the base model."
            )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value or None


def start_branches(model: ComLoRAModel, start: Start) -> None:
    """Copies an adapter's weights into the branches, with noise for all but branch 0.

    Raises:
        ValueError: if names or shapes of the weights do not fit.
    """
    own = get_peft_model_state_dict(model, adapter_name=model.branch_names[0], save_embedding_layers=False)
    shapes, given = ({key: tuple(value.shape) for key, value in w.items()} for w in (own, start.weights))
    for key in sorted(shapes.keys() | given.keys()):
        if shapes.get(key) != given.get(key):
            raise ValueError(
                f"the adapter to start from does not fit: {key} is {given.get(key, 'missing')} there and "
                f"{shapes.get(key, 'missing')} here; start from an adapter of this base model."
            )
    for branch, name in enumerate(model.branch_names):
        weights = start.weights if branch == 0 else {k: _with_noise(k, v) for k, v in start.weights.items()}
        set_peft_model_state_dict(model, weights, adapter_name=name)
    model.taken, model.saved_config = start.taken, start.saved_config


def _with_noise(name: str, weight: Tensor) -> Tensor:
    if "lora_A" not in name and "lora_embedding_A" not in name:
        return weight
    return weight + START_NOISE * weight.std() * torch.randn_like(weight)

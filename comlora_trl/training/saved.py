"""The content of a written adapter.

Everything that writes one asks here: the winner's export, retired branches, checkpoints, pushes. Two rules decide.

- An adapter holds every tensor that PEFT would have saved with it: LoRA matrices, `modules_to_save`, trained tokens,
  trained biases, and the embeddings if the vocabulary was resized.
- An adapter is for the base that it names. Some initialisations (PiSSA, OLoRA, CorDA, LoRA-GA) take a low-rank part
  out of the base. Then the adapter holds the difference to the named base, as an ordinary LoRA of twice the rank.
"""

import copy
import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from comlora_trl import compat
from comlora_trl.training.sharding import plain_name

WEIGHTS_FILE = "adapter_model.safetensors"
# Initialisations that take a low-rank part out of the base weights: W becomes W - s·B0·A0
_TAKE_PART_OUT = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as PEFT writes it; nothing of the model is needed any more.

    Attributes:
        config: the adapter's configuration.
        weights: under their names in PEFT's files, on the CPU.
    """

    config: LoraConfig
    weights: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes an ordinary PEFT adapter into an existing folder."""
        save_file(self.weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def names_to_save(model: PeftModel, adapter: str) -> dict[str, str]:
    """The tensors that PEFT would save for an adapter: from the name in its files to the name in the model.

    The names in the model are those without any wrapper (see [`plain_name`]).
    """
    marks = {name: torch.empty(0) for name in _state_names(model)}
    known = {id(mark): name for name, mark in marks.items()}
    config = model.peft_config[adapter]
    embeddings = True if _was_resized(model, config) else "auto"
    named, config.base_model_name_or_path = config.base_model_name_or_path, None  # else PEFT asks the hub each time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT comments on the embeddings each time
            saved = get_peft_model_state_dict(model, marks, adapter, save_embedding_layers=embeddings)
    finally:
        config.base_model_name_or_path = named
    return {plain_name(key): plain_name(known[id(mark)]) for key, mark in saved.items()}


def saved_adapter(
    model: PeftModel,
    adapter: str,
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    changes: Mapping[str, Any],
) -> SavedAdapter:
    """An adapter of a model as it is to be written.

    Args:
        names: of [`names_to_save`].
        state: whole values of the model's tensors, by their names in the model.
        taken: the part that the base lacks, as [`taken_part`] gives it.
        changes: fields of the configuration that differ in the file.

    Raises:
        KeyError: if the state lacks a tensor that PEFT would save.
    """
    config = config_to_save(model, adapter, taken, changes)
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, own in names.items():
        value = state[own].detach().cpu().contiguous()
        weights[key] = value.clone() if value.data_ptr() in seen else value  # tied weights are written twice
        seen.add(value.data_ptr())
    return SavedAdapter(config, _for_the_named_base(weights, taken) if taken else weights)


def config_to_save(
    model: PeftModel, adapter: str, taken: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> LoraConfig:
    """The configuration in an adapter's files; arguments as for [`saved_adapter`]."""
    config, base = copy.deepcopy(model.peft_config[adapter]), model.get_base_model()
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    for field, value in changes.items():
        setattr(config, field, value)
    if taken:
        config.init_lora_weights = True
        factor = math.sqrt(2) if config.use_rslora else 2  # the scaling is alpha / sqrt(r), or alpha / r
        config.r, config.lora_alpha = config.r * 2, config.lora_alpha * factor
        config.rank_pattern = {name: rank * 2 for name, rank in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {name: alpha * factor for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def put_back(base: nn.Module, taken: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
    """Gives a base without adapters the part that an initialisation took out of it.

    Args:
        scaling: of each adapted layer, by its name in the base.
    """
    for place, factor in scaling.items():
        a, b = (taken.get(key) for key in matrix_names(place))
        if a is not None and a.dim() == 2:
            layer = base.get_submodule(place)
            part = factor * b.float() @ a.float()
            weight = layer.weight.data
            weight += (part.T if isinstance(layer, Conv1D) else part).to(weight)


def matrix_names(place: str) -> tuple[str, str]:
    """The names in PEFT's files of A and B of an adapted linear layer, by its name in the base."""
    return f"base_model.model.{place}.lora_A.weight", f"base_model.model.{place}.lora_B.weight"


def takes_part_out(config: LoraConfig, base: nn.Module) -> bool:
    """Whether an adapter's initialisation takes a low-rank part out of the base weights, and nothing else."""
    return _method(config).startswith(_TAKE_PART_OUT) and not _is_quantised(base)


def redone_at_loading(config: LoraConfig, base: nn.Module) -> bool:
    """Whether an initialisation changes the base by more than a low-rank part: it rounds the weights.

    No adapter can hold that. PEFT does it again where it loads the adapter, and the weights decide how it comes out.
    """
    return _method(config) == "loftq" or (_method(config) == "olora" and _is_quantised(base))


def _method(config: LoraConfig) -> str:
    return str(config.init_lora_weights).lower()


def _is_quantised(base: nn.Module) -> bool:
    return getattr(base, "quantization_method", None) is not None


def taken_part(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The matrices of a new adapter, by their names in PEFT's files: the part that its initialisation took out."""
    names, tensors = names_to_save(model, adapter), dict(model.named_parameters())
    return {key: tensors[own].detach().cpu().clone() for key, own in names.items() if rank_dimension(key) is not None}


def rank_dimension(key: str) -> int | None:
    """The dimension of a matrix in PEFT's files that its rank is the size of; None for other tensors."""
    kind = key.removesuffix(".weight").rpartition(".")[2]
    return {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(kind)


def trained_half(key: str, value: Tensor, taken: Mapping[str, Tensor], source: Path) -> Tensor:
    """The branch's own matrix, from one that was written as a difference to the named base.

    Raises:
        ValueError: if the difference was to another initialisation than this run's.
    """
    dim = rank_dimension(key)
    if key not in taken or dim is None or value.size(dim) == taken[key].size(dim):
        return value
    own, other = value.chunk(2, dim)
    other = -other if dim == 1 else other
    if not torch.allclose(other, taken[key].to(other), rtol=1e-3, atol=1e-3 * taken[key].abs().max().item()):
        raise ValueError(
            f"{source} was trained on a base that another initialisation has changed: give the run the same "
            "init_lora_weights, seed and data for it as before, or start from the exported adapter."
        )
    return own.contiguous()


def _for_the_named_base(weights: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`B·A - B0·A0` as one LoRA of twice the rank and the same scaling, which every loader can put on the named base.

    PEFT's `path_initial_model_for_weight_conversion` makes the same of an adapter in a file.
    """
    converted = {}
    for key, value in weights.items():
        dim = rank_dimension(key)
        if dim is not None:
            other = taken[key].to(value) if key in taken else torch.zeros_like(value)
            value = torch.cat([value, -other if dim == 1 else other], dim)
        converted[key] = value
    return converted


def _state_names(model: nn.Module) -> Iterator[str]:
    """Names of the tensors of `state_dict()`, tied ones by each of their names, without gathering any."""
    for path, module in model.named_modules():
        for name in (*compat.parameters_of(module), *compat.persistent_buffers_of(module)):
            if getattr(module, name) is not None:
                yield f"{path}.{name}" if path else name


def _was_resized(model: PeftModel, config: LoraConfig) -> bool:
    """Whether the vocabulary has another size than that of the base that the adapter names.

    PEFT's own check takes it for the same when there is no network, though the configuration is in the cache; and it
    does not look at the text part of a multimodal model.
    """
    name, own = config.base_model_name_or_path, model.get_base_model().config
    if not name:
        return False
    try:
        # A folder may change, a commit on the hub does not
        find = _named_vocabulary.__wrapped__ if Path(name).is_dir() else _named_vocabulary
        return find(type(own), name, config.revision) != _vocabulary(own)
    except (OSError, ValueError):
        return False


@functools.lru_cache
def _named_vocabulary(kind: type[PretrainedConfig], name: str, revision: str | None) -> int | None:
    return _vocabulary(kind.from_pretrained(name, revision=revision))


def _vocabulary(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)

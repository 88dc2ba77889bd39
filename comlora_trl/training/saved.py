"""The content of a saved adapter.

All code that writes adapters uses this module: the winner's export, retired branches, checkpoints and pushes to the
    hub.
There are two rules.

- An adapter's file has every tensor that PEFT would save: LoRA matrices, `modules_to_save`, trained tokens, trained
  biases, and the embeddings if the vocabulary was resized.
- An adapter must work on the base that it names. Some initialisations (PiSSA, OLoRA, CorDA, LoRA-GA) take a low-rank
  part out of the base weights. The file then has the difference to the named base, as an ordinary LoRA of twice the
  rank.
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
# Initialisations that take a low-rank part out of the base weights: W becomes W − s·B0·A0, where s is the scaling
_TAKE_PART_OUT = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class SavedAdapter:
    """The content of an adapter's files. The model is not needed to write them.

    Attributes:
        config: the adapter's configuration.
        weights: the weights on the CPU, by their names in PEFT's files.
    """

    config: LoraConfig
    weights: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Writes an ordinary PEFT adapter into an existing folder."""
        save_file(self.weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def names_to_save(model: PeftModel, adapter: str) -> dict[str, str]:
    """The tensors that PEFT would save for an adapter: a dict from the name in PEFT's files to the name in the model.

    The names in the model are those without wrappers, see [`plain_name`].
    """
    marks = {name: torch.empty(0) for name in _state_names(model)}
    known = {id(mark): name for name, mark in marks.items()}
    config = model.peft_config[adapter]
    embeddings = True if _was_resized(model, config) else "auto"
    named, config.base_model_name_or_path = config.base_model_name_or_path, None  # with a name, PEFT would ask the hub
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT would warn about the embeddings
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
    """The content of an adapter's files.

    Args:
        model: the model.
        adapter: the adapter's name.
        names: the result of [`names_to_save`].
        state: the model's tensors (whole, not sharded), by their names in the model.
        taken: the result of [`taken_part`]; empty if nothing was taken out of the base.
        changes: fields of the configuration that differ in the file.

    Raises:
        KeyError: if `state` lacks a tensor that PEFT would save.
    """
    config = config_to_save(model, adapter, taken, changes)
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, own in names.items():
        value = state[own].detach().cpu().contiguous()
        weights[key] = value.clone() if value.data_ptr() in seen else value  # safetensors can't write shared memory
        seen.add(value.data_ptr())
    return SavedAdapter(config, _for_the_named_base(weights, taken) if taken else weights)


def config_to_save(
    model: PeftModel, adapter: str, taken: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> LoraConfig:
    """The configuration that is written into an adapter's files. The arguments are those of [`saved_adapter`]."""
    config, base = copy.deepcopy(model.peft_config[adapter]), model.get_base_model()
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    for field, value in changes.items():
        setattr(config, field, value)
    if taken:
        config.init_lora_weights = True
        # Twice the rank must give the same scaling, which is alpha / sqrt(r) with rsLoRA and else alpha / r
        factor = math.sqrt(2) if config.use_rslora else 2
        config.r, config.lora_alpha = config.r * 2, config.lora_alpha * factor
        config.rank_pattern = {name: rank * 2 for name, rank in (config.rank_pattern or {}).items()}
        config.alpha_pattern = {name: alpha * factor for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def put_back(base: nn.Module, taken: Mapping[str, Tensor], scaling: Mapping[str, float]) -> None:
    """Adds the part that an initialisation took out of a base model to its weights again, in place.

    Args:
        base: the base model, without adapters.
        taken: the result of [`taken_part`].
        scaling: the scaling of each adapted layer, by the layer's name in the base.
    """
    for place, factor in scaling.items():
        a, b = (taken.get(key) for key in matrix_names(place))
        if a is not None and a.dim() == 2:
            layer = base.get_submodule(place)
            part = factor * b.float() @ a.float()
            weight = layer.weight.data
            weight += (part.T if isinstance(layer, Conv1D) else part).to(weight)


def matrix_names(place: str) -> tuple[str, str]:
    """The names of A and B in PEFT's files, for an adapted linear layer with the name `place` in the base."""
    return f"base_model.model.{place}.lora_A.weight", f"base_model.model.{place}.lora_B.weight"


def takes_part_out(config: LoraConfig, base: nn.Module) -> bool:
    """Whether an adapter's initialisation changes the base weights only by taking out a low-rank part."""
    return _method(config).startswith(_TAKE_PART_OUT) and not _is_quantised(base)


def redone_at_loading(config: LoraConfig, base: nn.Module) -> bool:
    """Whether an initialisation also rounds the base weights, which an adapter's file can't describe.

    PEFT repeats such an initialisation when it loads the adapter, so the configuration must name it.
    """
    return _method(config) == "loftq" or (_method(config) == "olora" and _is_quantised(base))


def _method(config: LoraConfig) -> str:
    return str(config.init_lora_weights).lower()


def _is_quantised(base: nn.Module) -> bool:
    return getattr(base, "quantization_method", None) is not None


def taken_part(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """The part that the initialisation of a new adapter took out of the base: the adapter's present matrices.

    Returns:
        copies of the matrices on the CPU, by their names in PEFT's files.
    """
    names, tensors = names_to_save(model, adapter), dict(model.named_parameters())
    return {key: tensors[own].detach().cpu().clone() for key, own in names.items() if rank_dimension(key) is not None}


def rank_dimension(key: str) -> int | None:
    """The dimension of a LoRA matrix that has the size of the rank, by its name in PEFT's files; None for others."""
    kind = key.removesuffix(".weight").rpartition(".")[2]
    return {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(kind)


def trained_half(key: str, value: Tensor, taken: Mapping[str, Tensor], source: Path) -> Tensor:
    """The branch's matrix, from a matrix that was saved as a difference to the named base.

    Args:
        key: name in PEFT's files.
        value: the saved matrix.
        taken: the result of [`taken_part`] in this run.
        source: the folder of the file, for the message.

    Returns:
        half of the matrix if it was saved with twice the rank; otherwise `value`.

    Raises:
        ValueError: if the other half is not the part that this run's initialisation took out of the base.
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
    """B·A − B0·A0 as one LoRA with twice the rank and the same scaling, which works on the named base.

    PEFT's `path_initial_model_for_weight_conversion` does the same conversion with files.
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
    """The names of the tensors in `state_dict()`, including all names of tied tensors. No tensor is gathered."""
    for path, module in model.named_modules():
        for name in (*compat.parameters_of(module), *compat.persistent_buffers_of(module)):
            if getattr(module, name) is not None:
                yield f"{path}.{name}" if path else name


def _was_resized(model: PeftModel, config: LoraConfig) -> bool:
    """Whether the model's vocabulary has another size than that of the base that the adapter names.

    PEFT's own check answers no if there is no network, even if the configuration is cached, and ignores the text
    configuration of a multimodal model.
    """
    name, own = config.base_model_name_or_path, model.get_base_model().config
    if not name:
        return False
    try:
        # A folder may change during a run, so the result is cached for hub ids only
        find = _named_vocabulary.__wrapped__ if Path(name).is_dir() else _named_vocabulary
        return find(type(own), name, config.revision) != _vocabulary(own)
    except (OSError, ValueError):
        return False


@functools.lru_cache
def _named_vocabulary(kind: type[PretrainedConfig], name: str, revision: str | None) -> int | None:
    return _vocabulary(kind.from_pretrained(name, revision=revision))


def _vocabulary(config: PretrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)

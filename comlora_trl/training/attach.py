"""Attaches the branches to the model that TRL built.

TRL's `__init__` loads, quantises and prepares a model. It gets the configuration of a stand-in adapter of rank 1, so
that it does everything that it does for PEFT models. Afterwards the stand-in is removed and the branches are added.

Some work must be done before TRL's `__init__`. The docstrings and comments say why.
"""

import copy
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import get_config_model_id

from comlora_trl import compat
from comlora_trl.branches.layers import BranchLayer
from comlora_trl.training.adapters import (
    HEADS,
    check_lora_config,
    check_model,
    classifier_config,
    complete_lora_config,
)
from comlora_trl.training.arguments import checkpointing_kwargs
from comlora_trl.training.config import CompetitionConfig
from comlora_trl.training.initial_adapter import (
    adapter_config,
    check_same_shape,
    load_adapter,
    load_processing_class,
    start_branches,
    take_apart,
)
from comlora_trl.training.model import ComLoRAModel

# This fits any model. The branches' target modules may depend on layers that are known only after TRL loads the model
_STAND_IN = {"r": 1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Layers that PEFT refuses to adapt in some models with state-space blocks
_STAND_IN |= {"exclude_modules": ["out_proj", "conv1d"]}


class Attachment:
    """The model and the adapter configuration that a trainer was given, and their conversion into branches.

    Args:
        model: the hub id or folder of a model or an adapter; a base model; a `PeftModel` with one LoRA adapter to
            start from; or the branches of an earlier trainer.
        peft_config: configuration of every branch; None for the default one, or for that of the adapter to start from.
        args: the run's configuration.
        processing_class: the tokenizer or processor; None for the model's.
        quantization_config: quantisation of a model that is given by its name.
        classifier: whether the model is a classifier, of whose head each branch trains a copy.

    Raises:
        TypeError: if `peft_config` is not a LoRA configuration.
        ValueError: if the model or the configuration does not work with competing branches.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        peft_config: PeftConfig | None,
        args: CompetitionConfig,
        processing_class: Any = None,
        quantization_config: Any = None,
        classifier: bool = False,
    ) -> None:
        self.args, self.peft_config, self.given = args, peft_config, model
        self.classifier, self.heads = classifier, HEADS if classifier else ()
        self.name: str | None = None
        self._handled: dict[str, Any] = {}
        revision = (args.model_init_kwargs or {}).get("revision")
        if isinstance(model, str):
            self.name = model
            # Loaded here, because TRL would let transformers load the adapter, and the result is not a PeftModel
            self._adapter = adapter_config(model, revision)
            if self._adapter is not None:
                self.given = load_adapter(model, self._adapter, args, quantization_config)
                processing_class = processing_class or load_processing_class(model, self._adapter, args)
                self._handled["model_init_kwargs"] = quantization_config = None
        if not isinstance(self.given, str):
            _check_given(self.given, peft_config, args, self.heads)
        if peft_config is not None and not isinstance(self.given, PeftModel):
            check_lora_config(peft_config, args.comlora_k, self.heads)
        self.processing_class, self.quantization_config = processing_class, quantization_config

    @contextmanager
    def building(self) -> Iterator[dict[str, Any]]:
        """The context of TRL's `__init__`.

        Yields:
            TRL's arguments for the model, the tokenizer, the quantisation and the adapter.
        """
        if isinstance(self.given, PeftModel) and not isinstance(self.given, ComLoRAModel):
            self.given.set_adapter(self.given.active_adapter)  # TRL ignores an adapter that does not train
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            self._take_chat_template(Path(folder))
            kept = {name: getattr(self.args, name) for name in self._handled}
            for name, value in self._handled.items():
                setattr(self.args, name, value)
            try:
                # PEFT warns about the stand-in's exclude_modules if the model has none of them
                warnings.filterwarnings("ignore", "You have passed exclude_modules", UserWarning)
                yield {
                    "model": self.given,
                    "processing_class": self.processing_class,
                    "quantization_config": self.quantization_config,
                    "peft_config": None if isinstance(self.given, PeftModel) else LoraConfig(**self._stand_in),
                }
            finally:
                for name, value in kept.items():
                    setattr(self.args, name, value)

    @property
    def _stand_in(self) -> dict[str, Any]:
        return _STAND_IN | ({"task_type": "SEQ_CLS"} if self.classifier else {})

    def _take_chat_template(self, folder: Path) -> None:
        """Writes the template of another tokenizer (`chat_template_path`) to a file, and gives TRL this file and the
        other tokenizer's end-of-turn token.

        Otherwise TRL's `clone_chat_template` would add all reserved tokens of that tokenizer and train the LM head by
        `modules_to_save`, which branches don't support.

        Raises:
            ValueError: if the template or the end-of-turn token has tokens that the model does not know.
        """
        path = getattr(self.args, "chat_template_path", None)
        if path is None or Path(path).is_file():
            return
        if self.processing_class is None:
            source = self.given if isinstance(self.given, str) else get_config_model_id(self.given.config)
            revision = (self.args.model_init_kwargs or {}).get("revision") if isinstance(self.given, str) else None
            trust = self.args.trust_remote_code
            self.processing_class = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust)
        source = AutoTokenizer.from_pretrained(path)
        template = source.get_chat_template()
        known = getattr(self.processing_class, "tokenizer", self.processing_class).get_vocab()
        # Only tokens that occur in a text matter, not reserved ones. Some templates build tokens from pieces, so a
        # short conversation is rendered too
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        written = template + source.apply_chat_template(conversation, tokenize=False) + (source.eos_token or "")
        tokens = map(str, source.added_tokens_decoder.values())
        if unknown := [token for token in tokens if token in written and token not in known]:
            raise ValueError(
                f"chat_template_path={path} brings tokens the model does not know ({', '.join(unknown[:3])}), and no "
                "branch trains embeddings: choose a tokenizer whose tokens it knows, or give a Jinja file."
            )
        file = folder / "chat_template.jinja"
        file.write_text(template, encoding="utf-8")
        self._handled |= {"chat_template_path": str(file)}
        if self.args.eos_token is None:
            self._handled |= {"eos_token": source.eos_token}

    def branches(self, built: PeftModel) -> ComLoRAModel:
        """Replaces TRL's adapter by the branches and the selector.

        The weights are drawn from the run's seed. The random state is restored.

        Args:
            built: `trainer.model` after TRL's `__init__`.

        Raises:
            TypeError, ValueError: as for this class.
        """
        args = self.args
        if isinstance(built, ComLoRAModel):
            return continue_branches(built, self.peft_config, args)
        trained: dict[bool, torch.dtype] = {}
        for name, parameter in built.named_parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                trained.setdefault(_is_of_head(name), parameter.dtype)
        start, config = None, self.peft_config
        if isinstance(self.given, PeftModel):
            existing = built.active_peft_config
            base, start = take_apart(built)
            # These fields describe changes of the base, which have been made already
            config = replace(
                config or existing,
                init_lora_weights=True,
                layer_replication=None,
                inference_mode=False,
                base_model_name_or_path=existing.base_model_name_or_path,
                revision=existing.revision,
            )
        else:
            base = built.unload()
            check_model(base)
            complete = classifier_config if self.classifier else complete_lora_config
            config = complete(config, base)
            check_lora_config(config, args.comlora_k, self.heads)
            config = copy.copy(config)
            # As in get_peft_model: the configuration names the base of the adapter
            config.base_model_name_or_path = base.name_or_path or config.base_model_name_or_path
        base.disable_input_require_grads()  # TRL enables this for reentrant checkpointing
        _keep_differentiable(base)
        device = base.get_input_embeddings().weight.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            branches = ComLoRAModel(base, config, args.comlora_k, args.selector_settings)
            _check_head(branches)
            if trained:
                _take_dtypes(branches, trained, args)
            if start is not None:
                start_branches(branches, start)
                # The layers of the given model now hold the branches, so its own method can't save its adapter
                self.given.save_pretrained = branches.save_pretrained
        if self.name is not None and (revision := self._base_revision(base)) is not None:
            for one in branches.peft_config.values():
                one.revision = revision
        if checkpointing_kwargs(args).get("selective"):
            # TRL has wrapped a method of the PEFT model, but the Trainer calls that of the base model
            enable_selective_activation_checkpointing(base)
        return branches

    def _base_revision(self, base: PreTrainedModel) -> str | None:
        """The hub commit that the base was loaded from; None for a local base."""
        options, source = self.args.model_init_kwargs or {}, get_config_model_id(base.config)
        asked = options.get("revision") if self._adapter is None else self._adapter.revision
        if not source or Path(source).is_dir():
            return None
        file = try_to_load_from_cache(source, "config.json", cache_dir=options.get("cache_dir"), revision=asked)
        return Path(file).parent.name if isinstance(file, str) else asked


def _check_given(
    model: PreTrainedModel, peft_config: PeftConfig | None, args: CompetitionConfig, heads: Collection[str] = ()
) -> None:
    """Checks that a loaded model can become branches, before TRL prepares the data.

    Raises:
        ValueError: if it can't.
    """
    if isinstance(model, ComLoRAModel):
        check_same_branches(model, peft_config, args)
        return
    if compat.has_adapter_of_transformers(model):
        raise ValueError(
            "the model was loaded with an adapter by transformers itself: give the adapter's folder or hub id as "
            "model, or load it with peft.PeftModel.from_pretrained."
        )
    if isinstance(model, PeftModel):
        existing = model.active_peft_config
        check_lora_config(replace(existing, init_lora_weights=True), args.comlora_k, heads)
        if peft_config is not None:
            check_same_shape(peft_config, existing)
    if any(isinstance(module, BranchLayer) for module in model.modules()):
        raise ValueError(
            "the model is the base of another trainer's branches, which are still in it: call unload() or "
            "merge_and_unload() on that trainer's model and give what comes back, or give that trainer's model itself."
        )
    check_model(model)


def check_same_branches(model: ComLoRAModel, peft_config: PeftConfig | None, args: CompetitionConfig) -> None:
    """Checks that the arguments ask for the branches and the selector that a model already has.

    Raises:
        ValueError: if they don't; the message names what the model has and what is asked for.
    """
    asked = {"comlora_k": args.comlora_k, "the selector": args.selector_settings}
    there = {"comlora_k": model.k, "the selector": model.selector_settings}
    for name, wanted in asked.items():
        if wanted != there[name]:
            raise ValueError(
                f"the model has competing branches already, with {name} {there[name]}, but {wanted} is asked for: "
                "give the base model, or an exported winner's folder, to start anew."
            )
    if peft_config is not None:
        check_same_shape(peft_config, next(iter(model.peft_config.values())))


def continue_branches(model: ComLoRAModel, peft_config: PeftConfig | None, args: CompetitionConfig) -> ComLoRAModel:
    """Reuses the branches of an earlier trainer. Branches that were retired or disqualified get new weights."""
    check_same_branches(model, peft_config, args)
    model.revive_branches()
    return model


def _check_head(model: ComLoRAModel) -> None:
    """Checks that no adapter is on the LM head, because TRL's loss reads the head's weight directly.

    Raises:
        ValueError: if there is one.
    """
    head, kind = model.get_base_model().get_output_embeddings(), type(model.get_base_model()).__name__
    if isinstance(head, TrainableTokensWrapper):
        raise ValueError(
            f"LoraConfig(trainable_token_indices=...) changes the LM head of {kind} too, which is tied to its "
            "embeddings, and TRL can't compute its loss from such a head: use modules_to_save with "
            "ensure_weight_tying=True instead."
        )
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            f"an adapter on the LM head of {kind} would never train, because TRL's loss reads the head's weight "
            "directly. Remove `'lm_head'` from your `target_modules`."
        )


def _is_of_head(name: str) -> bool:
    """Whether a parameter belongs to a module that an adapter saves whole, such as a classification head."""
    return "modules_to_save" in name


def _take_dtypes(model: ComLoRAModel, dtypes: dict[bool, torch.dtype], args: CompetitionConfig) -> None:
    """Gives the branches the dtype that TRL has given its own adapter and, under the key True, its own head.

    For both, this is bfloat16 on a quantised base, except for DoRA's magnitudes, and the dtype of the base under
    ZeRO-3. Otherwise a head has the dtype of the base. The selector trains in float32, except under ZeRO-3, which
    gathers only parameters of the same dtype together.
    """
    for branch in range(model.k):
        for name, parameter in model.named_branch_parameters(branch).items():
            dtype = dtypes.get(_is_of_head(name), parameter.dtype)
            if parameter.dtype != dtype and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(dtype)
    if model.selector is not None and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        model.selector.to(dtypes[False])  # ZeRO-3 still trains float32 copies


def _keep_differentiable(model: nn.Module) -> None:
    """Prevents bitsandbytes from repacking 4-bit weights on a CPU at the first evaluation.

    The repacking is permanent, and a product with repacked weights has no gradient.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False

"""Branches, attached to the model that TRL built.

TRL's `__init__` loads, quantises and prepares a model as for one LoRA adapter: it is given a stand-in of rank 1, and
does all that it does for PEFT models. Then the stand-in is taken off, and the branches are put in its place.

Before TRL comes what its lines leave no other place for; each function says which line that is.
"""

import copy
import tempfile
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

# It fits any model: the branches' own targets may depend on layers that are only known once TRL has loaded them
_STAND_IN = {"r": 1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Attachment:
    """What a trainer was asked to train, on its way through TRL's construction.

    Args:
        model: a hub id or folder, of a model or of an adapter; a base model; a `PeftModel` with one LoRA adapter to
            start from; or the branches of an earlier trainer.
        peft_config: configuration of every branch; None for the default one, or the adapter's to start from.
        args: the run's configuration.
        processing_class: the tokenizer or processor, None for the model's own.
        quantization_config: of a model that is given by its name.
        classifier: whether the model is a classifier, whose head each branch trains a copy of.

    Raises:
        TypeError: if `peft_config` is not a LoRA configuration.
        ValueError: if the model or the configuration can't be trained as competing branches.
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
            # TRL would have transformers load the adapter, by its own integration, which gives no PeftModel
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
        """Around TRL's construction: yields the arguments that it gets for model, tokenizer and adapter."""
        if isinstance(self.given, PeftModel) and not isinstance(self.given, ComLoRAModel):
            self.given.set_adapter(self.given.active_adapter)  # what does not train is no adapter to TRL
        with tempfile.TemporaryDirectory() as folder:
            self._take_chat_template(Path(folder))
            kept = {name: getattr(self.args, name) for name in self._handled}
            for name, value in self._handled.items():
                setattr(self.args, name, value)
            try:
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
        """Gives TRL the template of another tokenizer (`chat_template_path`) as a file, with its end-of-turn token.

        TRL's `clone_chat_template` would add every reserved token of that tokenizer, and train the LM head for them
        by `modules_to_save`, which branches do not have.

        Raises:
            ValueError: if template or end-of-turn token hold tokens that the model does not know.
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
        # Reserved tokens are in no text; some templates put theirs together from pieces, which a conversation shows
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
        """The branches and the selector on the base that TRL built, in the place of TRL's adapter.

        They are drawn from the seed as TRL draws an adapter; the random state is left as it was.

        Args:
            built: `trainer.model` after TRL's construction.
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
            # What these did to the base is done
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
            # As get_peft_model does: an adapter names the base that it is on
            config.base_model_name_or_path = base.name_or_path or config.base_model_name_or_path
        base.disable_input_require_grads()  # TRL's, for reentrant checkpointing of its own adapter
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
                # Its layers are the branches' now, by names that no adapter has
                self.given.save_pretrained = branches.save_pretrained
        if self.name is not None and (revision := self._base_revision(base)) is not None:
            for one in branches.peft_config.values():
                one.revision = revision
        if checkpointing_kwargs(args).get("selective"):
            # TRL wraps the method of the PEFT model, and the Trainer calls the base model's
            enable_selective_activation_checkpointing(base)
        return branches

    def _base_revision(self, base: PreTrainedModel) -> str | None:
        """The commit on the hub that the base was loaded at; None for a local one."""
        options, source = self.args.model_init_kwargs or {}, get_config_model_id(base.config)
        asked = options.get("revision") if self._adapter is None else self._adapter.revision
        if not source or Path(source).is_dir():
            return None
        file = try_to_load_from_cache(source, "config.json", cache_dir=options.get("cache_dir"), revision=asked)
        return Path(file).parent.name if isinstance(file, str) else asked


def _check_given(
    model: PreTrainedModel, peft_config: PeftConfig | None, args: CompetitionConfig, heads: Collection[str] = ()
) -> None:
    """Refuses a loaded model that can't become branches, before TRL prepares the data for it."""
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
    """Refuses arguments that ask for other branches, or another selector, than a model has.

    Raises:
        ValueError: naming what the model has and what is asked for.
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
    """Branches of an earlier trainer, for a new competition among them; those that were out are redrawn."""
    check_same_branches(model, peft_config, args)
    model.revive_branches()
    return model


def _check_head(model: ComLoRAModel) -> None:
    """Refuses adapters on the LM head, whose weight TRL's loss reads past them."""
    head, kind = model.get_base_model().get_output_embeddings(), type(model.get_base_model()).__name__
    if isinstance(head, TrainableTokensWrapper):
        raise ValueError(
            f"LoraConfig(trainable_token_indices=...) changes the LM head of {kind} too, which is tied to its "
            "embeddings, and TRL can't compute its loss from such a head: use modules_to_save with "
            "ensure_weight_tying=True instead."
        )
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            f"an adapter on the LM head of {kind} would never train, for TRL's loss reads the head's weight past it. "
            "Remove `'lm_head'` from your `target_modules`."
        )


def _is_of_head(name: str) -> bool:
    """Whether a parameter is of a module that an adapter saves whole, such as a classifier's head."""
    return "modules_to_save" in name


def _take_dtypes(model: ComLoRAModel, dtypes: dict[bool, torch.dtype], args: CompetitionConfig) -> None:
    """Gives the branches the precision that TRL has given its own adapter and, by the key True, its own head.

    TRL makes both bfloat16 over a quantised base, but for DoRA's magnitudes, and the base's own under ZeRO-3. A head
    has the base's elsewhere too. The selector trains in float32, but under ZeRO-3, which gathers parameters of one
    type at a time.
    """
    for branch in range(model.k):
        for name, parameter in model.named_branch_parameters(branch).items():
            dtype = dtypes.get(_is_of_head(name), parameter.dtype)
            if parameter.dtype != dtype and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(dtype)
    if model.selector is not None and args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        model.selector.to(dtypes[False])  # and trains by float32 masters, whatever its own type


def _keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on a CPU, which it does for good at the first evaluation.

    Its product with repacked weights has no gradient, and training would go on without the layers' own.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False

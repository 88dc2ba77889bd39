"""K LoRA branches and the selector as one PEFT model.

[`ComLoRAModel`] is a `PeftModelForCausalLM` whose adapters are named `branch_0` … `branch_{K-1}`, plus the selector.
DDP, FSDP and DeepSpeed wrap it whole; everything trainable runs inside its forward.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from comlora_trl.branch_pass import branch_nll_batched, branch_nll_in_chunks
from comlora_trl.competition import CompetitionSettings, row_weights, selection_probabilities
from comlora_trl.competition_state import SELECTOR_FILE, CompetitionState, branch_name, check_checkpoint
from comlora_trl.expansion import BranchExpansion, expand
from comlora_trl.layers import make_branch_layers
from comlora_trl.rows import Rows
from comlora_trl.selector import Selector, SelectorSettings


@dataclass(frozen=True)
class BranchPass:
    """How one forward over the competing branches is to run.

    Attributes:
        eta: η(t).
        chunk: branches run at a time; None for all K at once.
    """

    eta: float = 0.0
    chunk: int | None = None


@dataclass
class BranchOutput(ModelOutput):
    """Output of a competing forward; the first five fields are those TRL's SFT loss and metrics read.

    Attributes:
        log_probs: log-probabilities times their row's weight w[k, b]; their negative sum over M is L_LM + L_align.
            [K·B, T−1], or a single sum when the branches ran in chunks.
        entropy, is_top1, label_mask: as TRL's fused LM head gives them, [K·B, T−1].
        aux_loss: load-balancing loss of a mixture-of-experts base.
        nll: S[k, b], summed negative log-likelihood of each row, [K, R], without gradient.
        tokens: m, supervised tokens of each row, [R].
        scores: sim, [R, K], or None without a selector.
        probabilities: p of eq. 5, [R, K], or None without a selector.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    nll: Tensor | None = None
    tokens: Tensor | None = None
    scores: Tensor | None = None
    probabilities: Tensor | None = None


class ComLoRAModel(PeftModelForCausalLM):
    """K LoRA adapters of one configuration that compete, and the selector that scores them.

    Branch 0 is initialised exactly as PEFT initialises a single LoRA adapter with the same random state; the others
    draw their own A after it. Called as usual the model is an ordinary `PeftModel` with one active adapter. Called
    with `branch_pass=BranchPass(...)` all branches run, and a [`BranchOutput`] comes back.

    Args:
        model: the base model.
        peft_config: the adapters' configuration; copied for each branch.
        settings: the competition's settings, K among them.
        selector: the selector's settings, or None to train without one.
        kwargs: as for `PeftModelForCausalLM`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: LoraConfig,
        settings: CompetitionSettings,
        selector: SelectorSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, copy.deepcopy(peft_config), adapter_name=branch_name(0), **kwargs)
        self.settings = settings
        for name in self.branch_names[1:]:
            self.add_adapter(name, copy.deepcopy(peft_config), **kwargs)
        self.set_adapter(branch_name(0))
        base = self.get_base_model()
        adapted, self.competing = make_branch_layers(base, branch_name(0))
        self._adapted_layers = list(adapted.values())
        self._known_parameters: dict[int, list[nn.Parameter]] = {}
        self._mode: bool | None = None
        self._alive: dict[tuple[object, ...], Tensor] = {}
        self.expansion = BranchExpansion(base, list(adapted))
        self.selector = None
        if selector is not None:
            embeddings = base.get_input_embeddings()
            with torch.device(embeddings.weight.device):
                self.selector = Selector(embeddings.weight.size(-1), settings.k, selector)
            if embeddings.weight.dtype == torch.float64:
                self.selector.double()  # half precisions train in float32, as PEFT's adapters do
            self.selector_input = selector.input
        self.competition_state = CompetitionState(k=settings.k, wins=[0.0] * settings.k)

    @property
    def branch_names(self) -> list[str]:
        """`branch_0` … `branch_{K-1}`."""
        return [branch_name(branch) for branch in range(self.settings.k)]

    def branch_parameters(self, branch: int) -> list[nn.Parameter]:
        """The parameters of one branch.

        They are looked up once, for the trainer asks at every step and the model has thousands of modules; and again
        when FSDP has put others in their place.
        """
        name, known = branch_name(branch), self._known_parameters.get(branch)
        if not known or known[0] is not next(_layer_parameters(self._adapted_layers[0], name)):
            known = [parameter for layer in self._adapted_layers for parameter in _layer_parameters(layer, name)]
            self._known_parameters[branch] = known
        return known

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The branches' and the selector's parameters, all that a run trains."""
        branches = [parameter for branch in range(self.settings.k) for parameter in self.branch_parameters(branch)]
        return branches + ([] if self.selector is None else list(self.selector.parameters()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, of what has any; PyTorch's own walks through the frozen modules too, at every step."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for parameter in self.trainable_parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> "ComLoRAModel":
        """Sets training or evaluation mode; nothing if this method has set it already.

        The Trainer asks for training mode before every step, and PyTorch's own visits every module each time. A part
        that was switched by itself in between keeps its mode until the whole model changes its own.
        """
        if self._mode is not mode or self.training is not mode:
            super().train(mode)
            self._mode = mode
        return self

    def alive(self, device: torch.device) -> Tensor:
        """bool [K], False for a disqualified branch."""
        key = (device, *sorted(self.competition_state.disqualified))
        if key not in self._alive:  # kept: a copy to the GPU waits for all that was launched before it
            out = self.competition_state.disqualified
            self._alive = {key: torch.tensor([branch not in out for branch in range(self.settings.k)], device=device)}
        return self._alive[key]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Chooses the adapter of ordinary forwards; every branch stays trainable."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if not inference_mode:
            self.set_requires_grad(self.branch_names, True)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: only reentrant checkpointing, which is refused, needs inputs that require gradients, and the
        frozen layers below the first adapter would pay for them."""

    def forward(self, *args: Any, branch_pass: BranchPass | None = None, **kwargs: Any) -> Any:
        """An ordinary PEFT forward, or with `branch_pass` one over all competing branches (see [`BranchOutput`])."""
        self._compete_with(())
        if branch_pass is None:
            return super().forward(*args, **kwargs)
        return self._forward_branches(branch_pass, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with the active adapter."""
        self._compete_with(())
        return super().generate(*args, **kwargs)

    def _forward_branches(self, branch_pass: BranchPass, **inputs: Any) -> BranchOutput:
        labels = inputs["labels"]
        rows = Rows.of(inputs)
        tokens = rows.supervised_tokens(labels)
        alive = self.alive(labels.device)
        scores = probabilities = None
        if self.selector is not None:
            scores = self.score(inputs["input_ids"], rows, labels)
            probabilities = selection_probabilities(scores, self.settings.top_n, alive)
        dtype = torch.float64 if self.get_base_model().dtype == torch.float64 else torch.float32
        weights = row_weights(probabilities, rows.count, branch_pass.eta, self.settings, alive, dtype)
        chunk = branch_pass.chunk or self.settings.k
        run = branch_nll_batched if chunk >= self.settings.k else branch_nll_in_chunks
        output = run(self, inputs, rows, weights, chunk)
        return BranchOutput(**output, tokens=tokens, scores=scores, probabilities=probabilities)

    def score(self, input_ids: Tensor, rows: Rows, labels: Tensor) -> Tensor:
        """The selector's scores sim, [R, K], for the rows of a batch (eq. 1–3)."""
        embedding = self.get_base_model().get_input_embeddings()
        if isinstance(embedding, LoraLayer):
            embedding = embedding.get_base_layer()  # the selector reads the frozen embeddings, not a branch's own
        with torch.no_grad():
            embeddings = embedding(input_ids)
        keep = rows.prompt(labels) if self.selector_input == "prompt" else rows.real
        return self.selector(*rows.split(embeddings, keep))

    def run_branches(self, first: int, last: int, inputs: dict[str, Any], rows: int) -> ModelOutput:
        """One run of the base model over the branches `first` … `last` − 1, [(last−first)·rows, ...] inside.

        Args:
            inputs: the batch, not expanded, with `fused_lm_head=True` among them.
            rows: lines of tokens in the batch (B).
        """
        self._compete_with(tuple(self.branch_names[first:last]), rows)
        copies = last - first
        if self.expansion.start is None:
            self.expansion.begin(1, rows)
            return self.get_base_model()(**expand(inputs, copies, rows))
        # The labels meet the hidden states after the decoder layers, where the batch is expanded already
        return self.get_base_model()(**{**inputs, "labels": expand(inputs["labels"], copies, rows)})

    def _compete_with(self, names: tuple[str, ...], rows: int = 0) -> None:
        self.competing.begin(names)
        self.expansion.begin(max(len(names), 1), rows)

    def save_adapters(self, folder: str | Path, names: list[str], **kwargs: Any) -> None:
        """Saves the named adapters alone, each in a folder of its own, in PEFT's ordinary layout."""
        super().save_pretrained(str(folder), selected_adapters=names, **kwargs)

    def save_pretrained(self, save_directory: str, is_main_process: bool = True, **kwargs: Any) -> None:
        """Saves each branch as a PEFT adapter in its own folder, the selector and the competition's state."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        if self.selector is not None:
            state_dict = kwargs.get("state_dict") or self.state_dict()
            own = {name: value for name, value in state_dict.items() if name.startswith("selector.")}
            weights = {name.removeprefix("selector."): value.contiguous() for name, value in own.items()}
            save_file(weights, folder / SELECTOR_FILE, metadata={"format": "pt"})
        self.competition_state.save(folder)

    def load_branches(self, folder: str | Path) -> None:
        """Loads what [`save_pretrained`] saved, into the branches and the selector that exist.

        Raises:
            ValueError: if the checkpoint has another number of branches, or differs in having a selector.
        """
        folder = Path(folder)
        state = CompetitionState.load(folder)
        check_checkpoint(folder, self.settings.k, self.selector is not None)
        for name in self.branch_names:
            weights = load_file(folder / name / "adapter_model.safetensors")
            result = set_peft_model_state_dict(self, weights, adapter_name=name)
            if result.unexpected_keys:
                raise ValueError(
                    f"{folder / name} has weights for other layers, {result.unexpected_keys[0]} among them."
                )
        if self.selector is not None:
            self.selector.load_state_dict(load_file(folder / SELECTOR_FILE))
        self.competition_state = state


def _layer_parameters(layer: LoraLayer, name: str) -> Iterator[nn.Parameter]:
    # a set: PEFT's DoRA layers name their magnitudes twice
    for container in (getattr(layer, kind) for kind in sorted({*layer.adapter_layer_names})):
        if name in container:
            part = container[name]
            yield from [part] if isinstance(part, nn.Parameter) else part.parameters()

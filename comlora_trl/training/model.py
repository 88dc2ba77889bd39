"""The model that trains: K branches and the selector that scores them, in one module.

DDP, FSDP and DeepSpeed wrap it whole; everything trainable runs inside its forward.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel

from comlora_trl.branches.model import BranchModel, BranchOutput, branch_name
from comlora_trl.branches.rows import Rows
from comlora_trl.competition import CompetitionSettings, CompetitionState, row_weights, selection_probabilities
from comlora_trl.competition.selector import Selector, SelectorSettings
from comlora_trl.training.checkpoints import SELECTOR_FILE, check_checkpoint, save_state


@dataclass(frozen=True)
class BranchPass:
    """How one forward over the competing branches is to run.

    Attributes:
        eta: η(t).
        chunk: branches run at a time; None for all at once.
        owners: the branch each line goes to where rows are shared, None where every branch sees all.
        rows_per_line: rows of each line of a packed batch whose lines are shared.
        branch_weights: a factor on the weights of a branch's rows, [K]; with shared rows M over the branch's tokens.
    """

    eta: float = 0.0
    chunk: int | None = None
    owners: tuple[int, ...] | None = None
    rows_per_line: tuple[int, ...] | None = None
    branch_weights: Tensor | None = None


@dataclass
class CompetitionOutput(BranchOutput):
    """A run over branches, and the selector's part in it.

    Attributes:
        scores: sim, [R, K], or None without a selector.
        probabilities: p of eq. 5, [R, K], or None without a selector.
    """

    scores: Tensor | None = None
    probabilities: Tensor | None = None


class ComLoRAModel(BranchModel):
    """K LoRA adapters of one configuration that compete, and the selector that scores them.

    Called as usual the model is an ordinary `PeftModel` with one active adapter. Called with
    `branch_pass=BranchPass(...)` all living branches run, and a [`CompetitionOutput`] comes back.

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
        super().__init__(model, peft_config, settings.k, **kwargs)
        self.settings = settings
        self._alive: dict[tuple[object, ...], Tensor] = {}
        self.selector = None
        self.selector_settings = selector
        if selector is not None:
            embeddings = self.get_base_model().get_input_embeddings()
            with torch.device(embeddings.weight.device):
                self.selector = Selector(embeddings.weight.size(-1), settings.k, selector)
            if embeddings.weight.dtype == torch.float64:
                self.selector.double()  # half precisions train in float32, as PEFT's adapters do
            self.selector_input = selector.input
        self.competition_state = CompetitionState.new(settings.k)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The branches' and the selector's parameters, all that a run trains."""
        return super().trainable_parameters() + ([] if self.selector is None else list(self.selector.parameters()))

    def alive(self, device: torch.device) -> Tensor:
        """bool [K], False for a branch that is out."""
        key = (device, *self.competition_state.alive)
        if key not in self._alive:  # kept: a copy to the GPU waits for all that was launched before it
            self._alive = {key: torch.tensor(self.competition_state.alive, device=device)}
        return self._alive[key]

    def forward(self, *args: Any, branch_pass: BranchPass | None = None, **kwargs: Any) -> Any:
        """An ordinary PEFT forward, or with `branch_pass` one over the branches (see [`CompetitionOutput`])."""
        if branch_pass is None:
            return super().forward(*args, **kwargs)
        return self._forward_branches(branch_pass, **kwargs)

    def _forward_branches(self, branch_pass: BranchPass, **inputs: Any) -> CompetitionOutput:
        labels = inputs["labels"]
        rows = Rows.of(inputs)
        alive = self.alive(labels.device)
        scores = probabilities = None
        if self.selector is not None:
            scores = self.score(inputs["input_ids"], rows, labels)
            probabilities = selection_probabilities(scores, self.settings.top_n, alive)
        dtype = torch.float64 if self.get_base_model().dtype == torch.float64 else torch.float32
        state = self.competition_state
        weights = row_weights(probabilities, rows.count, branch_pass.eta, self.settings, alive, dtype, state.field)
        if branch_pass.branch_weights is not None:
            weights = weights * branch_pass.branch_weights.to(weights)[:, None]
        chunk, owners = branch_pass.chunk, branch_pass.owners
        output = self.run_branches(
            inputs, rows, weights, state.living, chunk, is_compiling(), owners, branch_pass.rows_per_line
        )
        return CompetitionOutput(**output, scores=scores, probabilities=probabilities)

    def score(self, input_ids: Tensor, rows: Rows, labels: Tensor) -> Tensor:
        """The selector's scores sim, [R, K], for the rows of a batch (eq. 1–3)."""
        embedding = self.get_base_model().get_input_embeddings()
        if isinstance(embedding, LoraLayer):
            embedding = embedding.get_base_layer()  # the selector reads the frozen embeddings, not a branch's own
        # In evaluation mode, for NEFTune's noise is the branches'
        training, embedding.training = embedding.training, False
        with torch.no_grad():
            embeddings = embedding(input_ids)
        embedding.training = training
        keep = rows.prompt(labels) if self.selector_input == "prompt" else rows.real
        return self.selector(*rows.split(embeddings, keep))

    def save_pretrained(self, save_directory: str, is_main_process: bool = True, **kwargs: Any) -> None:
        """Saves each branch as a PEFT adapter in its own folder, the selector and the competition's state.

        The leader's files lie at the root too, where whatever takes an adapter finds it.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        folder = Path(save_directory)
        shutil.copytree(folder / branch_name(self.competition_state.leader), folder, dirs_exist_ok=True)
        if self.selector is not None:
            state_dict = kwargs.get("state_dict") or self.state_dict()
            own = {name: value for name, value in state_dict.items() if name.startswith("selector.")}
            weights = {name.removeprefix("selector."): value.contiguous() for name, value in own.items()}
            save_file(weights, folder / SELECTOR_FILE, metadata={"format": "pt"})
        save_state(self.competition_state, folder)

    def load_branches(self, folder: str | Path) -> None:
        """Loads what [`save_pretrained`] saved, into the branches and the selector that exist.

        Raises:
            ValueError: if the checkpoint has another number of branches, or differs in having a selector.
        """
        folder = Path(folder)
        check_checkpoint(folder, self.settings.k, self.selector is not None)
        for name in (name for name in self.branch_names if name in self.peft_config):
            weights = load_file(folder / name / "adapter_model.safetensors")
            result = set_peft_model_state_dict(self, weights, adapter_name=name)
            if result.unexpected_keys:
                raise ValueError(
                    f"{folder / name} has weights for other layers, {result.unexpected_keys[0]} among them."
                )
        if self.selector is not None:
            self.selector.load_state_dict(load_file(folder / SELECTOR_FILE))

"""The model that trains: K branches and the selector that scores them, in one module.

DDP, FSDP and DeepSpeed wrap it whole; everything trainable runs inside its forward. It knows nothing of a competition:
each forward over the branches is told by a [`BranchPass`] which of them run, and with which weights.
"""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import PreTrainedModel

from comlora_trl.branches.batches import Rows
from comlora_trl.branches.model import BranchModel, BranchOutput, branch_name
from comlora_trl.competition import CompetitionSettings, row_weights, selection_probabilities
from comlora_trl.competition.selector import Selector, SelectorSettings
from comlora_trl.training.checkpoints import SELECTOR_FILE
from comlora_trl.training.saved import (
    WEIGHTS_FILE,
    SavedAdapter,
    config_to_save,
    names_to_save,
    put_back,
    saved_adapter,
    taken_part,
    takes_part_out,
    trained_half,
)
from comlora_trl.training.sharding import is_sharded, load_trained_state, whole_state, zero_weights


@dataclass(frozen=True)
class BranchPass:
    """How one forward over the competing branches is to run; made by [`Competition.rows_of`].

    Attributes:
        settings: the competition's settings, which the rows' weights follow.
        living: the branches that run.
        remaining: the branches that eq. 4 takes the mean over, those that diverged among them.
        alive: bool [K], False for a branch that is out.
        eta: η(t).
        chunk: branches run at a time; None for all at once.
        owners: the branch each line goes to where rows are shared, None where every branch sees all.
        rows_per_line: rows of each line of a packed batch whose lines are shared.
        branch_weights: a factor on the weights of a branch's rows, [K]; with shared rows M over the branch's tokens.
        router_weights: on the branches' load-balancing losses, [K], where rows are shared; from the step's plan.
    """

    settings: CompetitionSettings
    living: tuple[int, ...]
    remaining: int
    alive: Tensor
    eta: float = 0.0
    chunk: int | None = None
    owners: tuple[int, ...] | None = None
    rows_per_line: tuple[int, ...] | None = None
    branch_weights: Tensor | None = None
    router_weights: Tensor | None = None


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
        k: number of branches.
        selector: the selector's settings, or None to train without one.
        kwargs: as for `PeftModelForCausalLM`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: LoraConfig,
        k: int,
        selector: SelectorSettings | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, peft_config, k, **kwargs)
        self.selector = None
        self.selector_settings = selector
        if selector is not None:
            embeddings = self.get_base_model().get_input_embeddings()
            with torch.device(embeddings.weight.device):
                # ZeRO-3 leaves an empty weight behind, and its shape beside it
                width = getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[-1]
                self.selector = Selector(width, k, selector)
            if embeddings.weight.dtype == torch.float64:
                self.selector.double()  # half precisions train in float32, as PEFT's adapters do
        # Names are known before a wrapper changes them
        self._selector_names = {name for name, _ in self.named_parameters() if name.startswith("selector.")}
        self._saved_names: dict[str, dict[str, str]] = {}
        self._trained_names: dict[str, set[str]] = {}
        for name in self.branch_names:
            self._names_to_save(name)
        # What the initialisation took out of the base, and fields of the configuration that differ in its files
        changed = takes_part_out(peft_config, self.get_base_model())
        self.taken = taken_part(self, branch_name(0)) if changed else {}
        self.saved_config: dict[str, Any] = {}

    def selector_parameters(self) -> list[nn.Parameter]:
        """The selector's parameters, none without a selector."""
        return [] if self.selector is None else list(self.selector.parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The branches' and the selector's parameters, all that a run trains."""
        return super().trainable_parameters() + self.selector_parameters()

    def forward(self, *args: Any, branch_pass: BranchPass | None = None, **kwargs: Any) -> Any:
        """An ordinary PEFT forward, or with `branch_pass` one over the branches (see [`CompetitionOutput`])."""
        if branch_pass is None:
            return super().forward(*args, **kwargs)
        return self._forward_branches(branch_pass, **kwargs)

    def _forward_branches(self, how: BranchPass, **inputs: Any) -> CompetitionOutput:
        labels = inputs["labels"]
        rows, alive = Rows.of(inputs), how.alive.to(labels.device)
        scores = probabilities = None
        if self.selector is not None:
            scores = self.score(inputs["input_ids"], rows, labels)
            probabilities = selection_probabilities(scores, how.settings.top_n, alive)
        dtype = torch.float64 if self.get_base_model().dtype == torch.float64 else torch.float32
        weights = row_weights(probabilities, rows.count, how.eta, how.settings, alive, dtype, how.remaining)
        if how.branch_weights is not None:
            weights = weights * how.branch_weights.to(weights)[:, None]
        dealt = how.owners, how.rows_per_line, how.router_weights
        output = self.run_branches(inputs, rows, weights, how.living, how.chunk, is_compiling(), *dealt)
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
        keep = rows.prompt(labels) if self.selector_settings.input == "prompt" else rows.real
        return self.selector(*rows.split(embeddings, keep))

    def revive_branches(self) -> None:
        """Gives branches that an earlier competition has dropped, or made the base model, new adapters."""
        for branch in range(self.k):
            if branch_name(branch) not in self.peft_config:
                self.restore_branch(branch)
            elif not any(bool(parameter.any()) for parameter in self.branch_parameters(branch)):
                self.redraw_branches([branch])

    def redraw_branches(self, branches: Iterable[int]) -> None:
        """Draws new adapters for branches that were out: a new competition begins.

        Raises:
            ValueError: if a branch's weights are sharded.
        """
        for branch in branches:
            if is_sharded(self.branch_parameters(branch)):
                raise ValueError(
                    f"branch_{branch} has diverged in this trainer's last training, and its weights are sharded: make "
                    "a new trainer for a new competition."
                )
            for layer in self.adapted_layers:
                layer.reset_lora_parameters(branch_name(branch), init_lora_weights=True)
            for module in self.saved_modules:
                module.reset(branch_name(branch))

    @torch.no_grad()
    def zero_branch(self, branch: int) -> None:
        """Makes a branch's adapter the base model itself, with nothing non-finite left in it; its head becomes 0."""
        name = branch_name(branch)
        zero_weights(self.branch_parameters(branch))
        if is_sharded(self.branch_parameters(branch)):
            return  # the base's norms would have to be gathered, for a branch that never runs again
        for layer in self.adapted_layers:
            if name in layer.lora_magnitude_vector:
                # DoRA scales each output by its magnitude over the weight's norm: with B = 0 that is the base's own
                magnitude, base = layer.lora_magnitude_vector[name], layer.get_base_layer()
                parameter = magnitude.weight
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                magnitude.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[name])
                parameter.copy_(magnitude.weight)
                magnitude.weight = parameter  # the optimizer's

    def save_pretrained(
        self, save_directory: str, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None, **_: Any
    ) -> None:
        """Saves each branch as a PEFT adapter in its own folder, and the selector.

        The active adapter's files lie at the root too, where whatever takes an adapter finds it. PEFT's other options
        change nothing: the files are small, and always safetensors.
        """
        state_dict = state_dict or self.state_to_save()
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in (name for name in self.branch_names if name in self.peft_config):
            (folder / name).mkdir(parents=True, exist_ok=True)
            self._saved_adapter(name, state_dict).save(folder / name)
        shutil.copytree(folder / self.active_adapter, folder, dirs_exist_ok=True)
        if self.selector is not None:
            own = {name: value for name, value in state_dict.items() if name.startswith("selector.")}
            weights = {name.removeprefix("selector."): value.contiguous() for name, value in own.items()}
            save_file(weights, folder / SELECTOR_FILE, metadata={"format": "pt"})

    def load_branches(self, folder: str | Path, root: nn.Module | None = None) -> None:
        """Loads what [`save_pretrained`] saved, into the branches and the selector that exist.

        Args:
            root: the wrapped model, where FSDP1 shards it.

        Raises:
            ValueError: if the checkpoint has other weights.
        """
        folder = Path(folder)
        load_trained_state(self, self._saved_weights(folder), root)

    def state_to_save(self, root: nn.Module | None = None) -> dict[str, Tensor]:
        """Everything that [`save_pretrained`] writes, whole; every process has to call it.

        Args:
            root: the wrapped model.
        """
        names = {own for name in self.peft_config for own in self._names_to_save(name).values()}
        if self.selector is not None:
            names |= self._selector_names
        return whole_state(self, root, names)

    def snapshot(self, branch: int, root: nn.Module | None = None) -> SavedAdapter:
        """A branch as it is now, as it is to be written; every process has to call it.

        Args:
            root: the wrapped model.
        """
        name = branch_name(branch)
        return self._saved_adapter(name, whole_state(self, root, set(self._names_to_save(name).values())))

    def restore_branch(self, branch: int) -> None:
        """Adds an adapter for a branch that was dropped, with new weights."""
        super().restore_branch(branch)
        self._names_to_save(branch_name(branch))

    def config_to_save(self, branch: int) -> LoraConfig:
        """The configuration in a branch's files."""
        return config_to_save(self, branch_name(branch), self.taken, self.saved_config)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The base model as it was before the branches, and before what their initialisation took out of it."""
        name, layers = self.active_adapter, self.get_base_model().named_modules()
        scaling = {place: layer.scaling[name] for place, layer in layers if isinstance(layer, LoraLayer)}
        base = super().unload(*args, **kwargs)
        put_back(base, self.taken, scaling)
        return base

    def _saved_adapter(self, name: str, state: Mapping[str, Tensor]) -> SavedAdapter:
        return saved_adapter(self, name, self._names_to_save(name), state, self.taken, self.saved_config)

    def _names_to_save(self, name: str) -> dict[str, str]:
        """[`names_to_save`] of a branch; FSDP1 leaves no names to find, and those from before it hold."""
        if not any(isinstance(module, FSDP) for module in self.modules()):
            self._saved_names[name] = names_to_save(self, name)
            self._trained_names[name] = set(self.named_branch_parameters(self.branch_names.index(name)))
        return self._saved_names[name]

    def _saved_weights(self, folder: Path) -> dict[str, Tensor]:
        """The weights in a checkpoint, by the names that they have in the model."""
        weights = {}
        for name in self.peft_config:
            saved, names = load_file(folder / name / WEIGHTS_FILE), self._names_to_save(name)
            names = {key: place for key, place in names.items() if place in self._trained_names[name]}
            if not saved.keys() >= names.keys():
                raise ValueError(
                    f"{folder / name} has no weights {min(names.keys() - saved.keys())}: it was trained on other "
                    "target_modules."
                )
            for key, place in names.items():
                weights[place] = trained_half(key, saved[key], self.taken, folder / name)
        if self.selector is not None:
            weights |= {f"selector.{name}": value for name, value in load_file(folder / SELECTOR_FILE).items()}
        return weights

"""The model that is trained: K branches and the selector, in one module.

DDP, FSDP and DeepSpeed wrap the whole module, and everything that trains runs inside its forward. The module does not
hold the state of the competition. A [`BranchPass`] tells each forward which branches run, and with which weights.
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
from comlora_trl.branches.passes import without_plans
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
    """The settings of one forward over the branches; made by [`Competition.rows_of`].

    Attributes:
        settings: the competition's settings, which determine the weights of the rows.
        living: the branches that run.
        remaining: number of branches that eq. 4 takes the mean over, including those that have diverged.
        alive: bool [K], False for a branch that is retired or disqualified.
        eta: η(t).
        chunk: number of branches that run at a time; None for all at once.
        owners: the branch of each line if rows are shared; None if every branch sees all lines.
        rows_per_line: number of rows of each line of a packed batch whose rows are shared; None for one row each.
        branch_weights: factors on the weights of each branch's rows, [K]. If rows are shared, this is M divided by the
            branch's own tokens. None for no factors.
        router_weights: weights of the branches' load-balancing losses, [K], if rows are shared; see
            [`StepPlan.router_weights`].
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
    """Output of a pass over branches, with the selector's results.

    Attributes:
        scores: sim, [R, K]; None without a selector.
        probabilities: p of eq. 5, [R, K]; None without a selector.
    """

    scores: Tensor | None = None
    probabilities: Tensor | None = None


class ComLoRAModel(BranchModel):
    """K competing LoRA adapters with the same configuration, and the selector that scores them.

    An ordinary call runs the active adapter, as in any `PeftModel`. A call with `branch_pass=BranchPass(...)` runs all
    living branches and returns a [`CompetitionOutput`].

    Args:
        model: the base model.
        peft_config: the adapters' configuration, which is copied for each branch.
        k: number of branches.
        selector: the selector's settings; None for no selector.
        kwargs: as for `PeftModelForCausalLM`.

    Attributes:
        selector: the selector; None without one.
        selector_settings: the selector's settings; None without one.
        taken: the low-rank part that the adapters' initialisation took out of the base, see [`taken_part`]; empty if
            there is none.
        saved_config: fields of the adapters' configuration that differ in saved files.
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
                # Under ZeRO-3 the weight is empty and ds_shape is its real shape
                width = getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[-1]
                self.selector = Selector(width, k, selector)
            if embeddings.weight.dtype == torch.float64:
                self.selector.double()  # with half precisions, the selector stays in float32, as PEFT's adapters do
        # The names are collected now, because wrappers change them later
        self._selector_names = {name for name, _ in self.named_parameters() if name.startswith("selector.")}
        self._saved_names: dict[str, dict[str, str]] = {}
        self._trained_names: dict[str, set[str]] = {}
        for name in self.branch_names:
            self._names_to_save(name)
        changed = takes_part_out(peft_config, self.get_base_model())
        self.taken = taken_part(self, branch_name(0)) if changed else {}
        self.saved_config: dict[str, Any] = {}

    def selector_parameters(self) -> list[nn.Parameter]:
        """The selector's parameters; an empty list without a selector."""
        return [] if self.selector is None else list(self.selector.parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters that a run trains: those of the branches and the selector."""
        return super().trainable_parameters() + self.selector_parameters()

    def forward(self, *args: Any, branch_pass: BranchPass | None = None, **kwargs: Any) -> Any:
        """An ordinary PEFT forward, or with `branch_pass` a forward over the branches (see [`CompetitionOutput`])."""
        if branch_pass is None:
            return super().forward(*args, **kwargs)
        return self._forward_branches(branch_pass, **kwargs)

    def _forward_branches(self, how: BranchPass, **inputs: Any) -> CompetitionOutput:
        labels = inputs["labels"]
        rows, alive = Rows.of(inputs), how.alive.to(labels.device)
        scores = probabilities = None
        if self.selector is not None:
            with without_plans(inputs["input_ids"]):
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
            embedding = embedding.get_base_layer()  # the selector reads the frozen embeddings without an adapter
        # In evaluation mode, so that the selector's input has no NEFTune noise
        training, embedding.training = embedding.training, False
        try:
            with torch.no_grad():
                embeddings = embedding(input_ids)
        finally:
            embedding.training = training
        keep = rows.prompt(labels) if self.selector_settings.input == "prompt" else rows.real
        return self.selector(*rows.split(embeddings, keep))

    def revive_branches(self) -> None:
        """Gives branches that an earlier competition has dropped or set to zero new weights."""
        for branch in range(self.k):
            if branch_name(branch) not in self.peft_config:
                self.restore_branch(branch)
            elif not any(bool(parameter.any()) for parameter in self.branch_parameters(branch)):
                self.redraw_branches([branch])

    def redraw_branches(self, branches: Iterable[int]) -> None:
        """Draws new weights for branches, when a new competition begins.

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
        """Sets a branch's weights to zero, so that they are finite and its adapter equals the base model.

        A head of its own becomes zero too.
        """
        name = branch_name(branch)
        zero_weights(self.branch_parameters(branch))
        if is_sharded(self.branch_parameters(branch)):
            return  # the rest would gather weights of the base, for a branch that never runs again
        for layer in self.adapted_layers:
            if name in layer.lora_magnitude_vector:
                # DoRA scales each output by magnitude / norm of the weight, so with B = 0 the magnitude must be the
                # norm of the base's weight
                magnitude, base = layer.lora_magnitude_vector[name], layer.get_base_layer()
                parameter = magnitude.weight
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                magnitude.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[name])
                parameter.copy_(magnitude.weight)
                magnitude.weight = parameter  # the same object, because the optimizer holds it

    def save_pretrained(
        self, save_directory: str, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None, **_: Any
    ) -> None:
        """Saves each branch as a PEFT adapter in a subfolder, and the selector.

        The files of the active adapter are copied to the root, so that other software can load the folder as an
        adapter. The files are always safetensors.

        Args:
            save_directory: the folder.
            is_main_process: whether this process writes.
            state_dict: the result of [`state_to_save`]; None to gather it now, which all processes must do together.
            _: PEFT's other options, which are ignored.
        """
        state_dict = state_dict or self.state_to_save()
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in self.present_branches:
            (folder / name).mkdir(parents=True, exist_ok=True)
            self._saved_adapter(name, state_dict).save(folder / name)
        shutil.copytree(folder / self.active_adapter, folder, dirs_exist_ok=True)
        if self.selector is not None:
            own = {name: value for name, value in state_dict.items() if name.startswith("selector.")}
            weights = {name.removeprefix("selector."): value.contiguous() for name, value in own.items()}
            save_file(weights, folder / SELECTOR_FILE, metadata={"format": "pt"})

    def load_branches(self, folder: str | Path, root: nn.Module | None = None) -> None:
        """Loads the files of [`save_pretrained`] into the present branches and the selector.

        Args:
            folder: the folder.
            root: the wrapped model, which is needed under FSDP1.

        Raises:
            ValueError: if the names or shapes of the weights do not fit.
        """
        folder = Path(folder)
        load_trained_state(self, self._saved_weights(folder), root)

    def state_to_save(self, root: nn.Module | None = None) -> dict[str, Tensor]:
        """Gathers all tensors that [`save_pretrained`] writes. All processes must call this.

        Args:
            root: the wrapped model, which is needed under FSDP1.

        Returns:
            the whole tensors on the CPU, by their names in the model.
        """
        names = {own for name in self.present_branches for own in self._names_to_save(name).values()}
        if self.selector is not None:
            names |= self._selector_names
        return whole_state(self, root, names)

    def snapshot(self, branch: int, root: nn.Module | None = None) -> SavedAdapter:
        """A copy of a branch's present weights, ready to be written. All processes must call this.

        Args:
            branch: the branch.
            root: the wrapped model, which is needed under FSDP1.
        """
        name = branch_name(branch)
        return self._saved_adapter(name, whole_state(self, root, set(self._names_to_save(name).values())))

    def restore_branch(self, branch: int) -> None:
        """Adds an adapter with new weights for a branch that was dropped."""
        super().restore_branch(branch)
        self._names_to_save(branch_name(branch))

    def config_to_save(self, branch: int) -> LoraConfig:
        """The configuration that is written into a branch's files."""
        return config_to_save(self, branch_name(branch), self.taken, self.saved_config)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Removes the branches and returns the original base model, with the part that the initialisation took out."""
        name, layers = self.active_adapter, self.get_base_model().named_modules()
        scaling = {place: layer.scaling[name] for place, layer in layers if isinstance(layer, LoraLayer)}
        base = super().unload(*args, **kwargs)
        put_back(base, self.taken, scaling)
        return base

    def _saved_adapter(self, name: str, state: Mapping[str, Tensor]) -> SavedAdapter:
        return saved_adapter(self, name, self._names_to_save(name), state, self.taken, self.saved_config)

    def _names_to_save(self, name: str) -> dict[str, str]:
        """The result of [`names_to_save`] for a branch; under FSDP1, which hides the names, an earlier result."""
        if not any(isinstance(module, FSDP) for module in self.modules()):
            self._saved_names[name] = names_to_save(self, name)
            self._trained_names[name] = set(self.named_branch_parameters(self.branch_names.index(name)))
        return self._saved_names[name]

    def _saved_weights(self, folder: Path) -> dict[str, Tensor]:
        """The weights in a checkpoint, by their names in the model.

        Raises:
            ValueError: if the checkpoint lacks weights.
        """
        weights = {}
        for name in self.present_branches:
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

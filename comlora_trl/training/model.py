"""The model that trains: K branches and the selector that scores them, in one module.

DDP, FSDP and DeepSpeed wrap it whole; everything trainable runs inside its forward.
"""

import copy
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import PreTrainedModel

from comlora_trl.branches.model import BranchModel, BranchOutput, branch_name
from comlora_trl.branches.passes import accumulates
from comlora_trl.branches.rows import Rows
from comlora_trl.branches.views import tensors_of
from comlora_trl.competition import CompetitionSettings, CompetitionState, row_weights, selection_probabilities
from comlora_trl.competition.selector import Selector, SelectorSettings
from comlora_trl.training.checkpoints import SELECTOR_FILE, check_checkpoint, save_state
from comlora_trl.training.sharding import is_sharded, load_trained_state, state_to_save, trained_state

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class BranchPass:
    """How one forward over the competing branches is to run.

    Attributes:
        eta: η(t).
        chunk: branches run at a time; None for all at once.
        owners: the branch each line goes to where rows are shared, None where every branch sees all.
        rows_per_line: rows of each line of a packed batch whose lines are shared.
        branch_weights: a factor on the weights of a branch's rows, [K]; with shared rows M over the branch's tokens.
        router_weights: on the branches' load-balancing losses, [K], where rows are shared; from the step's plan.
    """

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


@dataclass(frozen=True)
class BranchSnapshot:
    """A branch as it was at some step, as PEFT writes it; nothing of the model is needed any more.

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

    Attributes:
        competing_in_training: whether a training is running, in which no forward of one branch may train it alone.
    """

    competing_in_training = False

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
                # ZeRO-3 leaves an empty weight behind, and its shape beside it
                width = getattr(embeddings.weight, "ds_shape", embeddings.weight.shape)[-1]
                self.selector = Selector(width, settings.k, selector)
            if embeddings.weight.dtype == torch.float64:
                self.selector.double()  # half precisions train in float32, as PEFT's adapters do
            self.selector_input = selector.input
        self.competition_state = CompetitionState.new(settings.k)
        self._saved_names, self._frozen_names = self._names_to_save()

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
        if branch_pass is not None:
            return self._forward_branches(branch_pass, **kwargs)
        output = super().forward(*args, **kwargs)
        if self.competing_in_training and "view_pass" not in kwargs and torch.is_grad_enabled():
            self._refuse_lone_gradients(output)
        return output

    def _refuse_lone_gradients(self, output: Any) -> None:
        """Ends a backward pass that would train the active branch alone: a loss computed from the model's outputs."""
        active, living = self.active_adapter, len(self.competition_state.living)
        if living < 2 or active not in self.branch_names or self._adapters_disabled:
            return

        def refuse(_: Tensor) -> None:
            own = [p for p in self.branch_parameters(self.branch_names.index(active)) if p.requires_grad]
            if not any(accumulates(parameter) for parameter in own if parameter.is_leaf):
                return
            line = f"a loss computed from model(...) would train {active} alone of K={self.k} branches"
            if self.selector is None:
                raise RuntimeError(
                    f"{line}: compute it in compute_loss, from the model that compute_loss is given, which stands for "
                    "each branch in turn."
                )
            raise RuntimeError(
                f"{line}, for the selector's losses (eq. 5-9) take TRL's loss of each row: go on from "
                "super().compute_loss(...), or set comlora_selector=False and each branch trains by your compute_loss."
            )

        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(refuse)

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
        dealt = branch_pass.owners, branch_pass.rows_per_line, branch_pass.router_weights
        output = self.run_branches(inputs, rows, weights, state.living, branch_pass.chunk, is_compiling(), *dealt)
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

    def save_pretrained(
        self, save_directory: str, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None, **_: Any
    ) -> None:
        """Saves each branch as a PEFT adapter in its own folder, the selector and the competition's state.

        The leader's files lie at the root too, where whatever takes an adapter finds it. PEFT's other options change
        nothing: the files are small, and always safetensors.
        """
        state_dict = state_dict or state_to_save(self)
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in (name for name in self.branch_names if name in self.peft_config):
            (folder / name).mkdir(parents=True, exist_ok=True)
            self._snapshot(name, state_dict).save(folder / name)
        shutil.copytree(folder / branch_name(self.competition_state.leader), folder, dirs_exist_ok=True)
        if self.selector is not None:
            own = {name: value for name, value in state_dict.items() if name.startswith("selector.")}
            weights = {name.removeprefix("selector."): value.contiguous() for name, value in own.items()}
            save_file(weights, folder / SELECTOR_FILE, metadata={"format": "pt"})
        save_state(self.competition_state, folder)

    def load_branches(self, folder: str | Path, root: nn.Module | None = None) -> None:
        """Loads what [`save_pretrained`] saved, into the branches and the selector that exist.

        Args:
            root: the wrapped model, where FSDP1 shards it.

        Raises:
            ValueError: if the checkpoint has another number of branches, or differs in having a selector.
        """
        folder = Path(folder)
        check_checkpoint(folder, self.settings.k, self.selector is not None)
        load_trained_state(self, self._saved_weights(folder), root)

    def snapshot(self, branch: int, root: nn.Module | None = None) -> "BranchSnapshot":
        """A branch as it is now, as PEFT would write it; every process has to call it.

        Args:
            root: the wrapped model.
        """
        name = branch_name(branch)
        if isinstance(root, FSDP):
            state = trained_state(self, root)
        else:
            frozen = {own: self.get_parameter(own) for own in self._frozen_names.values()}
            whole = {own: parameter for own, parameter in frozen.items() if not is_sharded([parameter])}
            state = trained_state(self, root, self.named_branch_parameters(branch) | whole)
        return self._snapshot(name, state)

    def _snapshot(self, name: str, state: Mapping[str, Tensor]) -> "BranchSnapshot":
        names = self._saved_names[name] | self._frozen_names
        config, base = copy.deepcopy(self.peft_config[name]), self.get_base_model()
        config.inference_mode = True
        config.base_model_name_or_path = config.base_model_name_or_path or base.name_or_path or None
        if config.task_type is None:
            config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        weights = {key: state[own].contiguous() for key, own in names.items() if own in state}
        return BranchSnapshot(config, weights)

    def _names_to_save(self) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """The names of each adapter's weights in PEFT's files, and in the model; asked before a wrapper changes them.

        Beside them those of the frozen weights that PEFT saves too: embeddings that were resized, or are adapted.
        """
        first = branch_name(0)
        marks = {own: torch.empty(0) for own, _ in self.named_parameters()}
        known = {id(mark): own for own, mark in marks.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT has to say of the embeddings it says when it saves
            saved = get_peft_model_state_dict(self, marks, first)
        names = {key: known[id(mark)] for key, mark in saved.items()}
        trained = {key: own for key, own in names.items() if self.get_parameter(own).requires_grad}
        own_names = {
            name: {key: re.sub(rf"\.{first}(?=\.|$)", f".{name}", own) for key, own in trained.items()}
            for name in self.branch_names
        }
        return own_names, {key: own for key, own in names.items() if key not in trained}

    def _saved_weights(self, folder: Path) -> dict[str, Tensor]:
        """The weights in a checkpoint, by the names that they have in the model."""
        weights = {}
        for name in (name for name in self.branch_names if name in self.peft_config):
            saved, names = load_file(folder / name / WEIGHTS_FILE), self._saved_names[name]
            if not saved.keys() >= names.keys():
                raise ValueError(
                    f"{folder / name} has no weights {min(names.keys() - saved.keys())}: it was trained on other "
                    "target_modules."
                )
            weights |= {own: saved[key] for key, own in names.items()}
        if self.selector is not None:
            weights |= {f"selector.{name}": value for name, value in load_file(folder / SELECTOR_FILE).items()}
        return weights

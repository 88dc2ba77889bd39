"""K LoRA branches on one frozen base, as one PEFT model."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModelForCausalLM, set_peft_model_state_dict
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from comlora_trl import compat
from comlora_trl.branches.batches import Rows, indices
from comlora_trl.branches.layers import BranchLayer, layer_parameters, make_branch_layers, make_plain_layers
from comlora_trl.branches.passes import (
    INPUTS,
    SEPARATELY,
    BranchExpansion,
    is_whole,
    keep_router_logits,
    run_batched,
    run_dealt,
    run_in_chunks,
    touch,
)
from comlora_trl.branches.saved_modules import make_branch_modules, make_plain_modules
from comlora_trl.branches.views import ViewPass, run_view_pass


@dataclass
class BranchOutput(ModelOutput):
    """Output of a pass over branches. TRL's SFT loss and metrics read the first five fields.

    Attributes:
        log_probs: log-probabilities times the weight of their row; [n·B, T−1] for the n branches that ran, or a single
            sum if they ran in chunks.
        entropy, is_top1, label_mask: as from TRL's fused LM head, [n·B, T−1].
        aux_loss: load-balancing loss of a mixture-of-experts base, a scalar: the mean over the branches, or their sum
            weighted by `router_weights`.
        nll: S[k, b], the summed negative log-likelihood of each row, [K, R], without gradient; 0 if the row did not
            run through the branch.
        ran: whether a row has run through a branch, bool [K, R].
        correct: number of supervised tokens of each row that were predicted as the most likely token, [K, R]; None if
            gradients are enabled.
        tokens: m, the number of supervised tokens of each row, [R].
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    nll: Tensor | None = None
    ran: Tensor | None = None
    correct: Tensor | None = None
    tokens: Tensor | None = None


class BranchModel(PeftModelForCausalLM):
    """K LoRA adapters with the same configuration, `branch_0` … `branch_{K-1}`, that can run in one pass.

    An ordinary call runs the active adapter, as in any `PeftModel`. [`run_branches`] runs several branches, each on
    its own copy of the batch. Branch 0 starts with exactly the weights that PEFT gives a single LoRA adapter for the
    same random state. The other branches draw their weights after it.

    Args:
        model: the base model. It needs TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`) before branches
            run.
        peft_config: the adapters' configuration, which is copied for each branch.
        k: number of branches.
        kwargs: as for `PeftModelForCausalLM`.

    Attributes:
        adapted_layers: PEFT's LoRA layers, in the order of the model's modules.
        saved_modules: the `modules_to_save`, of which each branch trains a copy; empty for a single branch.
        splits_loss: False after a pass has shown that the base model's own loss can't be computed for each branch.
    """

    def __init__(self, model: PreTrainedModel, peft_config: LoraConfig, k: int, **kwargs: Any) -> None:
        peft_config = copy.deepcopy(peft_config)
        # Set now, because PEFT compares the vocabulary of the named base with the model's when it saves
        peft_config.base_model_name_or_path = peft_config.base_model_name_or_path or model.name_or_path or None
        if not hasattr(model, "prepare_inputs_for_generation"):
            model.prepare_inputs_for_generation = None  # PEFT reads this attribute, and a classifier does not have it
        super().__init__(model, copy.deepcopy(peft_config), adapter_name=branch_name(0), **kwargs)
        self.k = k
        for name in self.branch_names[1:]:
            self.add_adapter(name, copy.deepcopy(peft_config), **kwargs)
        super().set_adapter(branch_name(0))
        if k > 1 or peft_config.inference_mode:
            self.set_requires_grad(self.branch_names, True)
        base = self.get_base_model()
        adapted, self.competing = make_branch_layers(base, branch_name(0))
        self.competing.branches = tuple(self.branch_names)
        self.saved_modules = make_branch_modules(base, self.competing) if k > 1 else []
        self.adapted_layers = list(adapted.values())
        self._layer_names = [f"base_model.model.{name}" for name in adapted]
        self._beside_layers = self._trained_beside_layers()
        self._known_parameters: dict[int, list[nn.Parameter]] = {}
        self._modules_in_mode: list[nn.Module] = []
        self.splits_loss = True
        self.expansion = BranchExpansion(self.competing, list(adapted))
        if base.get_output_embeddings() is None:
            self.expansion.place = INPUTS  # a classifier finds each row's last token by input_ids, of all rows
        self._router_hook = base.base_model.register_forward_hook(self._keep_router_logits)

    @property
    def branch_names(self) -> list[str]:
        """`branch_0` … `branch_{K-1}`."""
        return [branch_name(branch) for branch in range(self.k)]

    @property
    def present_branches(self) -> list[str]:
        """The names of the branches that were not dropped. The model may have a reference beside them."""
        return [name for name in self.branch_names if name in self.peft_config]

    def branch_parameters(self, branch: int) -> list[nn.Parameter]:
        """The parameters of one branch; an empty list for a branch that was dropped.

        The result is cached, because the trainer asks at every step and the model has thousands of modules. The
        parameters are looked up again if FSDP has replaced them.
        """
        name, known = branch_name(branch), self._known_parameters.get(branch)
        if name not in self.peft_config:
            return []
        if not known or known[0] is not next(layer_parameters(self.adapted_layers[0], name))[1]:
            known = list(self.named_branch_parameters(branch).values())
            self._known_parameters[branch] = known
        return known

    def named_branch_parameters(self, branch: int) -> dict[str, nn.Parameter]:
        """The parameters of one branch by their names in the model."""
        name = branch_name(branch)
        if name not in self.peft_config:
            return {}
        layers = zip(self._layer_names, self.adapted_layers, strict=True)
        found = {f"{place}.{own}": p for place, layer in layers for own, p in layer_parameters(layer, name)}
        own_module = f".modules_to_save.{name}."
        return found | {
            f"{place}.{own}": module.get_parameter(own)
            for place, module, own in self._beside_layers
            if self.k == 1 or own_module in f"{place}."
        }

    def _trained_beside_layers(self) -> list[tuple[str, nn.Module, str]]:
        """The trained parameters outside the LoRA layers, as (name of the module, module, name of the parameter).

        A single branch may have any that PEFT supports (`modules_to_save`, trained tokens, biases). Several branches
        have `modules_to_save` only.
        """
        adapters = {
            id(p)
            for layer in self.adapted_layers
            for name in self.branch_names
            for _, p in layer_parameters(layer, name)
        }
        return [
            (place, module, own)
            for place, module in self.named_modules()
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in adapters
        ]

    def drop_branch(self, branch: int) -> None:
        """Deletes a branch's adapter and frees its weights. The other branches keep their names.

        This does the same as PEFT's `delete_adapter`, but does not visit every module of the model.
        """
        name = branch_name(branch)
        if self.active_adapter == name:
            self.set_adapter(next(other for other in self.present_branches if other != name))
        for layer in self.adapted_layers:
            layer.delete_adapter(name)
        for module in self.saved_modules:
            module.delete_adapter(name, [self.active_adapter])
        if self.saved_modules:
            self._beside_layers = self._trained_beside_layers()
        del self.peft_config[name]
        self._known_parameters.pop(branch, None)
        self._modules_in_mode = []
        for group in self.competing.groups:
            group.drop(name)
        if self.competing.graphs is not None:
            self.competing.graphs.forget_more_than(len(self.present_branches))

    def restore_branch(self, branch: int) -> None:
        """Adds an adapter with new weights for a branch that was dropped."""
        name = branch_name(branch)
        self.add_adapter(name, copy.deepcopy(self.peft_config[self.present_branches[0]]))
        self.set_requires_grad(name, True)  # in PEFT, a new adapter trains only once it is active
        if self.saved_modules:
            self._beside_layers = self._trained_beside_layers()
        self._modules_in_mode = []

    def add_reference(self, name: str, weights: dict[str, Tensor]) -> None:
        """Adds an adapter that never trains, with the configuration of the branches, to serve as a reference model.

        Args:
            name: the adapter's name.
            weights: the adapter's weights, by their names in PEFT's files.
        """
        self.add_adapter(name, copy.deepcopy(self.peft_config[self.present_branches[0]]))
        set_peft_model_state_dict(self, weights, adapter_name=name)
        self.set_requires_grad(name, False)
        self._modules_in_mode = []

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters that a run trains."""
        return [parameter for branch in range(self.k) for parameter in self.branch_parameters(branch)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Removes the gradients of the trained parameters. PyTorch's method would visit the frozen modules too."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for parameter in self.trainable_parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> "BranchModel":
        """Sets training or evaluation mode, if some module is not in it already.

        The Trainer sets training mode before every step. PyTorch's method takes milliseconds for each call, because it
        visits the tree of modules. Reading the flag of each known module is faster.
        """
        self._modules_in_mode = self._modules_in_mode or list(self.modules())
        if not all(module.training is mode for module in self._modules_in_mode):
            super().train(mode)
        return self

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's context, within which the model runs without adapters.

        PEFT visits all modules several times, and TRL's DPO and KTO trainers ask for that at every step. Without
        gradients one switch for all layers does the same, unless adapters are merged or modules are trained beside the
        layers.
        """
        if self.competing.switched_off:  # a block within a block
            yield
        elif torch.is_grad_enabled() or self.is_switched_off or self._beside_layers or not self._has_branch_layers:
            with super().disable_adapter():
                yield
        else:
            self.competing.switched_off = True
            try:
                yield
            finally:
                self.competing.switched_off = False

    @property
    def _has_branch_layers(self) -> bool:
        """Whether all adapted layers know of the branches, and no adapter is merged into one."""
        return all(isinstance(layer, BranchLayer) and not layer.merged_adapters for layer in self.adapted_layers)

    @property
    def is_switched_off(self) -> bool:
        """Whether the adapters are disabled, as within `disable_adapter()`."""
        switched_off = self.competing.switched_off or compat.adapters_disabled(self)
        return switched_off or self.adapted_layers[0].disable_adapters

    def enable_input_require_grads(self) -> None:
        """Does nothing. Only reentrant checkpointing needs inputs that require gradients, and with them the frozen
        layers below the first adapter would need a backward pass too."""

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Turns on gradient checkpointing in the base model. Inputs require gradients for the reentrant kind only."""
        base = self.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        if not (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            base.disable_input_require_grads()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The older name of [`activation_checkpointing_enable`] in transformers."""
        base = self.get_base_model()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        if not (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            base.disable_input_require_grads()

    def __deepcopy__(self, memo: dict[int, Any]) -> "BranchModel":
        """Copies the model. TRL's fused forward is a closure over the base model and is bound to the copied one here,
        because the copy would otherwise run the original base model."""
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        own = new.get_base_model()
        if isinstance(own.__dict__.get("forward"), MethodType):
            own.forward = MethodType(_rebound(own.forward.__func__, self.get_base_model(), own), own)
        return new

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merges the active adapter into the base model and returns it, without any branches."""
        self._release_base()
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Removes the branches and returns the base model."""
        self._release_base()
        return self.base_model.unload(*args, **kwargs)

    def _release_base(self) -> None:
        self.competing.graphs = None
        self.expansion.remove()
        self._router_hook.remove()
        make_plain_layers(self.adapted_layers)
        make_plain_modules(self.saved_modules)

    @torch.compiler.disable(recursive=False)
    def run_branches(
        self,
        inputs: dict[str, Any],
        rows: Rows,
        weights: Tensor,
        branches: Sequence[int] | None = None,
        chunk: int | None = None,
        compiled: bool = False,
        owners: Sequence[int] | None = None,
        rows_per_line: Sequence[int] | None = None,
        router_weights: Tensor | None = None,
    ) -> BranchOutput:
        """Runs several branches on a batch: each on the whole batch or, with `owners`, each on its own lines.

        Args:
            inputs: a batch from TRL's collators, with `fused_lm_head=True`.
            rows: the batch's rows.
            weights: weight of each row in each branch's loss, [K, R]. Entries of branches that do not run are ignored.
            branches: indices of the branches that run; None for all.
            chunk: number of branches that run at a time; None for all at once. In chunks, the backward of each chunk
                runs within this forward.
            compiled: whether `torch.compile` runs the model.
            owners: the branch of each line of the batch; None to run every line through all branches.
            rows_per_line: number of rows of each line of a packed batch; None for one row each.
            router_weights: weights of the branches' load-balancing losses in `aux_loss`, [K]; only with `owners`.

        Returns:
            the output, see [`BranchOutput`].
        """
        self.competing.abandon()
        branches = list(range(self.k)) if branches is None else list(branches)
        chunk = 1 if self.expansion.place == SEPARATELY else min(chunk or len(branches), len(branches))
        own = weights[indices(branches, weights.device)] if len(branches) < self.k else weights
        if owners is not None:
            output = run_dealt(self, inputs, rows, weights, owners, rows_per_line, router_weights, chunk, compiled)
            branches = sorted(set(owners))
        elif chunk < len(branches):
            output = run_in_chunks(self, inputs, rows, own, branches, chunk, compiled)
        else:
            output = run_batched(self, inputs, rows, own, branches, compiled)
        if output["aux_loss"] is not None:
            output["aux_loss"] = output["aux_loss"].mean()
        if owners is None:
            output |= self._of_all_branches(output, branches, rows)
        if len(branches) < self.k:
            idle = [p for branch in range(self.k) if branch not in branches for p in self.branch_parameters(branch)]
            output["log_probs"] = touch(output["log_probs"], [p for p in idle if p.requires_grad and is_whole(p)])
        return BranchOutput(**output, tokens=rows.supervised_tokens(inputs["labels"]))

    def _of_all_branches(self, output: dict[str, Tensor], branches: list[int], rows: Rows) -> dict[str, Tensor]:
        """Expands figures of the n branches that ran from [n, R] to [K, R], with zeros, and adds `ran`."""
        nll = output["nll"]
        ran = torch.ones(self.k, rows.count, dtype=torch.bool, device=nll.device)
        if len(branches) == self.k:
            return {"ran": ran}
        places = indices(branches, nll.device)
        names = {"nll", "correct"} & output.keys()
        full = {name: output[name].new_zeros(self.k, rows.count).index_copy(0, places, output[name]) for name in names}
        return {**full, "ran": torch.zeros_like(ran).index_fill(0, places, True)}

    def forward(self, *args: Any, view_pass: ViewPass | None = None, **kwargs: Any) -> Any:
        """An ordinary PEFT forward with the active adapter, or with `view_pass` a forward for several branches."""
        self.competing.abandon()
        if view_pass is not None:
            return self._run_views(view_pass, kwargs, is_compiling())
        return super().forward(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _run_views(self, view_pass: ViewPass, inputs: dict[str, Any], compiled: bool) -> Any:
        return self._touching_others(run_view_pass(self, view_pass, inputs, compiled), view_pass.branches)

    def _touching_others(self, output: Any, branches: Sequence[int]) -> Any:
        """Adds parameters of branches that did not run to the output's autograd graph, because DDP waits for them."""
        name = next((n for n in ("log_probs", "logits") if getattr(output, n, None) is not None), None)
        if name is not None:
            idle = [p for branch in range(self.k) if branch not in branches for p in self.branch_parameters(branch)]
            output[name] = touch(output[name], [p for p in idle if p.requires_grad and is_whole(p)])
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates with the active adapter."""
        self.competing.abandon()
        return super().generate(*args, **kwargs)

    def _keep_router_logits(self, _: nn.Module, __: Any, output: Any) -> None:
        if self.competing.active is not None:
            keep_router_logits(output, self.competing.active)


def branch_name(branch: int) -> str:
    """The adapter name of a branch."""
    return f"branch_{branch}"


def _rebound(function: Callable, old: nn.Module, new: nn.Module) -> Callable:
    """Copies a function and replaces, in its closure, methods of the module `old` by those of `new`."""
    cells = []
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        if isinstance(held, MethodType) and held.__self__ is old:
            cell = CellType(MethodType(_rebound(held.__func__, old, new), new))
        cells.append(cell)
    if not cells:
        return function
    result = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(result, function)

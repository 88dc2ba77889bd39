"""Every private attribute of another library that this package uses, and why.

A private name may change in any release. [`SEAMS`] lists each name with its library, the reason for its use and the
oldest version in which it was found. `tests/test_compat.py` fails if a name has changed. Other modules use these names
through the functions below, or override a method with that name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Seam:
    """A private name of another library.

    Attributes:
        library: name of the library's distribution.
        name: full name of the attribute of a class or module.
        why: what the name is needed for, and why no public name serves.
        since: the oldest version of the library in which the name was found.
    """

    library: str
    name: str
    why: str
    since: str


SEAMS = (
    # ---- torch ----
    Seam(
        "torch",
        "torch._foreach_norm",
        "the norm of each of 1,200 gradients in one launch; the public function gives one norm for all",
        "2.8",
    ),
    Seam("torch", "torch._foreach_mul_", "clipping of a branch's gradients in one launch", "2.8"),
    Seam("torch", "torch._C._current_graph_task_id", "tells one running backward pass from another", "2.8"),
    Seam(
        "torch",
        "torch._C._will_engine_execute_node",
        "tells backward() from autograd.grad",
        "2.8",
    ),
    Seam(
        "torch",
        "torch.autograd.Variable._execution_engine",
        "its queue_callback runs a function at the end of a backward pass; DDP and FSDP use it too",
        "2.8",
    ),
    Seam("torch", "torch.nn.Module._compiled_call_impl", "tells whether Module.compile() was called", "2.8"),
    Seam(
        "torch", "torch.nn.Module._forward_hooks", "a layer's output is not overwritten if a hook may keep it", "2.8"
    ),
    Seam("torch", "torch.nn.Module._forward_pre_hooks", "see torch.nn.Module._forward_hooks", "2.8"),
    Seam("torch", "torch.nn.Module._backward_hooks", "see torch.nn.Module._forward_hooks", "2.8"),
    Seam("torch", "torch.nn.Module._backward_pre_hooks", "see torch.nn.Module._forward_hooks", "2.8"),
    Seam("torch", "torch.nn.modules.module._has_any_global_hook", "see torch.nn.Module._forward_hooks", "2.8"),
    Seam("torch", "torch.nn.Module._parameters", "a pass reads thousands of weights, and __getattr__ is slow", "2.8"),
    Seam("torch", "torch.nn.Module._buffers", "names of a state dict's tensors, without gathering them", "2.8"),
    Seam("torch", "torch.nn.Module._non_persistent_buffers_set", "buffers that a state dict leaves out", "2.8"),
    Seam("torch", "torch.nn.modules.conv._ConvNd", "a convolution is not an expert, though its weight is 3-D", "2.8"),
    Seam(
        "torch", "torch.nn.modules.dropout._DropoutNd", "a layer with dropout is not captured as a CUDA graph", "2.8"
    ),
    Seam("torch", "torch.fx.experimental._config", "use_duck_shape: sizes may be equal by chance", "2.8"),
    Seam(
        "torch",
        "torch._inductor.async_compile.AsyncCompile",
        "warm_pool starts the processes that compile kernels while a run prepares",
        "2.8",
    ),
    Seam("torch", "torch._dynamo.maybe_mark_dynamic", "no public name marks a length that varies", "2.8"),
    Seam("torch", "Parameter._fsdp_flattened", "tells whether a parameter is part of a flat one of FSDP1", "2.8"),
    Seam("torch", "torch.Tensor._base", "a view of another tensor must not be overwritten", "2.8"),
    # ---- accelerate ----
    Seam("accelerate", "accelerate.Accelerator._models", "FSDP1's wrapped model, for its sharding strategy", "1.12"),
    # ---- transformers ----
    Seam("transformers", "transformers.Trainer._clip_grad_norm", "each branch is clipped by its own norm", "5.10"),
    Seam("transformers", "transformers.Trainer._get_grad_norm", "the norm of all parameters is not computed", "5.10"),
    Seam(
        "transformers",
        "transformers.Trainer._save_optimizer_and_scheduler",
        "under FSDP the method would gather the whole base for each checkpoint",
        "5.10",
    ),
    Seam(
        "transformers",
        "transformers.Trainer._load_optimizer_and_scheduler",
        "a schedule-free optimizer does not resume under FSDP, so this raises an error",
        "5.10",
    ),
    Seam("transformers", "transformers.Trainer._load_from_checkpoint", "checkpoints hold every branch", "5.10"),
    Seam("transformers", "transformers.Trainer._load_best_model", "the best checkpoint's leader wins", "5.10"),
    Seam("transformers", "transformers.Trainer._finish_current_push", "push_to_hub waits for an earlier push", "5.10"),
    Seam("transformers", "transformers.Trainer._prepare_inputs", "validation moves batches as Trainer does", "5.10"),
    Seam("transformers", "transformers.Trainer._save", "writes a checkpoint's files from gathered weights", "5.10"),
    Seam(
        "transformers",
        "transformers.Trainer._created_lr_scheduler",
        "tells whether the Trainer or the user made the schedule",
        "5.10",
    ),
    Seam(
        "transformers",
        "transformers.PreTrainedModel._hf_peft_config_loaded",
        "a model that transformers itself loaded with an adapter raises an error",
        "5.10",
    ),
    Seam(
        "transformers",
        "transformers.PreTrainedModel._loss_function",
        "a loss that a user has set on a model is restored after a pass over several branches",
        "5.10",
    ),
    Seam(
        "transformers",
        "transformers.PreTrainedModel._gradient_checkpointing_func",
        "a layer that is not replayed is checkpointed with the function that was set up for it",
        "5.10",
    ),
    Seam(
        "transformers",
        "transformers.PreTrainedModel._can_compile_fullgraph",
        "tells whether transformers supports compiling a model without a graph break",
        "5.10",
    ),
    Seam(
        "transformers",
        "transformers.PreTrainedConfig._attn_implementation",
        "CUDA graphs are captured only with the attention implementations that were tested",
        "5.10",
    ),
    # ---- trl ----
    Seam("trl", "trl.SFTTrainer._tag_names", "the tags of the model card", "1.16"),
    Seam("trl", "trl.SFTTrainer._name", "the method's name in the model card", "1.16"),
    Seam("trl", "trl.SFTTrainer._metrics", "metrics are restored if a loss is computed a second time", "1.16"),
    Seam("trl", "trl.SFTTrainer._total_train_tokens", "TRL counts a batch again for each branch", "1.16"),
    # ---- peft ----
    Seam("peft", "peft.PeftModel._adapters_disabled", "no public name tells that adapters are disabled", "0.19"),
    Seam(
        "peft",
        "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter",
        "a layer that runs its branches one after the other selects them without set_adapter's requires_grad changes",
        "0.19",
    ),
    # ---- deepspeed ----
    Seam("deepspeed", "Parameter._hp_mapping", "where ZeRO-1 and ZeRO-2 hold a parameter's gradient", "0.18"),
    Seam(
        "deepspeed", "Parameter._index_in_param_group", "the index of a parameter's ZeRO-1 or ZeRO-2 gradient", "0.18"
    ),
    Seam("deepspeed", "Parameter._z3_optimizer", "tells whether ZeRO-3 trains a parameter", "0.18"),
    # ---- bert-score ----
    Seam("bert-score", "bert_score.BERTScorer._model", "the model is moved off the GPU between uses", "0.3.13"),
    Seam("bert-score", "bert_score.BERTScorer._tokenizer", "a length limit is set where the model has none", "0.3.13"),
    # ---- lm-eval ----
    Seam("lm-eval", "lm_eval._cli.run", "tells whether lm_eval's command is running", "0.4.13"),
)


# ---- torch ----


def foreach_norm(tensors: Sequence["Tensor"]) -> list["Tensor"]:
    """The Euclidean norm of each tensor, in one launch."""
    import torch

    return torch._foreach_norm(tensors)


def foreach_mul_(tensors: Sequence["Tensor"], factor: "Tensor") -> None:
    """Multiplies tensors by one factor, in place and in one launch."""
    import torch

    torch._foreach_mul_(tensors, factor)


def running_backward() -> int:
    """The id of the backward pass that is running in this thread; -1 if none is running."""
    import torch

    return torch._C._current_graph_task_id()


def at_the_end_of_backward(function: Callable[[], None]) -> None:
    """Calls a function at the end of the running backward pass, unless that pass raises an error."""
    import torch

    torch.autograd.Variable._execution_engine.queue_callback(function)


def accumulates(parameter: "Tensor") -> bool:
    """Whether the backward pass that is running in this thread accumulates into a parameter's `grad`."""
    import torch

    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(parameter).node)
    except RuntimeError:  # autograd.grad with respect to this parameter, which does not change `grad`
        return False


def is_compiled_in_place(module: "nn.Module") -> bool:
    """Whether `Module.compile()` was called on a module."""
    return module._compiled_call_impl is not None


def has_hooks(module: "nn.Module") -> bool:
    """Whether a module has a forward or backward hook, or there is a hook for all modules."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or has_global_hooks()


def hooks_of(module: "nn.Module") -> tuple[tuple[dict, dict], tuple[dict, dict]]:
    """A module's own hooks: ((forward hooks, forward pre-hooks), (backward hooks, backward pre-hooks))."""
    forward = module._forward_hooks, module._forward_pre_hooks
    return forward, (module._backward_hooks, module._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether there is a hook for all modules."""
    from torch.nn.modules.module import _has_any_global_hook

    return bool(_has_any_global_hook())


def parameters_of(module: "nn.Module") -> dict[str, "nn.Parameter | None"]:
    """A module's own parameters by name. This is the module's dict and not a copy, so later changes show in it."""
    return module._parameters


def persistent_buffers_of(module: "nn.Module") -> set[str]:
    """Names of a module's own buffers that its state dict contains."""
    return {name for name in module._buffers if name not in module._non_persistent_buffers_set}


def is_convolution(module: "nn.Module") -> bool:
    """Whether a module is a convolution of any number of dimensions."""
    from torch.nn.modules.conv import _ConvNd

    return isinstance(module, _ConvNd)


def is_flattened(parameter: "nn.Parameter") -> bool:
    """Whether FSDP1 has made a parameter part of a flat parameter."""
    return getattr(parameter, "_fsdp_flattened", False)


def is_dropout(module: "nn.Module") -> bool:
    """Whether a module is a dropout of any kind."""
    from torch.nn.modules.dropout import _DropoutNd

    return isinstance(module, _DropoutNd)


def mark_varying(tensor: "Tensor", dimension: int) -> None:
    """Tells `torch.compile` that the size of a tensor's dimension varies."""
    import torch

    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


@contextmanager
def distinct_symbols() -> Iterator[None]:
    """Within the block, `torch.compile` gives two sizes that are equal by chance separate symbols.

    The garbage collection after each compilation is switched off too, because it takes half a second.
    """
    import torch
    from torch.fx.experimental import _config

    before, _config.use_duck_shape = _config.use_duck_shape, False
    collects = getattr(torch._dynamo.config, "run_gc_after_compile", None)
    if collects is not None:
        torch._dynamo.config.run_gc_after_compile = False
    try:
        yield
    finally:
        _config.use_duck_shape = before
        if collects is not None:
            torch._dynamo.config.run_gc_after_compile = collects


def start_compilers() -> None:
    """Starts the processes that compile kernels. This takes seconds, so it is done while the run prepares."""
    try:
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.warm_pool()
    except Exception:  # not needed for a correct run: compilation also starts these processes
        return


def is_view(tensor: "Tensor") -> bool:
    """Whether a tensor is a view of another one."""
    return tensor._base is not None


# ---- accelerate ----


def newest_model(accelerator: Any) -> Any:
    """The wrapped model that an accelerator has prepared last."""
    return accelerator._models[-1]


# ---- transformers ----


def prepare_inputs(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Moves a batch to the Trainer's device, in its precision."""
    return trainer._prepare_inputs(inputs)


def has_adapter_of_transformers(model: Any) -> bool:
    """Whether transformers itself, and not PEFT, has loaded an adapter into a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def own_loss_function(model: Any) -> Any:
    """The loss function that was set on a model; None if the model uses the default of its type."""
    return model.__dict__.get("_loss_function")


def reset_loss_function(model: Any) -> None:
    """Makes a model use the default loss function of its type again."""
    model.__dict__.pop("_loss_function", None)


def checkpoint(layer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function with the gradient checkpointing that transformers set up for a layer."""
    return layer._gradient_checkpointing_func(function, *args)


def compiles_whole(model: Any) -> bool:
    """Whether transformers declares that a model compiles without a graph break."""
    return getattr(model, "_can_compile_fullgraph", False)


def attention_of(model: Any) -> str | None:
    """The attention implementation of a model, such as "sdpa"; None if it is not known."""
    return getattr(model.config, "_attn_implementation", None)


# ---- trl ----


def train_metrics(trainer: Any) -> dict[str, list[float]]:
    """The training metrics that a TRL trainer has collected since its last log, as lists by name."""
    return trainer._metrics["train"]


def train_tokens(trainer: Any) -> int:
    """The number of training tokens that a TRL trainer has counted."""
    return trainer._total_train_tokens


def set_train_tokens(trainer: Any, tokens: int) -> None:
    """Sets the number of training tokens that a TRL trainer has counted."""
    trainer._total_train_tokens = tokens


# ---- peft ----


def adapters_disabled(model: Any) -> bool:
    """Whether a `PeftModel` is within `disable_adapter()`."""
    return model._adapters_disabled


# ---- deepspeed ----


def zero_mapping(parameter: "nn.Parameter") -> tuple[bool, Any]:
    """Whether ZeRO-1 or ZeRO-2 trains a parameter, and the mapping of the part that this process holds, or None."""
    return hasattr(parameter, "_hp_mapping"), getattr(parameter, "_hp_mapping", None)


def zero_gradient_piece(parameter: "nn.Parameter") -> "Tensor | None":
    """The part of a parameter's gradient that this process holds under ZeRO-1 or ZeRO-2."""
    fragment = parameter._hp_mapping
    return None if fragment is None else fragment.get_lp_grad_fragment(parameter._index_in_param_group)


def trained_by_zero3(parameter: "nn.Parameter") -> bool:
    """Whether ZeRO-3 trains a parameter."""
    return hasattr(parameter, "_z3_optimizer")


# ---- bert-score ----


def scorer_model(scorer: Any) -> Any:
    """A BERTScorer's model."""
    return scorer._model


def scorer_tokenizer(scorer: Any) -> Any:
    """A BERTScorer's tokenizer."""
    return scorer._tokenizer


# ---- lm-eval ----


def lm_eval_command_runs() -> bool:
    """Whether lm_eval's command is running, which is the case if its module has been imported."""
    import sys

    return "lm_eval._cli.run" in sys.modules

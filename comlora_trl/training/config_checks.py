"""Checks of [`ComLoRAConfig`]: each refuses, in one line, what can't be or what nothing would read.

And precision without a GPU, which TRL's own checks would end on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger

from comlora_trl.competition import ANNEALING_SCHEDULES, EQUATION_SIGNS
from comlora_trl.competition.rungs import ROWS, parse_rungs
from comlora_trl.competition.selector import SELECTOR_INPUTS
from comlora_trl.data.prompts import PROMPT_TEMPLATES

if TYPE_CHECKING:
    from comlora_trl.training.config import ComLoRAConfig

WINNER_CRITERIA = ("selector", "validation_loss", "validation_accuracy")
# Settings that only a run with a selector reads
_OF_THE_SELECTOR = ("top_n", "annealing", "annealing_rate", "noise", "alignment_weight", "pairwise_weight")
_OF_THE_SELECTOR += ("selector_dim", "selector_ffn_dim", "selector_heads", "selector_input", "selector_learning_rate")
_OF_THE_SELECTOR += ("equation_signs",)

logger = get_logger(__name__)


@contextmanager
def settled_without_gpu(args: "ComLoRAConfig") -> Iterator[None]:
    """Around TRL's own checks: without a GPU its default of bf16 would end in an error.

    Float32 it is then, unless bf16 is asked for; the CPU is taken, and a line says so.
    """
    settle = not (args.use_cpu or args.fp16 or args.bf16 is False or torch.accelerator.is_available())
    if settle:
        args.use_cpu, args.bf16 = True, bool(args.bf16)
    yield
    if settle:
        logger.warning(f"no GPU is found: training on the CPU, in {'bfloat16' if args.bf16 else 'float32'}.")


def takes_graphs(args: "ComLoRAConfig") -> bool:
    """Whether a run's decoder layers are to be compiled and replayed as CUDA graphs, if they can be."""
    return args.comlora_graphs is not False and not args.use_cpu and torch.cuda.is_available()


def check_config(args: "ComLoRAConfig") -> None:
    """Checks every setting of the competition, those left out being filled in.

    Raises:
        ValueError: naming the value, what is allowed and what to do.
    """
    _check_ranges(args)
    _check_tournament(args)
    _check_choices(args)
    _check_used(args)


def _check_ranges(args: "ComLoRAConfig") -> None:
    k = args.comlora_k
    _require(k >= 1, "comlora_k", k, "1 or more", "1 is plain LoRA, 2 the paper's best setting")
    for name, meaning in (("comlora_top_n", "all K branches"), ("comlora_branch_chunk", "all K at once")):
        value = getattr(args, name)
        _require(value is None or 1 <= value <= k, name, value, f"1 to comlora_k={k}", f"leave it out for {meaning}")
    above_zero = ("comlora_annealing_rate", "comlora_selector_heads", "comlora_selector_dim")
    for name in (*above_zero, "comlora_selector_ffn_dim", "comlora_selector_learning_rate"):
        value = getattr(args, name)
        _require(value is None or value > 0, name, value, "above 0", "leave it out for the default")
    for name in ("noise", "lm_weight", "alignment_weight", "pairwise_weight"):
        value = getattr(args, f"comlora_{name}")
        _require(value >= 0, f"comlora_{name}", value, "0 or more", "0 turns it off")
    size = args.comlora_validation_size
    _require(size is None or size > 0, "comlora_validation_size", size, "1 or more", "the paper uses 120")
    if args.comlora_lm_weight == 0 and (args.comlora_alignment_weight == 0 or not args.comlora_selector):
        raise ValueError(
            "comlora_lm_weight=0 without an alignment loss leaves the branches nothing to learn from: raise "
            "comlora_lm_weight, or set comlora_alignment_weight above 0 with comlora_selector=True."
        )


def _check_tournament(args: "ComLoRAConfig") -> None:
    k, rates = args.comlora_k, args.comlora_branch_learning_rates
    advice = "leave it out for the default"
    if args.comlora_tournament:
        _require(k > 1, "comlora_k", k, "2 or more in a tournament", "one branch has nobody to compete with")
    if rates is not None:
        found = f"{len(rates)} rates"
        _require(len(rates) == k, "comlora_branch_learning_rates", found, f"comlora_k={k} rates", advice)
        for rate in rates:
            _require(rate > 0, "comlora_branch_learning_rates", rate, "above 0 each", advice)
    parse_rungs(args.comlora_rungs, k)
    if args.comlora_rows == "shared" and args.comlora_selector:
        raise ValueError(
            "comlora_rows='shared' is not possible with comlora_selector=True: eq. 5-9 compare the branches' "
            "losses on the same rows; leave the selector out, or use comlora_rows='all'."
        )
    if args.comlora_rungs and args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size is not possible with comlora_rungs: a retry can't bring retired branches back; "
            "set per_device_train_batch_size."
        )


def _check_choices(args: "ComLoRAConfig") -> None:
    choices = {
        "comlora_annealing": ANNEALING_SCHEDULES,
        "comlora_selector_input": SELECTOR_INPUTS,
        "comlora_winner_by": WINNER_CRITERIA,
        "comlora_rows": ROWS,
        "comlora_equation_signs": EQUATION_SIGNS,
        "comlora_prompt": (None, *PROMPT_TEMPLATES),
    }
    for name, allowed in choices.items():
        value = getattr(args, name)
        _require(value in allowed, name, repr(value), f"one of {', '.join(filter(None, allowed))}", "choose one")


def _check_used(args: "ComLoRAConfig") -> None:
    """Refuses a setting that nothing would read."""
    unread = {
        "comlora_selector=False": () if args.comlora_selector else _OF_THE_SELECTOR,
        "comlora_alignment_weight=0": () if args.comlora_alignment_weight else ("annealing", "annealing_rate"),
        "comlora_pairwise_weight=0": () if args.comlora_pairwise_weight else ("noise",),
        f"comlora_annealing={args.comlora_annealing}": (
            () if args.comlora_annealing == "exponential" else ("annealing_rate",)
        ),
    }
    defaults = {f.name: f.default for f in fields(args)}
    for reason, names in unread.items():
        for name in (f"comlora_{name}" for name in names):
            value = getattr(args, name)
            if value != defaults[name]:
                raise ValueError(f"{name}={value} does nothing with {reason}: leave one of the two out.")


def _require(condition: bool, name: str, value: Any, allowed: str, advice: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value} is not possible: it must be {allowed} ({advice}).")

"""K branches on any architecture, against each branch as the only adapter of a plain PEFT model.

`python tests/branches/architectures.py` prints the README's table.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this file is run by itself
from conftest import collate, make_rows
from families import FAMILIES, make_family
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from comlora_trl.branches.batches import Rows
from comlora_trl.branches.model import BranchModel, branch_name
from comlora_trl.branches.passes import SEPARATELY
from comlora_trl.training.adapters import check_model, default_targets
from comlora_trl.training.trial import try_branches

K = 2


@dataclass
class Figures:
    """What a pass over branches computes: S per token of every row, the loss, the routers' loss, all gradients."""

    nll: Tensor
    loss: Tensor
    router: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def error(self, other: "Figures") -> float:
        """The largest difference of any figure."""
        assert self.gradients.keys() == other.gradients.keys()
        pairs = [(self.nll, other.nll), (self.loss, other.loss), (self.router, other.router)]
        pairs += [(gradient, other.gradients[name]) for name, gradient in self.gradients.items()]
        return torch.stack([(one - two).abs().max() for one, two in pairs]).max().item()


class Architecture:
    """A tiny model with two branches of random weights, where its batch widens, and a batch for it.

    Raises:
        ValueError: the one line with which the trainer's construction would end.
    """

    def __init__(self, family: str, packed: bool = False, k: int = K, **lora: Any) -> None:
        self.family, self.k = family, k
        base = self._base()
        check_model(base)
        lora = {"target_modules": default_targets(base), **lora}
        self.lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora)
        # The trainer's own rule for a router's loss, and its coefficient
        self.coefficient = getattr(base.config, "router_aux_loss_coef", 0.0)
        self.has_router = hasattr(base.config, "output_router_logits") and self.coefficient > 0
        torch.manual_seed(1)
        self.model = BranchModel(base, self.lora, k)
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
        self.place = try_branches(self.model, collator, Accelerator(cpu=True), packed, self.has_router)
        for parameter in self.model.trainable_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.model.train()
        self.batch = collate(make_rows(), packed) | {"use_cache": False, "fused_lm_head": True}
        if self.has_router:
            self.batch["output_router_logits"] = True
        self.rows = Rows.of(self.batch)
        self.weights = torch.rand(k, self.rows.count, generator=torch.Generator().manual_seed(5))

    def _base(self) -> PreTrainedModel:
        base = make_family(self.family)
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
        return base

    def run(self, place: str | None = None, chunk: int | None = None, checkpointing: bool = False) -> Figures:
        """The branches' pass, widened where it was settled or at another place."""
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.expansion.place = place or self.place
        self.model.zero_grad()
        output = self.model.run_branches(dict(self.batch), self.rows, self.weights, None, chunk)
        loss = -output.log_probs.sum() / output.tokens.sum()
        router = torch.zeros(()) if output.aux_loss is None else output.aux_loss
        (loss + self.coefficient * router).backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if ".branch_" in n}
        found = {n: torch.zeros(()) if gradient is None else gradient.clone() for n, gradient in found.items()}
        return Figures(output.nll / output.tokens.clamp(min=1), loss.detach(), router.detach(), found)

    def alone(self) -> Figures:
        """Each branch as the only adapter of a plain PEFT model, by TRL's forward; the mean of their router losses."""
        values, figures = dict(self.model.named_parameters()), []
        tokens = self.rows.supervised_tokens(self.batch["labels"])
        for branch in range(self.k):
            model = get_peft_model(self._base(), self.lora, adapter_name=branch_name(branch)).train()
            own = {n: p for n, p in model.named_parameters() if ".branch_" in n}
            for name, parameter in own.items():
                parameter.data.copy_(values[name])
            output = model(**self.batch)
            weight = self.weights[branch][self.rows.index[:, 1:]]
            loss = -(output.log_probs * weight).sum() / tokens.sum()
            router = torch.zeros(()) if output.aux_loss is None else output.aux_loss / self.k
            total = loss + self.coefficient * router
            found = torch.autograd.grad(total, list(own.values()), allow_unused=True)
            found = [torch.zeros(()) if gradient is None else gradient for gradient in found]
            nll = -self.rows.sum(output.log_probs.detach()) / tokens.clamp(min=1)
            figures.append(Figures(nll, loss.detach(), router.detach(), dict(zip(own, found, strict=True))))
        gradients = {name: gradient for one in figures for name, gradient in one.gradients.items()}
        nll = torch.stack([one.nll for one in figures])
        return Figures(nll, sum(one.loss for one in figures), sum(one.router for one in figures), gradients)

    def errors(self) -> dict[str, float]:
        """All at once, in chunks of 1 and branch by branch, each against the branches alone."""
        expected = self.alone()
        ways = {"batched": (None, None), "chunk 1": (None, 1), "branch by branch": (SEPARATELY, None)}
        return {way: self.run(*given).error(expected) for way, given in ways.items()}


def table() -> str:
    """The README's table, each line from runs of this family."""
    lines = ["| family | adapted by default | the batch widens | error | packed |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        try:
            one = Architecture(family)
        except ValueError as error:
            lines.append(f"| {family} | {str(error).rpartition(': ')[2].rstrip('.')} | | | |")
            continue
        targets = ", ".join(sorted(one.lora.target_modules))
        errors = [f"{max(one.errors().values()):.0e}"]
        try:
            errors.append(f"{max(Architecture(family, packed=True).errors().values()):.0e}")
        except ValueError as error:
            errors.append(f"needs {str(error).partition('Install `')[2].partition('`')[0]}")
        name = f"{family}, router loss" if one.has_router else family
        lines.append(f"| {name} | {targets} | {one.place} | {' | '.join(errors)} |")
    return "\n".join(lines).replace("0e+00", "0")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())

"""Modules that each branch trains whole (PEFT's `modules_to_save`), such as the score head of a reward model.

PEFT keeps a copy of such a module for each adapter and runs that of the active one. While branches compete, each
branch's rows meet the branch's own copy.
"""

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from comlora_trl.branches.layers import CompetingBranches


class BranchSavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper, with competing branches. As in [`BranchLayer`], its switches leave what trains as it was."""

    competing: CompetingBranches

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = self.competing.names
        if not names or self.competing.current() is None:
            return super().forward(x, *args, **kwargs)
        parts = zip(names, x.chunk(len(names)), strict=True)
        return torch.cat([self.modules_to_save[name](part, *args, **kwargs) for name, part in parts])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Chooses the adapter of ordinary forwards; in inference mode its copy does not train."""
        found = [(parameter, parameter.requires_grad) for parameter in self.modules_to_save.parameters()]
        super().set_adapter(adapter_names, inference_mode)
        if not inference_mode:
            _let_train(found)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the copies on or off; what trained before they were switched off trains again."""
        known = self.__dict__.pop("_trained", None)
        if not enabled:
            found = [(parameter, parameter.requires_grad) for parameter in self.modules_to_save.parameters()]
            self.__dict__["_trained"] = known or found
        super().enable_adapters(enabled)
        if enabled and known:
            _let_train(known)

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Gives an adapter's copy the weights of the base model's module."""
        for own, original in zip(
            self.modules_to_save[name].parameters(), self.original_module.parameters(), strict=True
        ):
            own.copy_(original)


def make_branch_modules(model: nn.Module, competing: CompetingBranches) -> list[BranchSavedModule]:
    """Gives the modules that branches save the K-branch forward, in place."""
    found = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for module in found:
        module.__class__ = BranchSavedModule
        module.__dict__["competing"] = competing
    return found


def make_plain_modules(modules: list[BranchSavedModule]) -> None:
    """Gives the modules PEFT's own class back."""
    for module in modules:
        module.__class__ = ModulesToSaveWrapper
        for own in ("competing", "_trained"):
            module.__dict__.pop(own, None)


def _let_train(found: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trains in found:
        parameter.requires_grad_(trains)

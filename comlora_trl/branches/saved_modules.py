"""Modules that each branch trains as a whole (PEFT's `modules_to_save`), such as the score head of a reward model.

PEFT keeps a copy of such a module for each adapter and runs the copy of the active adapter. In a pass over several
branches, the rows of each branch go through the copy of that branch.
"""

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from comlora_trl.branches.layers import CompetingBranches


class BranchSavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper, which runs the copies of several branches in a pass.

    As in [`BranchLayer`], PEFT's switches do not change which parameters train.
    """

    competing: CompetingBranches

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = self.competing.names
        if not names or self.competing.current() is None:
            return super().forward(x, *args, **kwargs)
        parts = zip(names, x.chunk(len(names)), strict=True)
        return torch.cat([self.modules_to_save[name](part, *args, **kwargs) for name, part in parts])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Sets the adapter of ordinary forwards. In inference mode its copy does not train."""
        found = [(parameter, parameter.requires_grad) for parameter in self.modules_to_save.parameters()]
        super().set_adapter(adapter_names, inference_mode)
        if not inference_mode:
            _let_train(found)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the copies on or off. Parameters that trained before they were switched off train again later."""
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
    """Gives a model's `modules_to_save` the forward over several branches, in place, and returns them."""
    found = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for module in found:
        module.__class__ = BranchSavedModule
        module.__dict__["competing"] = competing
    return found


def make_plain_modules(modules: list[BranchSavedModule]) -> None:
    """Restores PEFT's class of the modules."""
    for module in modules:
        module.__class__ = ModulesToSaveWrapper
        for own in ("competing", "_trained"):
            module.__dict__.pop(own, None)


def _let_train(found: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trains in found:
        parameter.requires_grad_(trains)

"""Averages of each branch's weights over its last steps, which rungs measure instead of the trained weights.

At a high learning rate, weights move around a better point, which they reach only as the rate decays. Their average is
near this point already before the decay (Sandler et al., 2023; Hägele et al., 2024). So the average shows earlier than
the trained weights which rate will be the best one at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from comlora_trl.branches.model import BranchModel
from comlora_trl.competition.rungs import average_share
from comlora_trl.training import sharding

AVERAGES_FILE = "averages.safetensors"  # in a checkpoint before the last rung
_HORIZON = "comlora_rung_average"  # the key of the horizon in the file's metadata


class WeightAverages:
    """Running averages of the weights of the living branches, in float32 (float64 for weights in float64).

    Each process averages the pieces of the weights that it holds.

    Args:
        model: the model with its branches, without a wrapper.
        horizon: the share of the steps so far that the averages cover, see [`average_share`].
        values: whole averages to go on from, by the weights' names; None to begin with the weights of the next step.
    """

    def __init__(self, model: BranchModel, horizon: float, values: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.horizon = model, horizon
        self._given = values
        self._averages: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, living: Sequence[int], step: int) -> None:
        """Takes in the weights after an optimizer step.

        Args:
            living: the living branches. The averages of other branches are dropped.
            step: the number of optimizer steps so far, t.
        """
        self._averages = {branch: self._averages.get(branch) or self._first(branch) for branch in living}
        self._given = None
        averages = [one for own in self._averages.values() for one in own]
        weights = [_wide(weight) for branch in living for weight in self._pieces(branch)]
        get_ema_multi_avg_fn(decay=1 - average_share(self.horizon, step))(averages, weights, step)

    def drop(self, branches: Sequence[int]) -> None:
        """Frees the averages of retired branches."""
        for branch in branches:
            self._averages.pop(branch, None)

    @contextmanager
    def in_place(self, root: torch.nn.Module) -> Iterator[None]:
        """Within the block, the branches have their averages as weights. Afterwards, their weights are restored.

        Args:
            root: the model in its wrapper.
        """
        sharding.reshard(root)  # otherwise a forward would use gathered copies of the trained weights
        weights = [weight for branch in self._averages for weight in self._pieces(branch)]
        averages = [one for own in self._averages.values() for one in own]
        with sharding.kept(root, weights):
            with torch.no_grad():
                for weight, average in zip(weights, averages, strict=True):
                    weight.copy_(average)
            yield

    def save(self, folder: str | Path, writes: bool) -> None:
        """Writes the whole averages into a checkpoint, if there are any. All processes must call this.

        Args:
            folder: the checkpoint.
            writes: whether this process writes.
        """
        values = dict(self._given or {})  # if there has been no step since they were given
        for branch, own in self._averages.items():
            named = self.model.named_branch_parameters(branch).items()
            for (name, parameter), average in zip(named, own, strict=True):
                values[sharding.plain_name(name)] = sharding.whole(average, parameter).cpu().contiguous()
        if writes and values:
            metadata = {"format": "pt", _HORIZON: str(self.horizon)}
            save_file(values, Path(folder) / AVERAGES_FILE, metadata=metadata)

    def _first(self, branch: int) -> list[Tensor]:
        if self._given is None:
            return [_wide(weight).clone() for weight in self._pieces(branch)]
        named = self.model.named_branch_parameters(branch).items()
        return [
            sharding.piece(
                self._given[sharding.plain_name(name)].to(parameter.device, _wide_dtype(parameter)), parameter
            )
            for name, parameter in named
        ]

    def _pieces(self, branch: int) -> list[Tensor]:
        return [sharding.local(parameter) for parameter in self.model.branch_parameters(branch)]


def _wide(weight: Tensor) -> Tensor:
    return weight.to(_wide_dtype(weight))


def _wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def saved_averages(folder: str | Path | None) -> dict[str, Tensor] | None:
    """The averages in a checkpoint, by the weights' names; None if it has none, or without a checkpoint."""
    file = _file(folder)
    return None if file is None else load_file(file)


def saved_horizon(folder: str | Path | None) -> float | None:
    """The horizon of the averages in a checkpoint; None if it has none, or if an earlier version wrote it."""
    file = _file(folder)
    if file is None:
        return None
    with safe_open(file, "pt") as opened:
        horizon = (opened.metadata() or {}).get(_HORIZON)
    return None if horizon is None else float(horizon)


def _file(folder: str | Path | None) -> Path | None:
    file = None if folder is None else Path(folder) / AVERAGES_FILE
    return file if file is not None and file.is_file() else None

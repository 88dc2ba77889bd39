"""Averages of each branch's weights over its last steps, measured instead of the trained weights: an ablation.

    w̄_t = (1 − a_t)·w̄_{t−1} + a_t·w_t,   a_t = min(1, 1/(h·t))

w_t are the weights after step t, and h is the horizon, as a share of the steps so far. This is polynomial-decay
averaging (Shamir & Zhang, 2013), without the first 1/h − 1 steps: step s has a weight ∝ C(s − 1, 1/h − 1), nearly
s^(1/h − 1). With h = 0.25 the newest quarter of the steps has about 70% of the weight. It needs one copy of the
weights and no history, and looks the same at every scale, so the number of steps need not be known.

At a high rate the weights move about a better point, which they reach only as the rate decays. Their average is near
that point already at a constant rate (Hägele et al., 2024; LAWA: Kaddour, 2022). So an average may tell before the
decay which rate will be the best one after it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from comlora_trl import ComLoRASFTTrainer
from comlora_trl.competition import ValidationTally

Figures = dict[str, list[float | None]]


class WeightAverages:
    """Running averages of the weights of several branches, in float32.

    Attributes:
        horizons: h of each average, in (0, 1].
        steps: t, the optimizer steps so far.
        averages: horizon -> branch -> averages in the order of the branch's parameters, and of their shapes.

    Raises:
        ValueError: if a horizon is not in (0, 1].
    """

    def __init__(self, horizons: Sequence[float]) -> None:
        if wrong := [horizon for horizon in horizons if not 0 < horizon <= 1]:
            raise ValueError(f"horizons {wrong} are not possible: give shares of the steps, above 0 and up to 1")
        self.horizons, self.steps = tuple(horizons), 0
        self.averages: dict[float, dict[int, list[Tensor]]] = {horizon: {} for horizon in self.horizons}

    @torch.no_grad()
    def update(self, branches: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """Takes in the weights after an optimizer step.

        Args:
            branches: the parameters of each living branch; a branch that is not among them any more is forgotten.

        Raises:
            ValueError: if a branch is new after the first step, for its average would be of other steps.
        """
        self.steps += 1
        weights = {branch: [one.detach().float() for one in parameters] for branch, parameters in branches.items()}
        for horizon, averages in self.averages.items():
            share = min(1.0, 1.0 / (horizon * self.steps))
            if self.steps == 1:
                averages |= {branch: [one.clone() for one in own] for branch, own in weights.items()}
                continue
            if new := weights.keys() - averages.keys():
                raise ValueError(f"branches {sorted(new)} are new at step {self.steps}: give all from the first step")
            for branch in averages.keys() - weights.keys():
                del averages[branch]
            old = [one for branch in weights for one in averages[branch]]
            new_values = [one for own in weights.values() for one in own]
            # A share of 1 is a copy, for 0 times a weight that is not finite is not 0
            if share == 1.0:
                torch._foreach_copy_(old, new_values)
            else:
                torch._foreach_lerp_(old, new_values, share)

    @contextmanager
    def swapped(self, horizon: float, branches: Mapping[int, Sequence[nn.Parameter]]) -> Iterator[None]:
        """Within the block, the branches have their averages as weights, rounded to the parameters' own dtype.

        Afterwards the trained weights are restored to the bit, also after an error.

        Args:
            horizon: of `horizons`.
            branches: the parameters of each branch to swap.

        Raises:
            KeyError: if there is no average of that horizon or branch.
        """
        parameters = [one.detach() for own in branches.values() for one in own]
        averages = [one for branch in branches for one in self.averages[horizon][branch]]
        trained = [one.clone() for one in parameters]
        try:
            torch._foreach_copy_(parameters, averages)
            yield
        finally:
            torch._foreach_copy_(parameters, trained)


class AveragingTrainer(ComLoRASFTTrainer):
    """The package's trainer with averages of the branches' weights beside it. Training itself is the same.

    Args:
        horizons: of the averages.
        deciding: the horizon whose average is measured at the rungs; None for the trained weights. The last selection,
            and all exported adapters, are of the trained weights.
        watched: steps after which every average is measured.

    Attributes:
        averages: of the living branches.
        averaged: horizon, as text -> step -> {"nll", "accuracy"} of each branch, None for one that is out.
        trained: step -> the same of the trained weights, at the rungs that averages decide.

    Raises:
        ValueError: if `deciding` is not one of the horizons.
    """

    def __init__(
        self,
        *args: Any,
        horizons: Sequence[float],
        deciding: float | None = None,
        watched: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        if deciding is not None and deciding not in horizons:
            raise ValueError(f"no average has the horizon {deciding} that decides: add it to {[*horizons]}")
        self.horizons, self.deciding, self.watched = tuple(horizons), deciding, set(watched)
        super().__init__(*args, **kwargs)
        self.begin_averages()
        self.add_callback(_Averages(self))

    def begin_averages(self) -> None:
        """Begins new averages, without figures."""
        self.averages = WeightAverages(self.horizons)
        self.averaged: dict[str, dict[int, Figures]] = {f"{horizon:g}": {} for horizon in self.horizons}
        self.trained: dict[int, Figures] = {}

    @property
    def living_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Branch -> its parameters, for those that take part."""
        model = self.comlora_model
        return {branch: model.branch_parameters(branch) for branch in self.competition.state.living}

    def measure_average(self, horizon: float) -> ValidationTally:
        """Validates the living branches with their averages, and records the figures."""
        with self.averages.swapped(horizon, self.living_parameters):
            tally = super()._measure()
        self.averaged[f"{horizon:g}"][self.competition.step] = self._figures(tally)
        return tally

    def _measure(self) -> ValidationTally:
        if self.deciding is None or self.competition.rung is None:
            return super()._measure()
        self.trained[self.competition.step] = self._figures(super()._measure())
        return self.measure_average(self.deciding)

    def _figures(self, tally: ValidationTally) -> Figures:
        by, step = self.competition.settings.winner_by, self.competition.step
        result = tally.result(self.competition.state.alive, by, step)
        return {"nll": result["validation_nll"], "accuracy": result["validation_accuracy"]}


class _Averages(TrainerCallback):
    """Updates the averages directly after the optimizer: at the end of a step, a rung comes before other callbacks."""

    def __init__(self, trainer: AveragingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_averages()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.averages.update(self.trainer.living_parameters)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.trainer.watched:
            for horizon in self.trainer.horizons:
                self.trainer.measure_average(horizon)

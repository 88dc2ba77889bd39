"""Weights, rungs and the winner of a competition: pure functions and small state, without a model.

`losses` has eq. 4–9, `annealing` eq. 13–14, `selector` eq. 1–3, `standings` the tallies and the winner (eq. 11–12).
"""

from comlora_trl.competition.losses import (
    ANNEALING_SCHEDULES,
    EQUATION_SIGNS,
    CompetitionSettings,
    annealing,
    mean_nll,
    pairwise_loss,
    pairwise_losses,
    row_weights,
    selection_probabilities,
    step_noise,
)
from comlora_trl.competition.standings import CompetitionState, ValidationTally, winner

__all__ = [
    "ANNEALING_SCHEDULES",
    "EQUATION_SIGNS",
    "CompetitionSettings",
    "CompetitionState",
    "ValidationTally",
    "annealing",
    "mean_nll",
    "pairwise_loss",
    "pairwise_losses",
    "row_weights",
    "selection_probabilities",
    "step_noise",
    "winner",
]

"""The competition's losses, rungs and winner, as pure functions and small state without a model.

- `losses`: row weights, pairwise loss and annealing (eq. 4–9 and 13–14).
- `selector`: the network that scores the branches (eq. 1–3).
- `rungs`: the points of training at which branches are retired.
- `standings`: the state of a competition, validation sums and the winner (eq. 11–12).
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

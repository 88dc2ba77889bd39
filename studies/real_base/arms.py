"""The arms of the study, as data: what is trained, and what is read off the fields of the grid.

A unit of cost is one LoRA's pass over the training rows.

Branches that all see every row, without a selector, do not know of each other: each is the LoRA that training it alone
gives, and a branch that retires changes nothing for the others (the package's tests show both). So a *field* of K
branches is K runs of a grid, and holds every tournament on all rows among its rates: measured at the rungs, they are
read off it. The branches of a field start from the same A, that of a single run with its seed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comlora_trl import ComLoRAConfig
from comlora_trl.competition.rungs import Rung, default_rates, default_rungs, parse_rungs, retired_at
from studies.common.cost import branch_steps

RATES = tuple(1.25e-4 * 2**step for step in range(10))  # 1.25e-4 to 6.4e-2, a factor of 2 apart
RANK, WIDE = 8, 32
GUESSES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # what a tournament is centred on, times the best rate
LOW = 1 / 4  # the guess of the goals
EARLIEST, EARLY, MIDDLE, LATE = "0.05:2,0.15:1", "0.1:2,0.25:1", "0.25:2,0.5:1", "0.5:2,0.75:1"
EARLY_OF_EIGHT, MIDDLE_OF_EIGHT = "0.1:4,0.25:1", "0.25:4,0.5:1"
RUNG_SHARES = (0.1, 0.25, 0.5, 0.75)
CRITERIA = {"nll": "validation_loss", "accuracy": "validation_accuracy", "selector": "selector"}
AVERAGED, OTHER_HORIZONS = "averaged nll", (0.1, 0.5)  # rungs that measure averaged weights; without: trained weights
GRID_FIELD = re.compile(r"field r8 \S+ to \S+")  # what the grid's fields are called
FEW_SEEDS = 3  # of the arms that are not the goals' own

assert (EARLY, EARLY_OF_EIGHT) == (default_rungs(4), default_rungs(8))


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        fields: of `ComLoRAConfig`; the others are the study's own, the same for all arms.
        kind: `field` (branches from the same A), `run` (the package as it is) or `trl` (TRL's own trainer).
        rank: of each branch; `lora_alpha` is twice the rank.
        passes: over the training rows.
        watched: whether every branch is measured at `RUNG_SHARES` of the steps.
        priority: what is trained first; 1 is the grid, 2 answers the goals.
        few: whether it is trained with `FEW_SEEDS` at most.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "run"
    rank: int = RANK
    passes: int = 1
    watched: bool = False
    priority: int = 3
    few: bool = False

    @property
    def rates(self) -> list[float]:
        """Peak rate of each branch."""
        own = self.fields.get("comlora_branch_learning_rates")
        return list(own or [self.fields["learning_rate"]] * self.fields.get("comlora_k", 1))

    def branch_steps(self, steps: int) -> int:
        """Steps times the branches that take them, in a run of as many steps."""
        if self.fields.get("comlora_rows") == "shared":
            return steps
        return branch_steps(steps, len(self.rates), self.fields.get("comlora_rungs"))


def steps_of(rows: int, batch: int, passes: int = 1) -> int:
    """Optimizer steps of passes over the rows."""
    return passes * math.ceil(rows / batch)


def on_lattice(rate: float) -> float:
    """A rate as the grid writes it: 3.9999e-3 is 4e-3."""
    return float(f"{rate:.6g}")


def rates_around(centre: float, k: int) -> tuple[float, ...]:
    """The package's own tournament's rates: ½, 1, 2, 4 times for K = 4."""
    return tuple(on_lattice(rate) for rate in default_rates(centre, k))


def independent(rates: Sequence[float], **more: Any) -> dict[str, Any]:
    """The configuration of branches that differ in their rate."""
    alone = {"comlora_selector": False, "comlora_winner_by": "validation_loss"}
    return {"comlora_k": len(rates), "comlora_branch_learning_rates": [*rates], **alone, **more}


def fields_of_grid(rates: Sequence[float] = RATES, most: int = 5) -> list[Arm]:
    """The grid in fields of at most so many branches, low and high rates mixed."""
    count = math.ceil(len(rates) / most)
    parts = [[on_lattice(rate) for rate in rates[part::count]] for part in range(count)]
    return [
        Arm(f"field r8 {part[0]:g} to {part[-1]:g}", independent(part), "field", watched=True, priority=1)
        for part in parts
    ]


def tournament_name(k: int, rungs: str, rows: str, by: str, centre: float) -> str:
    """What a tournament is called in the tables."""
    return f"tournament K{k} {rungs} {rows} rows by {by}, around {centre:g}"


def tournament(
    centre: float, rungs: str = EARLY, rows: str = "shared", k: int = 4, by: str = "nll", **more: Any
) -> Arm:
    """Branches of different rates, of which the rungs leave one.

    Args:
        centre: the rate that the branches' rates are around.
        rungs, rows, k: as the package's fields.
        by: of `CRITERIA`, or "averaged nll", with a horizon behind it if it is not the package's default.
        more: fields of the arm.
    """
    given = {"comlora_rungs": rungs, "comlora_rows": rows, "comlora_rung_average": 0.0}
    if by.startswith(AVERAGED):
        horizon = float(by.removeprefix(AVERAGED) or ComLoRAConfig.comlora_rung_average)
        given |= {"comlora_winner_by": "validation_loss", "comlora_rung_average": horizon}
    else:
        given["comlora_winner_by"] = CRITERIA[by]
    return Arm(tournament_name(k, rungs, rows, by, centre), independent(rates_around(centre, k), **given), **more)


def comlora(k: int, rate: float, without: str | None = None, **more: Any) -> Arm:
    """The paper's competition; `without` names a loss that is left out (Table 5)."""
    losses = {"L_LM": "lm", "L_align": "alignment", "L_pairwise": "pairwise"}
    removed = {f"comlora_{losses[without]}_weight": 0.0} if without else {}
    name = f"ComLoRA K{k} {rate:g}" + (f" w/o {without}" if without else "")
    return Arm(name, {"comlora_k": k, "learning_rate": rate, **removed}, few=True, **more)


def wide_field(best: float) -> Arm:
    """LoRA of rank 32 at three rates."""
    rates = [on_lattice(best * factor) for factor in (LOW, 1 / 2, 1)]
    return Arm("field r32", independent(rates), "field", rank=WIDE, priority=4, few=True)


def equal_branches(best: float) -> Arm:
    """Four branches of one rate, each with its own A and no selector: four seeds of LoRA."""
    return Arm(f"four seeds {best:g}", independent([best] * 4), watched=True, priority=5, few=True)


def long_field(best: float, passes: int) -> Arm:
    """LoRA at two rates with more passes over the rows."""
    rates = [on_lattice(best / 2), best]
    return Arm(f"field r8 {passes} passes", independent(rates), "field", passes=passes, priority=7, few=True)


def dependent_arms(best: float) -> list[Arm]:
    """The arms that are told the grid's best rate; without its knowledge a user has to guess."""
    low = on_lattice(best * LOW)
    return [
        *(tournament(on_lattice(best * factor), by=AVERAGED, priority=2) for factor in GUESSES),
        *(tournament(on_lattice(best * factor), priority=2) for factor in GUESSES),
        *(tournament(centre, rows="all", by=AVERAGED, priority=3) for centre in (best, low)),
        *(tournament(centre, EARLY_OF_EIGHT, k=8, by=AVERAGED, priority=3) for centre in (best, low)),
        *(tournament(centre, MIDDLE, priority=3) for centre in (best, low)),
        tournament(best, LATE, priority=3),
        *(tournament(centre, EARLY_OF_EIGHT, k=8, priority=3) for centre in (best, low)),
        *(comlora(k, rate, priority=4) for k in (2, 4) for rate in (low, best)),
        wide_field(best),
        *(tournament(centre, EARLY, by="accuracy", priority=5) for centre in (best, low)),
        tournament(best, MIDDLE_OF_EIGHT, k=8, priority=5),
        equal_branches(best),
        *(tournament(centre, EARLIEST, by=AVERAGED, priority=8) for centre in (best, low)),
        *(tournament(centre, EARLIEST, by=f"{AVERAGED} {OTHER_HORIZONS[-1]:g}", priority=8) for centre in (best, low)),
        *(tournament(centre, MIDDLE, by=AVERAGED, priority=8) for centre in (best, low)),
        *(
            tournament(centre, by=f"{AVERAGED} {horizon:g}", priority=8, few=True)
            for horizon in OTHER_HORIZONS
            for centre in (best, low)
        ),
        *(comlora(2, best, without, priority=6) for without in ("L_LM", "L_align", "L_pairwise")),
        long_field(best, 2),
        long_field(best, 4),
    ]


def all_arms(best: float | None, rates: Sequence[float] = RATES, most: int = 5) -> list[Arm]:
    """Every arm that is trained; without a best rate those that give it."""
    return [*fields_of_grid(rates, most), *([] if best is None else dependent_arms(best))]


def chief_arms(best: float | None, rates: Sequence[float] = RATES, most: int = 5) -> list[Arm]:
    """The least that says what a tournament is worth: the grid, and the tournaments of 4 of the goals."""
    centres = [] if best is None else [best, on_lattice(best * LOW)]
    return [*fields_of_grid(rates, most), *(tournament(centre, by=AVERAGED, priority=2) for centre in centres)]


def timed_arms(best: float) -> list[Arm]:
    """What runs with the machine to itself, for the wall clock."""
    return [
        Arm(f"TRL's LoRA r8 {best:g}", {"learning_rate": best}, "trl"),
        tournament(best, by=AVERAGED),
        tournament(best, rows="all", by=AVERAGED),
        tournament(best, EARLY_OF_EIGHT, k=8, by=AVERAGED),
        comlora(2, best),
        comlora(4, best),
    ]


@dataclass(frozen=True)
class Derived:
    """An arm read off a seed's grid.

    Attributes:
        rates: of the branches that take part; one of them is a LoRA by itself, several a grid or a tournament.
        by: `nll` (lowest) or `accuracy` (highest token accuracy), on the validation rows.
        rungs: as `comlora_rungs`; None for a grid.
    """

    name: str
    rates: tuple[float, ...]
    by: str = "nll"
    rungs: str | None = None

    def units(self, steps: int) -> float:
        """What it costs by itself, in passes over the rows."""
        return branch_steps(steps, len(self.rates), self.rungs) / steps

    def chosen(self, grid: Mapping[float, Mapping[str, Any]], steps: int) -> float:
        """The rate that wins.

        Args:
            grid: rate -> {"nll", "accuracy", "watched": {step: {"nll", "accuracy"}}}, all on the validation rows; None
                for a branch that has diverged.
        """
        living, highest = list(self.rates), self.by == "accuracy"
        for rung in parse_rungs(self.rungs, len(self.rates)):
            values = [grid[rate]["watched"][str(rung.step(steps))][self.by] for rate in living]
            gone = retired_at(rung, values, highest)
            living = [rate for place, rate in enumerate(living) if place not in gone and values[place] is not None]
        gone = retired_at(Rung(1.0, 1), end := [grid[rate][self.by] for rate in living], highest)
        left = [rate for place, rate in enumerate(living) if place not in gone and end[place] is not None]
        return left[0] if left else living[0]


def derived_arms(best: float, rates: Sequence[float] = RATES) -> list[Derived]:
    """All of them: single LoRAs, grids, tournaments on all rows whose rates the grid has."""
    rates = tuple(on_lattice(rate) for rate in rates)
    arms = [Derived(f"LoRA r8 {rate:g}", (rate,)) for rate in rates]
    for by in ("nll", "accuracy"):
        arms.append(Derived(grid_name(len(rates), by), rates, by))
        for centre in (on_lattice(best * factor) for factor in GUESSES):
            four, eight = rates_around(centre, 4), rates_around(centre, 8)
            if set(four) <= set(rates):
                arms.append(Derived(grid_name(4, by, centre), four, by))
                arms += [_tournament(four, rungs, by, centre) for rungs in (EARLY, MIDDLE, LATE)]
            if set(eight) <= set(rates):
                arms += [_tournament(eight, rungs, by, centre) for rungs in (EARLY_OF_EIGHT, MIDDLE_OF_EIGHT)]
    return arms


def grid_name(k: int, by: str, centre: float | None = None) -> str:
    """What a grid is called in the tables."""
    return f"grid of {k} by {by}" + ("" if centre is None else f", around {centre:g}")


def _tournament(rates: tuple[float, ...], rungs: str, by: str, centre: float) -> Derived:
    return Derived(tournament_name(len(rates), rungs, "all", by, centre), rates, by, rungs)

"""The arms of the study: what is trained, as data, and what is chosen among finished runs.

A unit of cost is one LoRA's usual training: `UNIT` row passes (one row through one branch, forward and backward).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from comlora_trl.competition.rungs import Rung

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
RANK, ROWS, STEPS = 4, 64, 200
UNIT = ROWS * STEPS
SIZES = {"6000": 750, "640": 80}  # training rows in all, and of each of the eight tasks


@dataclass(frozen=True)
class Arm:
    """One way to train, on `rows` rows a step.

    Attributes:
        fields: of `ComLoRAConfig`; the other ones are the study's own, the same for all arms.
        rank: of each branch; `lora_alpha` is twice the rank.
        watch: fractions of the steps at which every branch is measured.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    rank: int = RANK
    rows: int = ROWS
    steps: int = STEPS
    watch: tuple[float, ...] = ()

    @property
    def k(self) -> int:
        """Its branches."""
        return self.fields.get("comlora_k", 2)

    @property
    def watched_steps(self) -> list[int]:
        """The steps after which every branch is measured, those of rungs at these fractions."""
        return [Rung(share, 1).step(self.steps) for share in self.watch]

    @property
    def core(self) -> bool:
        """Whether the questions at the top of the report need the arm; such arms are trained first."""
        return self.name in _core_names()

    @property
    def row_passes(self) -> int:
        """What the run costs: over its steps, its rows times the branches that see them."""
        if self.fields.get("comlora_rows", "all") == "shared":
            return self.rows * self.steps
        return self.rows * sum(length * living for length, living in self._spans())

    def _spans(self) -> list[tuple[int, int]]:
        """(steps, living branches) between the rungs."""
        spans, begin, living = [], 0, self.fields.get("comlora_k", 2)
        for share, left in _rungs(self.fields.get("comlora_rungs")):
            end = math.ceil(share * self.steps)
            spans.append((end - begin, living))
            begin, living = end, left
        return [*spans, (self.steps - begin, living)]


@dataclass(frozen=True)
class Choice:
    """The best branch of several arms' runs of one seed by a validation figure, at the cost of all of them.

    Attributes:
        by: `nll` (lowest) or `accuracy` (highest token accuracy).
    """

    name: str
    arms: tuple[str, ...]
    by: str


def _rungs(text: str | None) -> list[tuple[float, int]]:
    pairs = [rung.split(":") for rung in text.split(",")] if text else []
    return [(float(share), int(left)) for share, left in pairs]


def lora(rate: float, rank: int = RANK, rows: int = ROWS, steps: int = STEPS) -> Arm:
    """Plain LoRA."""
    name = f"lora r{rank} {rate:g}" + (f" {rows} rows" if rows != ROWS else "")
    name += f" {rows * steps / UNIT:.0f}x steps" if rows * steps > 1.5 * UNIT else ""
    fields = {"comlora_k": 1, "comlora_selector": False, "comlora_winner_by": "validation_loss"}
    return Arm(name, {**fields, "learning_rate": rate}, rank, rows, steps)


def comlora(k: int, rate: float, rank: int = RANK, name: str = "", **fields: Any) -> Arm:
    """The paper's competition; `fields` are the ablations'."""
    return Arm(f"comlora K{k} r{rank} {rate:g}{name}", {"comlora_k": k, "learning_rate": rate, **fields}, rank)


def same_rate(rate: float, k: int = 4) -> Arm:
    """K independent branches of one rate, which differ in their random A alone."""
    name = f"{k} branches {rate:g}"
    fields = {"comlora_k": k, "comlora_selector": False, "comlora_winner_by": "validation_loss", "learning_rate": rate}
    return Arm(name, fields)


def tournament(
    rungs: str, sharing: str = "shared", rates: Iterable[float] = RATES, rows: int = ROWS, steps: int = STEPS,
    by: str = "validation_loss", name: str = "", **fields: Any,
) -> Arm:  # fmt: skip
    """Branches of different rates, of which the rungs leave one."""
    rates = tuple(rates)
    label = f"tournament K{len(rates)} {rungs} {sharing} rows" + (f" {rows} a step" if rows != ROWS else "") + name
    label += " by accuracy" if by == "validation_accuracy" else ""
    given = {
        "comlora_k": len(rates),
        "comlora_branch_learning_rates": list(rates),
        "comlora_rungs": rungs,
        "comlora_rows": sharing,
        "comlora_selector": False,
        "comlora_winner_by": by,
    }
    return Arm(label, {**given, **fields}, rows=rows, steps=steps)


EARLY, MIDDLE, LATE = "0.1:2,0.25:1", "0.25:2,0.5:1", "0.5:1"
EIGHT_RATES = tuple(rate * factor for rate in RATES for factor in (1, math.sqrt(2)))
NARROW = 16  # rows a step, for a quarter of a unit: small batches, which shared rows thin out
TUNED = 2e-3  # ComLoRA's ablations run at this rate; --tuned names another once the rates' own rows are known


def lora_arms() -> list[Arm]:
    """One LoRA at each rate, at larger ranks, in smaller batches, and with four times the steps."""
    ranks = [lora(rate, rank) for rank in (RANK, 2 * RANK, 4 * RANK) for rate in RATES]
    narrow = [lora(rate, rows=NARROW) for rate in RATES]
    return [*ranks, *narrow, *(lora(rate, steps=4 * STEPS) for rate in RATES[1:])]


def comlora_arms(tuned: float) -> list[Arm]:
    """ComLoRA at each rate, its ablations (Table 5) and independent branches at the tuned one."""
    ablations = {"lm": "L_LM", "alignment": "L_align", "pairwise": "L_pairwise"}
    without = [
        comlora(4, tuned, name=f" w/o {title}", **{f"comlora_{loss}_weight": 0.0}) for loss, title in ablations.items()
    ]
    return [*(comlora(k, rate) for k in (2, 4) for rate in RATES), *without, *(same_rate(rate) for rate in RATES)]


def tournament_arms() -> list[Arm]:
    """Tournaments: rungs, shared and all rows, batches, K, criterion, with the selector, at four units."""
    one_unit = [tournament(rungs, by=by) for rungs in (EARLY, MIDDLE, LATE) for by in _CRITERIA]
    double = {"steps": 2 * STEPS, "name": " 2x steps"}
    return [
        *one_unit,
        *(tournament(rungs, "all", by=by) for rungs in (EARLY, MIDDLE) for by in _CRITERIA),
        *(tournament(MIDDLE, "all", by=by, **double) for by in _CRITERIA),
        tournament(MIDDLE, "all", rates=[TUNED] * 4, steps=2 * STEPS, name=" 2x steps, one rate"),
        tournament(MIDDLE, "all", comlora_selector=True, by="selector", name=" with selector"),
        tournament(EARLY, rows=NARROW),
        tournament("0.1:4,0.25:1", rates=EIGHT_RATES),
        tournament("0.1:4,0.25:1", rates=EIGHT_RATES, rows=NARROW),
    ]


_CRITERIA = ("validation_loss", "validation_accuracy")


@lru_cache
def _core_names() -> frozenset[str]:
    double = {"steps": 2 * STEPS, "name": " 2x steps"}
    arms = [
        *(lora(rate) for rate in RATES),
        lora(TUNED, 4 * RANK),
        *(comlora(k, TUNED) for k in (2, 4)),
        comlora(4, RATES[-1]),
        same_rate(TUNED),
        *(tournament(rungs) for rungs in (EARLY, MIDDLE)),
        tournament(EARLY, by="validation_accuracy"),
        tournament(EARLY, "all"),
        tournament(MIDDLE, "all", **double),
        tournament(MIDDLE, "all", comlora_selector=True, by="selector", name=" with selector"),
        tournament("0.1:4,0.25:1", rates=EIGHT_RATES),
    ]
    return frozenset(arm.name for arm in arms)


def choices() -> list[Choice]:
    """The grids, and the best of four seeds at each rate."""
    groups = {
        "grid of 4": tuple(lora(rate).name for rate in RATES),
        f"grid of 4, {NARROW} rows": tuple(lora(rate, rows=NARROW).name for rate in RATES),
        **{f"best of 4 seeds {rate:g}": (same_rate(rate).name,) for rate in RATES},
    }
    return [Choice(f"{name} by {by}", arms, by) for name, arms in groups.items() for by in ("nll", "accuracy")]


def all_arms(tuned: float = TUNED) -> list[Arm]:
    """Every arm that is trained."""
    return [*lora_arms(), *comlora_arms(tuned), *tournament_arms()]

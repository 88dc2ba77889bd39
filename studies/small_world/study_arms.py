"""The arms of the study: what is trained, as data.

A unit of cost is one LoRA's usual training: `UNIT` row passes (one row through one branch, forward and backward).

Branches that all see every row, without a selector, do not know of each other: each is the LoRA that training it alone
gives, and a branch that retires changes nothing for the others (the package's tests show both). So a *joint* run of
many branches trains many arms at once; `study_derived.py` says which.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comlora_trl.competition.rungs import Rung
from studies.common.cost import branch_steps

RATES = (2.5e-4, 1e-3, 4e-3, 1.6e-2)
EIGHT_RATES = (*RATES, 5e-4, 2e-3, 8e-3, 3.2e-2)  # the four first: they are branches 0 to 3 of the first joint run
TUNED = 4e-3  # where branches of one rate compete, and of ComLoRA's ablations
RANK, ROWS, STEPS = 4, 64, 200
NARROW, NARROW_STEPS = 16, 2 * STEPS  # small batches, which shared rows thin out
UNIT = ROWS * STEPS
SIZES = {"6000": 750, "640": 80}  # training rows in all, and of each of the eight tasks
EARLY, MIDDLE, LATE = "0.1:2,0.25:1", "0.25:2,0.5:1", "0.5:2,0.75:1"
EARLY_OF_EIGHT, MIDDLE_OF_EIGHT = "0.1:4,0.25:1", "0.25:4,0.5:1"
SHARE = 0.5  # of the facts, which the study's worlds have re-paired: of all, rank 4 learns nothing in a unit
CRITERIA = ("nll", "accuracy")
RUNG_SHARES = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Arm:
    """One way to train, on `rows` rows a step.

    Attributes:
        fields: of `ComLoRAConfig`; the other ones are the study's own, the same for all arms.
        rank: of each branch; `lora_alpha` is twice the rank.
        watch: fractions of the steps at which every branch is measured.
        priority: 1 for what the questions at the top of the report need, which is trained first.
        seeds: it is trained with at most as many, None for all.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    rank: int = RANK
    rows: int = ROWS
    steps: int = STEPS
    watch: tuple[float, ...] = ()
    priority: int = 3
    seeds: int | None = None

    @property
    def k(self) -> int:
        """Its branches."""
        return self.fields.get("comlora_k", 2)

    @property
    def watched_steps(self) -> list[int]:
        """The steps after which every branch is measured, those of rungs at these fractions."""
        return [Rung(share, 1).step(self.steps) for share in self.watch]

    @property
    def expected(self) -> float:
        """About how long a run takes, in steps of one branch: a step costs the host as much as eight branches do."""
        return self.row_passes / self.rows + 8 * self.steps

    @property
    def row_passes(self) -> int:
        """What the run costs: over its steps, its rows times the branches that see them."""
        shared = self.fields.get("comlora_rows", "all") == "shared"
        return self.rows * (
            self.steps if shared else branch_steps(self.steps, self.k, self.fields.get("comlora_rungs"))
        )


def with_rates(rates: Iterable[float], **more: Any) -> dict[str, Any]:
    """The configuration of branches that differ in their rate."""
    rates = list(rates)
    alone = {"comlora_selector": False, "comlora_winner_by": "validation_loss"}
    return {"comlora_k": len(rates), "comlora_branch_learning_rates": rates, **alone, **more}


def joint(name: str, rates: Iterable[float], **more: Any) -> Arm:
    """Independent branches, one a rate, measured at every rung."""
    return Arm(f"joint {name}", with_rates(rates), watch=RUNG_SHARES, **more)


def comlora(k: int, rate: float, name: str = "", priority: int = 3, **fields: Any) -> Arm:
    """The paper's competition; `fields` are the ablations'."""
    return Arm(f"ComLoRA K{k} {rate:g}{name}", {"comlora_k": k, "learning_rate": rate, **fields}, priority=priority)


def tournament(
    rungs: str, sharing: str = "shared", rates: Sequence[float] = RATES, by: str = "nll", name: str = "",
    **more: Any,
) -> Arm:  # fmt: skip
    """Branches of different rates, of which the rungs leave one."""
    rows = more.get("rows", ROWS)
    label = tournament_name(len(rates), rungs, sharing, by, f" {rows} a step" if rows != ROWS else "") + name
    criterion = {"nll": "validation_loss", "accuracy": "validation_accuracy", "selector": "selector"}[by]
    given = {"comlora_rungs": rungs, "comlora_rows": sharing, "comlora_winner_by": criterion}
    given |= {"comlora_selector": by == "selector", "comlora_rung_average": 0.0}  # rungs measure trained weights
    return Arm(label, with_rates(rates, **given), **more)


def tournament_name(k: int, rungs: str, sharing: str, by: str, note: str = "") -> str:
    """What a tournament is called in the tables."""
    return f"tournament K{k} {rungs} {sharing} rows{note} by {by}"


def joint_runs() -> list[Arm]:
    """The joint runs: all rates, twice the steps, a larger rank, one rate, four times the steps, small batches."""
    return [
        joint("r4", EIGHT_RATES, priority=1),
        joint("r4 2x steps", RATES, steps=2 * STEPS, priority=1),
        joint("r16", RATES[1:3], rank=4 * RANK, priority=1),
        joint(f"r4 all {TUNED:g}", (TUNED,) * 4, priority=2),
        joint("r4 4x steps", (TUNED / 2, TUNED), steps=4 * STEPS),
        joint("r4 16 rows", RATES, rows=NARROW, steps=NARROW_STEPS),
        joint(f"r4 2x steps all {TUNED:g}", (TUNED,) * 4, steps=2 * STEPS),
    ]


def comlora_arms(tuned: float) -> list[Arm]:
    """ComLoRA at the rates around LoRA's best, and its ablations (Table 5) at the tuned one."""
    priorities = {4: {TUNED: 1, TUNED / 2: 1, TUNED / 4: 2, TUNED * 2: 3}, 2: {TUNED: 2, TUNED / 2: 2, TUNED / 4: 3}}
    ablations = {"lm": "L_LM", "alignment": "L_align", "pairwise": "L_pairwise"}
    without = [
        comlora(4, tuned, name=f" w/o {title}", **{f"comlora_{loss}_weight": 0.0}) for loss, title in ablations.items()
    ]
    rates = [(k, rate, priority) for k, given in priorities.items() for rate, priority in given.items()]
    return [*(comlora(k, rate, priority=priority) for k, rate, priority in rates), *without]


def tournament_arms() -> list[Arm]:
    """Tournaments on shared rows and with the selector, which no joint run contains, and two runs as a check."""
    narrow = {"rows": NARROW, "steps": NARROW_STEPS}
    first = [tournament(rungs, by=by, priority=1) for rungs in (EARLY, MIDDLE) for by in CRITERIA]
    eight = {"rates": sorted(EIGHT_RATES), "priority": 2}
    return [
        *first,
        *(tournament(LATE, by=by, priority=2) for by in CRITERIA),
        *(tournament(rungs, by="accuracy", **eight) for rungs in (EARLY_OF_EIGHT, MIDDLE_OF_EIGHT)),
        tournament(MIDDLE, "all", by="selector", priority=2),
        *(tournament(rungs, by="accuracy", **narrow) for rungs in (EARLY, MIDDLE)),
        tournament(EARLY, "all", name=" (trained)", priority=1, seeds=1),
        Arm(f"LoRA r4 {TUNED:g} (trained)", with_rates([TUNED]), priority=1, seeds=1),
    ]


BASE = Arm("base", with_rates([1e-12]), steps=1, priority=1)  # hardly trained: what the base knows
TIMED = (
    BASE.name,  # warms the machine up
    f"LoRA r4 {TUNED:g} (trained)",
    tournament_name(4, EARLY, "shared", "nll"),
    tournament_name(4, EARLY, "all", "nll") + " (trained)",
    f"ComLoRA K4 {TUNED:g}",
)


def all_arms(tuned: float = TUNED) -> list[Arm]:
    """Every arm that is trained."""
    return [BASE, *joint_runs(), *comlora_arms(tuned), *tournament_arms()]

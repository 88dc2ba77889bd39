"""Arms that are read off joint runs of independent branches: one LoRA, grids, several seeds, all-rows tournaments."""

from dataclasses import dataclass
from typing import Any

from study_arms import (
    CRITERIA,
    EARLY,
    EARLY_OF_EIGHT,
    EIGHT_RATES,
    LATE,
    MIDDLE,
    MIDDLE_OF_EIGHT,
    TUNED,
    Arm,
    joint_runs,
    tournament_name,
)

from comlora_trl.competition.rungs import Rung, parse_rungs, retired_at
from studies.common.cost import branch_steps

Row = dict[str, Any]


@dataclass(frozen=True)
class Derived:
    """An arm read off a joint run.

    Attributes:
        joint: the trained arm.
        branches: those that take part; one of them is a LoRA by itself, several are a grid or a tournament.
        by: `nll` (lowest), `accuracy` (highest token accuracy), or `mean` of the branches' test accuracies: a guess.
            A branch that diverged counts as 0%.
        rungs: as `comlora_rungs`; None for a grid.
    """

    name: str
    joint: Arm
    branches: tuple[int, ...]
    by: str = "nll"
    rungs: str | None = None

    @property
    def row_passes(self) -> int:
        """What it would have cost by itself."""
        k = 1 if self.by == "mean" else len(self.branches)
        return self.joint.rows * branch_steps(self.joint.steps, k, self.rungs)

    def chosen(self, row: Row) -> int:
        """The branch that wins in a result line of the joint run."""
        living = list(self.branches)
        for rung in self.own_rungs:
            values = row["watched"][str(rung.step(self.joint.steps))][self.by]
            gone = retired_at(rung, [values[branch] for branch in living], self._highest)
            living = [branch for place, branch in enumerate(living) if place not in gone]
        end = [row["branches"].get(str(branch), {}).get(self.by) for branch in living]
        last = Rung(1.0, 1)  # the end, at which one is left
        gone = retired_at(last, end, self._highest) if len(living) > 1 else []
        return next(branch for place, branch in enumerate(living) if place not in gone)

    def result(self, row: Row) -> Row:
        """Test accuracy (of the chosen branch, or the mean), rate and cost, from one result line of the joint run."""
        rates = self.joint.fields["comlora_branch_learning_rates"]
        tests = {branch: row["branches"].get(str(branch), {}).get("test", 0.0) for branch in self.branches}
        cost = {"row_passes": self.row_passes, "seconds": None}
        if self.by == "mean":
            return {"test": sum(tests.values()) / len(tests), "rate": None, **cost}
        branch = self.chosen(row)
        return {"test": tests[branch], "rate": rates[branch], **cost}

    @property
    def own_rungs(self) -> tuple[Rung, ...]:
        """Its rungs, which the joint run has been measured at; none for a grid."""
        return parse_rungs(self.rungs, len(self.branches))

    @property
    def _highest(self) -> bool:
        return self.by == "accuracy"


def derived_arms() -> list[Derived]:
    """All of them: single LoRAs, grids and seeds, tournaments on all rows."""
    usual, double, wide, same, long, narrow, double_same = joint_runs()
    four, eight = tuple(range(4)), tuple(sorted(range(8), key=lambda branch: EIGHT_RATES[branch]))
    arms = [Derived(f"LoRA r4 {EIGHT_RATES[branch]:g}", usual, (branch,)) for branch in eight]
    arms += [Derived("LoRA r4, rate guessed among the four", usual, four, "mean")]
    for run, text in ((wide, "LoRA r16 {:g}"), (long, "LoRA r4 {:g} 4x steps"), (double, "LoRA r4 {:g} 2x steps")):
        rates = run.fields["comlora_branch_learning_rates"]
        arms += [Derived(text.format(rate), run, (branch,)) for branch, rate in enumerate(rates)]
    for by in CRITERIA:
        arms.append(Derived(f"grid of 4 by {by}", usual, four, by))
        arms.append(Derived(f"grid of 8 by {by}", usual, eight, by))
        arms.append(Derived(f"best of 4 seeds {TUNED:g} by {by}", same, four, by))
        arms.append(Derived(f"grid of 4, 16 rows a step by {by}", narrow, four, by))
        arms += [_tournament(usual, four, rungs, by) for rungs in (EARLY, MIDDLE, LATE)]
        arms += [_tournament(usual, eight, rungs, by) for rungs in (EARLY_OF_EIGHT, MIDDLE_OF_EIGHT)]
        arms += [_tournament(double, four, rungs, by, " 2x steps") for rungs in (EARLY, MIDDLE, LATE)]
        arms += [_tournament(narrow, four, rungs, by, " 16 a step") for rungs in (EARLY, MIDDLE)]
        arms.append(_tournament(double_same, four, MIDDLE, by, f" 2x steps, all {TUNED:g}"))
    for low in (1, 2, 3):
        close = eight[low : low + 4]
        arms.append(Derived(f"LoRA r4, rate guessed among{close_rates(low)}", usual, close, "mean"))
        arms += [Derived(f"grid of 4{close_rates(low)} by {by}", usual, close, by) for by in CRITERIA]
        arms += [_tournament(usual, close, EARLY, by, close_rates(low)) for by in CRITERIA]
    return arms


def close_rates(low: int) -> str:
    """The name of four rates a factor of 2 apart, as the package's own tournament has them, by the lowest's place."""
    rates = sorted(EIGHT_RATES)
    return f" {rates[low]:g} to {rates[low + 3]:g}"


def _tournament(run: Arm, branches: tuple[int, ...], rungs: str, by: str, note: str = "") -> Derived:
    return Derived(tournament_name(len(branches), rungs, "all", by, note), run, branches, by, rungs)

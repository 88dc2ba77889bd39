"""From result files to runs (one adapter under one set of conditions) and groups of runs that are each other's seeds.

Different conditions are never merged: neither two measurements of one adapter, nor two adapters that were trained or
measured differently except for the seed.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from comlora_trl.evaluation.conditions import Measure
from comlora_trl.evaluation.results import ResultFile

# Settings in which seeds of one method may differ
_PER_SEED = {
    "seed",
    "data_seed",
    "output_dir",
    "comlora_winner_dir",
    "run_name",
    "logging_dir",
    "comlora_overwrite_winner",
}


@dataclass
class Run:
    """One adapter under one set of conditions in one table, from one or several result files.

    Attributes:
        values: column to figure in percent.
    """

    method: str
    identity: str
    place: str
    table: str
    about: dict[str, Any]
    measures: dict[str, Measure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, float]:
        return {column: value for measure in self.measures.values() for column, value in measure.values.items()}

    @property
    def shared(self) -> dict[str, str]:
        """The conditions of all its figures."""
        return next(iter(self.measures.values())).shared

    def takes(self, measure: Measure) -> bool:
        """Whether a figure may stand beside (or replace) this run's."""
        known = self.measures.get(measure.task)
        return measure.shared == self.shared and (known is None or known.own == measure.own)

    def add(self, measure: Measure) -> None:
        """Adds a figure; where it was measured before under the same conditions, the newer counts, and a note says
        so if they differ."""
        known = self.measures.get(measure.task)
        if known and known.values != measure.values:
            both = " and ".join(f"{next(iter(m.values.values())):.2f}" for m in (known, measure))
            self.notes.append(f"{measure.task} was measured twice under the same conditions, {both}; the newer counts")
        self.measures[measure.task] = measure

    def conditions(self) -> dict[str, str]:
        """Column to the conditions its figure was taken under."""
        taken = {}
        for measure in self.measures.values():
            described = str((sorted(measure.shared.items()), sorted(measure.own.items())))
            taken |= dict.fromkeys(measure.values, described)
        return taken

    def traits(self) -> dict[str, str]:
        """The properties that seeds of one method have in common: shared conditions, training data and settings."""
        traits = dict(self.shared)
        for name in ("base", "data"):
            if self.about.get(name):
                traits["base" if name == "base" else "training data"] = str(self.about[name])
        for name, value in (self.about.get("settings") or {}).items():
            if name not in _PER_SEED:
                traits[name] = str(value)
        return traits


def make_runs(files: list[ResultFile]) -> list[Run]:
    """Puts the figures of each adapter together, table by table, as far as their conditions are the same."""
    runs: list[Run] = []
    for file in files:
        for measure in file.measures:
            fitting = (
                run
                for run in runs
                if (run.method, run.identity, run.table) == (file.method, file.identity, measure.table)
                and run.takes(measure)
            )
            run = next(fitting, None)
            if run is None:
                run = Run(file.method, file.identity, file.place, measure.table, file.about)
                runs.append(run)
            run.add(measure)
            run.notes += [note for note in file.notes if note not in run.notes]
    return runs


def method_key(method: str) -> str:
    """Method names are compared without regard to case and white space."""
    return re.sub(r"\s+", "", method).lower()


def group_seeds(runs: list[Run]) -> list[list[Run]]:
    """Groups the runs of one method and table: each group's runs differ in their weights alone."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if not any(clashes(run, other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def clashes(first: Run, second: Run) -> dict[str, tuple[str, str]]:
    """The differences that keep two runs from being seeds of one method: name to the two values."""
    found: dict[str, tuple[str, str]] = {}
    one, two = first.traits(), second.traits()
    # a property known of one run only is no difference, but a condition that only one has (a chat template) is
    for name in {**one, **two}:
        optional = name not in {**first.shared, **second.shared}
        if one.get(name) != two.get(name) and not (optional and None in (one.get(name), two.get(name))):
            found[name] = (one.get(name, "none"), two.get(name, "none"))
    for task in first.measures.keys() & second.measures.keys():
        mine, theirs = first.measures[task].own, second.measures[task].own
        for name in mine.keys() & theirs.keys():
            if mine[name] != theirs[name]:
                found[f"{name} of {task}"] = (mine[name], theirs[name])
    if not found and first.identity == second.identity:
        found["weights"] = ("the same", "the same")
    return found

"""What a competition costs, in steps of one branch."""

from comlora_trl.competition.rungs import parse_rungs


def branch_steps(steps: int, k: int, rungs: str | None) -> int:
    """Steps times the branches that take them, where every living branch sees all rows."""
    total, begin, living = 0, 0, k
    for rung in parse_rungs(rungs, k):
        total += (rung.step(steps) - begin) * living
        begin, living = rung.step(steps), rung.survivors
    return total + (steps - begin) * living

"""Few rows in which every pair of values of two axes occurs together: all pairs, without the full product."""

import random
from collections.abc import Callable
from itertools import combinations

Row = dict[str, str]


def covering_rows(
    axes: dict[str, tuple[str, ...]], possible: Callable[[Row], bool], apart: tuple[frozenset[str], ...] = ()
) -> list[Row]:
    """Rows that cover each possible pair of values, found greedily; the same ones every time.

    Args:
        axes: the values of each axis.
        possible: whether a row, or part of one, makes sense.
        apart: pairs of axes that have nothing to do with each other and need not be covered.
    """
    draw, rows = random.Random(0), []
    missing = {
        (first, a, second, b)
        for first, second in combinations(axes, 2)
        if frozenset((first, second)) not in apart
        for a in axes[first]
        for b in axes[second]
        if possible({first: a, second: b})
    }
    while missing:
        candidates = [row for row in (_random_row(axes, possible, sorted(missing), draw) for _ in range(40)) if row]
        best = max(candidates, key=lambda row: len(missing & _pairs(row)))
        rows.append(best)
        missing -= _pairs(best)
    return rows


def _pairs(row: Row) -> set[tuple[str, str, str, str]]:
    return {(first, row[first], second, row[second]) for first, second in combinations(row, 2)}


def _random_row(
    axes: dict[str, tuple[str, ...]], possible: Callable[[Row], bool], missing: list, draw: random.Random
) -> Row | None:
    first, a, second, b = draw.choice(missing)
    row = {first: a, second: b}
    for axis in draw.sample(list(axes), len(axes)):
        if axis not in row:
            values = [value for value in axes[axis] if possible(row | {axis: value})]
            if not values:
                return None
            wanted = {(f, x, s, y) for f, x, s, y in missing if axis in (f, s)}
            row[axis] = max(
                draw.sample(values, len(values)),
                key=lambda value: len(wanted & {p for o in row for p in _ordered(axes, o, row[o], axis, value)}),
            )
    return {axis: row[axis] for axis in axes}


def _ordered(axes: dict, first: str, a: str, second: str, b: str) -> list[tuple[str, str, str, str]]:
    order = list(axes)
    return [(first, a, second, b)] if order.index(first) < order.index(second) else [(second, b, first, a)]

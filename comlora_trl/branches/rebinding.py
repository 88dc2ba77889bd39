"""Methods of a module, made another module's."""

import functools
from collections.abc import Callable
from types import CellType, FunctionType, MethodType

from torch import nn


def rebound(function: Callable, old: nn.Module, new: nn.Module) -> Callable:
    """A function whose closure has methods of one module, with another module in their place."""
    cells = []
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        if isinstance(held, MethodType) and held.__self__ is old:
            cell = CellType(MethodType(rebound(held.__func__, old, new), new))
        cells.append(cell)
    if not cells:
        return function
    result = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    result.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(result, function)

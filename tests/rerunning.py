"""A stand-in for CUDA graphs on any device: a capture notes what is to be done, a replay does it again.

Like a CUDA graph it reads and writes the memory it was captured with, and nothing else: what a layer's own forward
reads at replay time from its module is what it read at the capture.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class RerunGraph:
    def __init__(self) -> None:
        self.work: Callable[[], None] | None = None

    def capture(self, work: Callable[[], None]) -> None:
        work()
        self.work = work

    def replay(self) -> None:
        self.work()


class RerunGraphs:
    """Makes them."""

    def new(self) -> RerunGraph:
        return RerunGraph()

    def capturing(self) -> Any:
        return nullcontext()

    def watched(self) -> Any:
        return nullcontext()

    def release(self) -> None:
        pass

    def check(self) -> None:
        pass

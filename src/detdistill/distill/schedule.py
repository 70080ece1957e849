"""When a method acts."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from detdistill.errors import UserError
from detdistill.registry import AtLeastOne

TIMING = ("start", "stop", "warmup")
"""Keywords of `Schedule`, which every method takes beside its own."""


class Schedule:
    """When a method acts: its weights rise from 0 over the warm-up and are 0 outside start..stop.

    Args:
        start: optimisation steps before the method begins.
        stop: the step from which on it is silent; None: never.
        warmup: steps after `start` over which its weights rise linearly from 0.
    """

    def __init__(
        self,
        *,
        start: Annotated[int, Ge(0)] = 0,
        stop: AtLeastOne | None = None,
        warmup: Annotated[int, Ge(0)] = 0,
    ) -> None:
        """Always on, by default."""
        if stop is not None and stop <= start:
            raise UserError(f"stop is {stop} and start {start}, so it would never act; raise stop")
        self.start, self.stop, self.warmup = start, stop, warmup

    def factor(self, iteration: int) -> float:
        """Of the weights, 0..1, after `iteration` optimisation steps."""
        if iteration < self.start or (self.stop is not None and iteration >= self.stop):
            return 0.0
        return min(1.0, (iteration - self.start) / self.warmup) if self.warmup else 1.0

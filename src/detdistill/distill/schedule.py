"""When a method acts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge
from torch import Tensor, nn

from detdistill.errors import UserError
from detdistill.registry import AtLeastOne
from detdistill.structures import DenseOutput

if TYPE_CHECKING:
    from detdistill.distill.method import Method

TIMING = ("start", "stop", "warmup")
"""Keywords of `Schedule`, which every method takes beside its own."""
Steps = Annotated[int, Ge(0)]


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
        start: Steps = 0,
        stop: AtLeastOne | None = None,
        warmup: Steps = 0,
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


NamedSchedule = tuple[str, str, Schedule]


def named_schedules(methods: Mapping[str, Method]) -> list[NamedSchedule]:
    """Of prepared methods, for messages: whom each is of, how its options begin, itself."""
    named = []
    for name, method in methods.items():
        for part, own in method.schedules.items():
            whose, options = (f"{name}'s {part.upper()}", f"{part}_") if part else (name, "")
            named.append((whose, f"methods.{name}.{options}", own))
    return named


def silent(terms: Iterable[str], trained: nn.Module, output: DenseOutput) -> dict[str, Tensor]:
    """Terms that a schedule silences: 0, tied to the student and to all that they would train."""
    tie = sum((p.sum() for p in trained.parameters()), output.pyramid[0].sum()) * 0
    return dict.fromkeys(terms, tie)

"""The methods of a study held against one another, paired by seed; AP on the 0..100 scale."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detdistill.study.summary import (
    Arm,
    best_method,
    control_of,
    is_clear,
    mean_interval,
    methods_of,
    paired_gains,
    same_time_of,
    signed,
)
from detdistill.study.table import NONE

NOTE = (
    "AP of the row's method over the column's arm, paired by seed: the mean and, of several seeds, "
    "its 95 % interval. Each pair is tested alone: of many, some differ by chance."
)


@dataclass(frozen=True)
class Difference:
    """The AP of a method over that of another arm.

    Attributes:
        arm: the method.
        other: what it is held against; the method itself where a table has to be filled.
    """

    arm: Arm
    other: Arm

    @property
    def gains(self) -> list[float]:
        """By seed."""
        return paired_gains(self.arm, self.other)

    @property
    def mean(self) -> str:
        """Over the seeds, with its sign."""
        return NONE if self.arm is self.other else signed(statistics.fmean(self.gains))

    @property
    def interval(self) -> str:
        """95 %, of the mean; empty with one seed."""
        if self.arm is self.other or len(self.gains) < 2:
            return ""
        low, high = mean_interval(self.gains)
        return f"{signed(low)} to {signed(high)}"

    def __str__(self) -> str:
        """Both, as a table has them."""
        return f"{self.mean} ({self.interval})" if self.interval else self.mean


def differences(arms: Sequence[Arm]) -> list[list[Difference]]:
    """A row of each method over every arm but the teacher.

    Empty with less than two methods: the table has all of the only one.
    """
    methods = methods_of(arms)
    others = [arm for arm in arms if arm.kind != "teacher"]
    if len(methods) < 2:
        return []
    return [[Difference(arm, other) for other in others] for arm in methods]


def difference_rows(rows: Sequence[Sequence[Difference]]) -> list[list[str]]:
    """A header and the rows as text."""
    header = ["over", *(cell.other.title for cell in rows[0])]
    return [header, *([row[0].arm.title, *map(str, row)] for row in rows)]


def difference_values(rows: Sequence[Sequence[Difference]]) -> list[dict[str, Any]]:
    """The same as plain values, AP on the 0..1 scale as COCO has it, by seed."""
    return [
        {
            "arm": cell.arm.name,
            "over": cell.other.name,
            "ap_gains": [gain / 100 for gain in cell.gains],
        }
        for row in rows
        for cell in row
        if cell.arm is not cell.other
    ]


def ranking(arms: Sequence[Arm]) -> list[str]:
    """A sentence about which method is best; none with one seed or method, or where none gains."""
    best, methods, same_time = best_method(arms), methods_of(arms), same_time_of(arms)
    if len(methods) < 2 or len(best.runs) < 2 or best.mean() <= control_of(arms).mean():
        return []
    ahead, unsure = [], []
    others = sorted(methods, key=lambda arm: arm.mean(), reverse=True)
    for cell in (Difference(best, other) for other in others if other is not best):
        if is_clear(cell.gains):
            ahead.append(f"{cell.other.title} ({cell.mean} AP)")
        else:
            unsure.append(f"{cell.other.title} ({cell.mean} AP, 95 % interval {cell.interval})")
    parts = [f"ahead of {', '.join(ahead)}"] if ahead else []
    if unsure:
        parts.append(f"not told apart from {', '.join(unsure)}: add seeds")
    first = "has the highest mean AP" if unsure else "is the best of these methods"
    text = f"At equal steps {best.title} {first}, {'; '.join(parts)}."
    if same_time.mean() > best.mean():
        text += (
            f" The student alone, given the time of the slowest, reaches {same_time.mean():.1f} "
            f"AP, {best.title} {best.mean():.1f}."
        )
    return [text]

"""What a check says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from detdistill.errors import UserError

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""Ascending; a note is neither good nor bad."""

AGAIN = "correct that, and run doctor again"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: see `LEVELS`.
        text: what was found.
        advice: what to do; warnings and problems always say it.
        details: further lines, of a table for instance.
    """

    level: Level
    text: str
    advice: str = ""
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Holds every check to its duty."""
        if self.level in ("warning", "problem") and not self.advice:
            raise ValueError(f"a {self.level} says what to do: {self.text}")


@dataclass
class Section:
    """What a group of checks found.

    Attributes:
        name: key in the JSON file.
        title: headline.
        findings: in the order of the checks.
        numbers: what was measured, as plain values; NaN and infinity as None.
    """

    name: str
    title: str
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def worst(sections: Iterable[Section]) -> Level:
    """The gravest level of all findings; "ok" of none."""
    levels = [finding.level for section in sections for finding in section.findings]
    return max(levels, key=LEVELS.index, default="ok")


def from_error(level: Level, error: UserError) -> Finding:
    """A refusal as a finding: our sentences end with what to do, after a semicolon."""
    text, _, advice = str(error).rpartition("; ")
    return Finding(level, text, advice) if text else Finding(level, advice, AGAIN)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def counted(count: int, noun: str) -> str:
    """`1 box`, `2 boxes`."""
    plural = noun + ("es" if noun.endswith(("x", "s", "ch")) else "s")
    return f"{count} {noun if count == 1 else plural}"


def finite(value: float) -> float | None:
    """The value for a JSON file, which knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None

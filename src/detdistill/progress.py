"""How far something long is, on stderr: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_SECONDS = 10.0  # between plain lines

Advance = Callable[[int], None]
"""Called with how many more are done."""


class Pace:
    """Lets a plain line through at most every `LINE_SECONDS`."""

    def __init__(self, wait: bool) -> None:
        """`wait`: before the first line, too, so that what is done soon says nothing."""
        self._last = time.monotonic() if wait else -math.inf

    def due(self) -> bool:
        """Whether it is time for a line, which then counts as written."""
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return False
        self._last = now
        return True


def seconds_left(done: int, total: int, seconds: float) -> float:
    """How long the rest takes when `done` took so many seconds."""
    return seconds / max(1, done) * (total - done)


class Rate(ProgressColumn):
    """What a task says of its rate, else how many are done a second."""

    def render(self, task: Task) -> Text:
        """Empty where neither is known."""
        speed = task.finished_speed or task.speed
        known = "" if speed is None else f"{speed:.1f}/s"
        return Text(task.fields.get("rate", known), no_wrap=True)


def columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows: what, how many of how many, for how long, how long still, the rate."""
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Rate(),
    )


def plain_console() -> Console:
    """Standard error; what is printed may be a user's words, in which no markup is looked for."""
    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False)


class Counts:
    """How many of what are done, of several things if need be, each with a bar or lines."""

    def __init__(self, title: str = "", console: Console | None = None) -> None:
        """`title` stands before each plain line."""
        self._title = title
        self._console = console or plain_console()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(*columns(), console=self._console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, float] = {}
        self._pace = Pace(wait=True)

    def __enter__(self) -> Counts:
        """Shows the bars."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Removes them."""
        if self._bar is not None:
            self._bar.stop()

    def counter(self, what: str, total: int) -> Advance:
        """Begins to count; what it returns adds to the count."""
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done += more
            self.update(what, done, total)

        advance(0)
        return advance

    def update(self, what: str, done: int, total: int) -> None:
        """Shows how many of `total` are done."""
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        seconds = now - self._begun.setdefault(what, now)
        if done and seconds and self._pace.due():
            left = seconds_left(done, total, seconds)
            self._console.print(
                f"{self._title}{what}: {done}/{total}, {left:.0f} s left, {done / seconds:.1f}/s",
                soft_wrap=True,
            )

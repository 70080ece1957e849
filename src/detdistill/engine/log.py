"""What a run tells: a line of numbers per interval, a progress bar, and guards on the terms."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.progress import Progress
from rich.text import Text

from detdistill.engine.checkpoint import last_good, write_text
from detdistill.errors import DivergedError
from detdistill.progress import Advance, Counts, Pace, columns, plain_console, seconds_left

ZERO_STEPS = 50
HEAVY, HEAVY_STEPS = 100, 50
"""How many times the task's losses a term may be, and for how many steps, before it is told; AKD at
its published weight is 25 times them at the end of its warm-up in `small/head`, and helps."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line."""

    def __init__(self, path: Path, step: int) -> None:
        """Continues at `step`: later lines, written before an interruption, are dropped."""
        self.path = path
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")  # a power cut leaves anything
            lines = text.splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step] if step else []
            write_text(path, "".join(kept))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off in mid-line


class TermWindow:
    """Means of the terms since the last line, and the guards."""

    def __init__(self, out: Path) -> None:
        """`out` is named in messages."""
        self.out = out
        self._sums: dict[str, tuple[float, float]] = {}
        self._count = 0
        self._zeros: Counter[str] = Counter()
        self._heavy: Counter[str] = Counter()
        self._weights: defaultdict[str, float] = defaultdict(float)  # of this step
        self._seen: dict[str, bool] = {}  # terms of this step: was any not 0?

    def add(
        self,
        raw: Mapping[str, float],
        weighted: Mapping[str, float],
        step: int,
        image_ids: Sequence[int],
        resting: Collection[str] = (),
    ) -> None:
        """Takes the terms of a micro batch; `DivergedError` on a non-finite one.

        `resting` terms are 0 by their schedule, about which there is nothing to warn.
        """
        for name, value in weighted.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} is {value} at step {step}, images {list(image_ids)}; "
                    f"{last_good(self.out)}; try a lower lr or clip_norm, and look at these "
                    f"images' boxes"
                )
        for name, value in raw.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + value, before[1] + weighted[name])
            self._seen[name] = self._seen.get(name, False) or value != 0 or name in resting
            self._weights[name] += weighted[name]
        self._count += 1

    def end_step(self) -> list[str]:
        """Warnings about distillation terms that have long been exactly 0, or far too large."""
        warnings = self._outweighing()
        for name, seen in self._seen.items():
            self._zeros[name] = 0 if seen else self._zeros[name] + 1
            if self._zeros[name] == ZERO_STEPS and not name.startswith("task/"):
                warnings.append(
                    f"{name} was exactly 0 for {ZERO_STEPS} steps: nothing is distilled by it; "
                    f"check the teacher with `detdistill eval` and the method's settings"
                )
        self._seen.clear()
        return warnings

    def _outweighing(self) -> list[str]:
        task = sum(value for name, value in self._weights.items() if name.startswith("task/"))
        warnings = []
        for name, value in self._weights.items():
            self._heavy[name] = self._heavy[name] + 1 if value > HEAVY * task > 0 else 0
            if self._heavy[name] == HEAVY_STEPS:
                warnings.append(
                    f"{name} has been over {HEAVY} times the task's losses for {HEAVY_STEPS} steps "
                    f"({value:.3g} beside {task:.3g}): the student learns little else; lower its "
                    f"weight or the learning rate, or give its method an earlier `stop`"
                )
        self._weights.clear()
        return warnings

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the raw and the weighted terms; starts a new window."""
        raw = {name: sums[0] / self._count for name, sums in self._sums.items()}
        weighted = {name: sums[1] / self._count for name, sums in self._sums.items()}
        self._sums, self._count = {}, 0
        return raw, weighted


class _RunBar(Progress):
    """The bar, and below it the terms, on as many lines as they need."""

    terms: Sequence[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Each term stays on one line."""
        yield from super().get_renderables()
        if self.terms:
            whole = " ".join(term.replace(" ", "\u00a0") for term in self.terms)
            lines = textwrap.fill(whole, max(1, self.console.width - 1))
            yield Text(lines.replace("\u00a0", " "))


class RunDisplay:
    """A progress bar on a terminal, plain lines elsewhere, nothing on further processes."""

    def __init__(self, title: str, total: int, done: int, quiet: bool) -> None:
        """`done` of `total` steps are behind us."""
        self.title, self.total = title, total
        self.quiet = quiet
        self._console = plain_console()
        self._bar: _RunBar | None = None
        self._start, self._first = time.monotonic(), done
        self._pace = Pace(wait=False)
        if not quiet and self._console.is_terminal:
            self._bar = _RunBar(*columns(), console=self._console)
            self._task = self._bar.add_task(title, total=total, completed=done)

    def open(self) -> None:
        """Shows the bar."""
        if self._bar is not None:
            self._bar.start()

    def step(
        self,
        step: int,
        raw: Mapping[str, float],
        weighted: Mapping[str, float],
        images_per_second: float,
    ) -> None:
        """Shows the state after `step` steps."""
        terms = [_term(name, raw[name], value) for name, value in weighted.items()]
        rate = f"{images_per_second:.1f} img/s"
        if self._bar is not None:
            self._bar.terms = terms
            self._bar.update(self._task, completed=step, rate=rate)
            return
        if self.quiet or not (self._pace.due() or step >= self.total):
            return
        seconds = time.monotonic() - self._start
        left = seconds_left(step - self._first, self.total - self._first, seconds)
        self._console.print(
            f"{self.title}: step {step}/{self.total}, {left:.0f} s left, {rate}, {' '.join(terms)}",
            soft_wrap=True,
        )

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Advance]:
        """Shows how far something beside the steps is, an evaluation for instance."""
        if self._bar is None:
            with Counts(f"{self.title}: ", self._console) as counts:
                yield (lambda more: None) if self.quiet else counts.counter(what, total)
            return
        bar, task = self._bar, self._bar.add_task(what, total=total)
        try:
            yield lambda more: bar.advance(task, more)
        finally:
            bar.remove_task(task)

    def say(self, text: str) -> None:
        """One line above the bar."""
        if not self.quiet:
            self._console.print(f"{self.title}: {text}", soft_wrap=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()


def _term(name: str, raw: float, weighted: float) -> str:
    """A term, and in brackets what it weighs in the loss if that is something else."""
    shown = f"{raw:.3f}"
    return f"{name} {shown}" if f"{weighted:.3f}" == shown else f"{name} {shown} ({weighted:.3f})"

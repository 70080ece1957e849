"""Counts: bars with a rate on a terminal, now and then a line elsewhere."""

import io
import re
import sys

import pytest

from detdistill import progress
from detdistill.progress import Counts, seconds_left


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_every_ten_seconds_and_none_before(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Counts("runs/a: ") as counts:
        advance = counts.counter("val images", 200)
        for _ in range(25):
            clock.now += 1
            advance(4)
    assert sys.stderr.getvalue().splitlines() == [
        "runs/a: val images: 40/200, 40 s left, 4.0/s",
        "runs/a: val images: 80/200, 30 s left, 4.0/s",
    ]


def test_what_is_done_soon_says_nothing(clock, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Counts() as counts:
        counts.update("images", 8, 8)
        clock.now += 9
        counts.update("more images", 8, 8)
    assert sys.stderr.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_has_a_rate(monkeypatch):
    for name, value in {"COLUMNS": "100", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", Terminal())
    with Counts() as counts:
        advance = counts.counter("test images", 30)
        for _ in range(3):
            advance(10)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())
    assert re.search(r"test images .* 30/30 .* \d+\.\d/s", shown)


@pytest.mark.parametrize(("done", "left"), [(0, 1000), (50, 10), (100, 0)])
def test_seconds_left(done, left):
    assert seconds_left(done, 100, 10.0) == left

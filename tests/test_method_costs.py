"""The benchmark of the methods' costs runs; what it measures is not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "methods.py"
SMALL = "--teacher r18 --size 64 --classes 2 --batch 1 --repeats 1"


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("feature", 1),
        pytest.param("tf_head", 1, marks=pytest.mark.slow),
        pytest.param("head", 2, marks=pytest.mark.slow),
    ],
)
def test_costs_are_measured(method: str, rows: int) -> None:
    # A program of its own: it changes the number of threads.
    command = [sys.executable, str(SCRIPT), *SMALL.split(), "--methods", method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith(f"{method} ") for line in done.stdout.splitlines()) == rows

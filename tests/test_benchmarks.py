"""The benchmarks run; what they measure is not looked at."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_a_step_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    options = "--family gfl --teacher r18 --size 64 --classes 2 --repeats 1 --precision fp32"
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["step.py", *options.split()])
    runpy.run_path(str(BENCHMARKS / "step.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("distillation step / (student step + teacher forward) = ") == 2
    assert "CrossKD" in printed

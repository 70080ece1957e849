"""The benchmarks that print tables run; what they measure is not looked at."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(script: str, *options: str) -> list[str]:
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_the_shares_of_a_step(printed) -> None:
    options = "--families atss reppoints --size 64 --classes 2 --repeats 2".split()
    rows = [line.split() for line in printed("assignment.py", *options) if "_r18" in line]
    assert [cells[1] for cells in rows] == ["atss_r18", "reppoints_r18"]
    for cells in rows:
        assignment, losses, both = map(float, cells[-6:-1:2])
        assert 0 < assignment < both < 100 and 0 < losses < both


@pytest.mark.slow
def test_the_table_of_detectors(printed) -> None:
    options = "--families cascade_rcnn reppoints --backbones r18 --classes 2 --repeats 1".split()
    lines = printed("detectors.py", *options)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "`" in line]
    table = {cells[0]: cells[1:] for cells in rows}
    assert table["`crosskd`"] == ["-", "one-stage"]
    assert table["`tf_head`"] == ["needs none", "needs none"]
    wide, narrow = table["`reppoints_r18`"], table["`reppoints_r18`, narrow"]
    assert all(float(large) > float(small) > 0 for large, small in zip(wide, narrow, strict=True))


def test_the_minutes_of_the_small_recipes(printed) -> None:
    lines = printed("small.py", "--recipes", "small/tf_head_two_stage", "--steps", "1")
    [row] = [line for line in lines if "`small/tf_head_two_stage`" in line]
    runs = [run.split() for run in row.split("|")[2].split(",")]
    assert [name for name, _ in runs] == ["student", "assistants", "tf_head"]
    assert all(float(time) > 0 for _, time in runs)

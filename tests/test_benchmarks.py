"""The benchmarks run; what they measure is not looked at."""

from __future__ import annotations

import json
import runpy
import sys
import tarfile
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


def test_the_evaluation_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", "evaluator.py --images 3 --detections 5 --repeats 2".split())
    runpy.run_path(str(BENCHMARKS / "evaluator.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("3 images x 5 detections: ")
    assert " s (median of 2) on " in printed


def test_a_slice_ends_in_time_and_packs_what_is_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    study = runpy.run_path(str(BENCHMARKS / "slice.py"))
    forever = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert study["run_for"](0.5, forever) == study["AGAIN"]
    assert study["run_for"](60, [sys.executable, "-c", "raise SystemExit(2)"]) == 2
    monkeypatch.chdir(tmp_path)
    for name, done in (("runs/one", True), ("runs/two", False)):
        run = Path("study", name)
        run.mkdir(parents=True)
        for file in ("last.ckpt", "model.safetensors", "model.json", "best.safetensors"):
            (run / file).touch()
        status = {"done": done, "best_ap": 0.1, "seconds": 1.0, "steps": 1}
        (run / "run.json").write_text(json.dumps(status))
    study["pack"](Path("study"), Path("study.tgz"))
    with tarfile.open("study.tgz") as archive:
        files = {name for name in archive.getnames() if Path(name).suffix}
    kept = {"model.safetensors", "model.json", "run.json"}
    assert files == {f"study/runs/one/{name}" for name in kept} | {
        f"study/runs/two/{name}" for name in kept | {"last.ckpt"}
    }

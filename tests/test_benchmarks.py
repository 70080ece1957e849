"""The benchmarks run; what they measure is not looked at."""

from __future__ import annotations

import importlib
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


@pytest.fixture
def slices(monkeypatch, tmp_path):
    """The module `slice`, in an empty folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("slice")


def test_a_slice_ends_in_time(slices):
    forever = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert slices.run_for(0.5, forever) == slices.AGAIN
    assert slices.run_for(60, [sys.executable, "-c", "raise SystemExit(2)"]) == 2


def leave_a_run(folder, done, methods):
    folder.mkdir(parents=True)
    for file in ("last.ckpt", "model.safetensors", "model.json", "best.safetensors"):
        (folder / file).touch()
    status = {"done": done, "best_ap": 0.1, "seconds": 1.0, "steps": 1}
    (folder / "run.json").write_text(json.dumps(status))
    (folder / "recipe.yaml").write_text(json.dumps({"methods": methods}))


def test_a_slice_packs_what_is_needed(slices):
    runs = Path("study", "runs")
    leave_a_run(runs / "done", True, {"tf_head": {}})
    leave_a_run(runs / "assisted", True, {"pkd": {}, "head": {"ckd": False}})
    leave_a_run(runs / "begun", False, {})
    slices.pack(Path("study"), Path("study.tgz"))
    with tarfile.open("study.tgz") as archive:
        files = {name for name in archive.getnames() if Path(name).suffix}
    kept = {"model.safetensors", "model.json", "run.json", "recipe.yaml"}
    whole = {str(runs / run / name) for run in ("done", "assisted", "begun") for name in kept}
    assert files == whole | {str(runs / run / "last.ckpt") for run in ("assisted", "begun")}


@pytest.mark.parametrize("out", [["--out", "runs/x"], ["--out=runs/x"]])
def test_the_next_slice_goes_on_in_a_fresh_folder(slices, monkeypatch, tmp_path, out):
    """The study is a stub that needs two slices."""
    commands, log = [], Path("runs/x/study.log")

    def one_slice(seconds, command):
        assert seconds == 540
        commands.append(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = log.exists()
        with log.open("a") as file:
            file.write("slice\n")
        return 0 if begun else slices.AGAIN

    monkeypatch.setattr(slices, "run_for", one_slice)
    given = ["--recipe", "small/head", *out, "--jobs", "2"]
    line = ["slice.py", "--minutes", "9", "--archive", str(tmp_path / "x.tgz"), "--", *given]
    monkeypatch.setattr(sys, "argv", line)
    codes = []
    for machine in ("one", "two"):
        (tmp_path / machine).mkdir()
        monkeypatch.chdir(tmp_path / machine)
        codes.append(slices.main())
    assert codes == [75, 0]
    assert [command[1:] for command in commands] == [
        ["-m", "detdistill.cli", "compare", *given]
    ] * 2
    assert log.read_text() == "slice\n" * 2
    with tarfile.open(tmp_path / "x.tgz") as archive:
        assert archive.extractfile(str(log)).read() == b"slice\n" * 2


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--jobs", "2"], "no folder was given: add --out FOLDER"),
        (["--jobs", "2", "--out"], "no folder was given: add --out FOLDER"),
        (["--out", "/runs/x"], "--out /runs/x: expected a folder below this one"),
        (["--out=../x"], "--out ../x: expected a folder below this one"),
        (["--out="], "--out .: expected a folder below this one"),
    ],
)
def test_a_slice_needs_a_folder_below(slices, monkeypatch, given, sentence):
    line = ["slice.py", "--minutes", "9", "--archive", "x.tgz", "--", *given]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as caught:
        slices.main()
    assert str(caught.value).startswith(sentence)
    assert not list(Path().iterdir())

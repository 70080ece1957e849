"""Curves beside `metrics.jsonl`: TensorBoard's own reader finds them; services see the calls."""

import json
import sys
from types import SimpleNamespace

import pytest

from detdistill.engine.trackers import curves, require_trackers
from detdistill.engine.train import train
from detdistill.errors import UserError
from detdistill.recipe import Recipe


def logged(out, kind):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_tensorboard_shows_what_the_metrics_say(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = recipe(trackers=["tensorboard"], max_steps=3, log_every=1)
    train(settings, tmp_path / "run")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    steps = logged(tmp_path / "run", "step")
    shown = found.Scalars("weighted/task/cls")
    assert [event.step for event in shown] == [line["step"] for line in steps] == [1, 2, 3]
    assert [event.value for event in shown] == pytest.approx(
        [line["weighted"]["task/cls"] for line in steps]
    )
    [last] = found.Scalars("val/AP")
    assert last.value == pytest.approx(logged(tmp_path / "run", "eval")[-1]["metrics"]["AP"])


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_service_is_told_all(package, recipe, tmp_path, monkeypatch):
    told, ended = [], []

    def init(**given):
        assert given["project"] == "detdistill" and given["resume"] == "allow"
        assert given["name"].endswith("/run") and given["config"]["student"] == "gfl_r18"
        assert ("id" in given) is (package == "wandb")
        return SimpleNamespace(
            log=lambda numbers, step: told.append((step, numbers)),
            finish=lambda: ended.append(True),
        )

    monkeypatch.setitem(sys.modules, package, SimpleNamespace(init=init, __spec__=object()))
    settings = recipe(trackers=[package], max_steps=2, log_every=1)
    train(settings, tmp_path / "run")
    assert [step for step, numbers in told if "loss" in numbers] == [1, 2]
    assert any("val/AP" in numbers for _, numbers in told) and ended == [True]


def test_a_service_that_does_not_start_is_told(recipe, tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    settings = recipe(trackers=["wandb"], max_steps=1)
    with pytest.raises(UserError, match=r"wandb cannot start: api_key not configured \(no-tty\);"):
        train(settings, tmp_path / "run")


def test_a_missing_package_is_told_before_anything_is_written(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("detdistill.engine.trackers.find_spec", lambda name: None)
    settings = recipe(trackers=["tensorboard"])
    with pytest.raises(UserError, match=r"pip install 'detdistill\[tensorboard\]'"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_names_of_curves():
    step = {"lr": 0.1, "loss": 2.0, "raw": {"task/cls": 1.0}, "weighted": {"task/cls": 2.0}}
    names = ["lr", "loss", "raw/task/cls", "weighted/task/cls"]
    assert list(curves("step", step)) == names
    assert curves("eval", {"metrics": {"AP": 0.5, "APl": -1.0}}) == {"val/AP": 0.5}
    assert curves("teacher", {"metrics": {"AP": 0.5}}) == {}
    require_trackers(Recipe())

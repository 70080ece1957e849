"""What a run tells: its metrics file, its display, its warnings."""

import io
import json
import re
import sys

import pytest

from detdistill import progress
from detdistill.engine.log import MetricsFile, RunDisplay, TermWindow


def test_a_distillation_term_that_stays_zero_warns_once(tmp_path):
    window = TermWindow(tmp_path)
    warnings = []
    for step in range(120):
        raw = {"task/box": 0.0, "crosskd/cls": 0.0, "crosskd/box": 0.1}
        window.add(raw, raw, step, [1])
        window.add(raw, raw, step, [2])  # micro batches of one step count once
        warnings += window.end_step()
        assert len(warnings) == (step >= 49)
    [warning] = warnings
    assert warning.startswith("crosskd/cls was exactly 0 for 50 steps")


def test_a_distillation_term_that_stays_far_above_the_task_warns_once(tmp_path):
    window = TermWindow(tmp_path)
    warnings = []
    for step in range(180):
        raw = {"task/cls": 1.0, "task/box": 0.5, "tf_head/ckd_rcnn": 1000.0, "head/akd_1": 149.0}
        weighted = {**raw, "tf_head/ckd_rcnn": 151.0 if step != 40 else 1.0}
        window.add(raw, weighted, step, [1])
        window.add(raw, weighted, step, [2])
        warnings += window.end_step()
        assert len(warnings) == (step >= 90)
    [warning] = warnings
    assert warning.startswith("tf_head/ckd_rcnn has been over 100 times the task's losses for 50")
    assert "(302 beside 3)" in warning and "lower its weight" in warning


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch, width):
    for name, value in {"COLUMNS": str(width), "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", Terminal())


def shown():
    """The lines of the last state of the bar, and those before."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue()).splitlines()


RAW = {"task/cls": 0.512, "task/box": 0.345, "task/dfl": 0.421, "crosskd/cls": 0.123}
RAW |= {"crosskd/box": 0.034, "crosskd/quality": 0.2}
WEIGHTS = {"task/box": 2, "task/dfl": 0.25, "crosskd/box": 4}
TERMS = ["task/cls 0.512", "task/box 0.345 (0.690)", "task/dfl 0.421 (0.105)"]
TERMS += ["crosskd/cls 0.123", "crosskd/box 0.034 (0.136)", "crosskd/quality 0.200"]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("count", [3, 6])
def test_times_and_terms_are_whole_on_a_narrow_terminal(monkeypatch, width, count):
    on_a_terminal(monkeypatch, width)
    display = RunDisplay("runs/distilled", 1600, 0, quiet=False)
    display.open()
    raw = dict(list(RAW.items())[:count])
    display.step(800, raw, {name: WEIGHTS.get(name, 1) * raw[name] for name in raw}, 45.6)
    display.close()
    lines = shown()
    last = max(i for i, line in enumerate(lines) if "800/1600" in line)
    times = r"800/1600 +\d:\d\d:\d\d +(\d:\d\d:\d\d|-:--:--) +45\.6 img/s"
    assert re.search(times, lines[last])
    below = lines[last + 1 :]
    assert len(below) <= 2 and all(len(line.rstrip()) < width for line in below)
    assert all(any(term in line for line in below) for term in TERMS[:count])


def test_plain_lines_tell_raw_and_weighted_terms(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    display = RunDisplay("runs/distilled", 10, 0, quiet=False)
    display.step(10, {"task/cls": 0.5, "task/box": 0.5}, {"task/cls": 0.5, "task/box": 1}, 4.0)
    [line] = shown()
    assert line.endswith("4.0 img/s, task/cls 0.500 task/box 0.500 (1.000)")


@pytest.mark.parametrize("width", [None, 100])
def test_words_of_the_user_are_no_markup(monkeypatch, width):
    if width:
        on_a_terminal(monkeypatch, width)
    else:
        monkeypatch.setattr("sys.stderr", io.StringIO())
    display = RunDisplay("runs/[exp]", 10, 0, quiet=False)
    display.open()
    display.say("/data/[old]/a.txt: box [nan, 1] of ':smile:' '[/b]'")
    display.step(10, {"task/cls": 0.5}, {"task/cls": 0.5}, 4.0)
    display.close()
    text = "\n".join(shown())
    assert "runs/[exp]: /data/[old]/a.txt: box [nan, 1] of ':smile:' '[/b]'" in text
    assert text.count("runs/[exp]") >= 2


def test_an_evaluation_is_counted_beside_the_steps(monkeypatch):
    on_a_terminal(monkeypatch, 100)
    display = RunDisplay("runs/distilled", 1600, 0, quiet=False)
    display.open()
    with display.counting("val images", 30) as advance:
        advance(10)
        display._bar.refresh()
    display.close()
    assert any(re.search(r"val images .* 10/30 ", line) for line in shown())


def test_further_processes_count_in_silence(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    for quiet in (False, True):
        display = RunDisplay("runs/distilled", 1600, 0, quiet=quiet)
        with display.counting("val images", 30) as advance:
            advance(10)
        assert ("runs/distilled: val images: 10/30" in sys.stderr.getvalue()) is not quiet
        sys.stderr.truncate(0)


def test_window_means(tmp_path):
    window = TermWindow(tmp_path)
    window.add({"a": 1.0}, {"a": 2.0}, 0, [])
    window.add({"a": 3.0}, {"a": 6.0}, 1, [])
    assert window.take() == ({"a": 2.0}, {"a": 4.0})


def test_metrics_written_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[]\n\xff\x00\n{"step": 2}\n{"step": 3}\n{"step"')
    MetricsFile(path, 2).write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]

"""What a run tells: its metrics file, its display, its warnings."""

import io
import json
import re
import sys

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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_times_stay_readable_on_a_narrow_terminal(monkeypatch):
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", Terminal())
    display = RunDisplay("runs/distilled", 1600, 0, quiet=False)
    display.open()
    terms = {f"crosskd/{name}": 0.5 for name in ("cls", "box", "quality", "other", "more")}
    display.step(800, terms, 45.6)
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue()).splitlines()
    last = next(line for line in reversed(shown) if "800/1600" in line)
    assert re.search(r"800/1600 +\d:\d\d:\d\d +(\d:\d\d:\d\d|-:--:--) +45\.6 img/s", last)


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

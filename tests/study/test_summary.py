"""What numbers say: paired gains, verdicts that do not overstate, warnings."""

import json
import math
from dataclasses import replace

import pytest

from detdistill.study.runs import comparable_times, read_log
from detdistill.study.summary import (
    Arm,
    gap_closed,
    is_clear,
    late_gain,
    paired_gains,
    verdict,
    verdicts,
    warnings,
)
from detdistill.study.table import (
    format_time,
    markdown_table,
    plain_table,
    print_table,
    size_rows,
    table_header,
    table_notes,
    table_rows,
)
from tests.study.fabricated_study import score


def arms(control=(35.0, 34.5, 36.0), taught=(38.0, 37.6, 39.4), teacher=40.1, same=(35.5, 35, 36)):
    return [
        Arm("teacher", "teacher", (score(0, teacher, seconds=None, epochs=None),), 20.0),
        Arm("student", "control", tuple(score(k, ap) for k, ap in enumerate(control)), 8.0),
        Arm(
            "crosskd",
            "method",
            tuple(score(k, ap, seconds=150.0) for k, ap in enumerate(taught)),
            8.0,
        ),
        Arm(
            "student_same_time",
            "same_time",
            tuple(score(k, ap, epochs=12) for k, ap in enumerate(same)),
            8.0,
        ),
    ]


def test_gains_are_paired_by_seed_not_by_place():
    control = Arm("student", "control", (score(0, 30.0), score(5, 40.0)))
    taught = Arm("crosskd", "method", (score(5, 41.0), score(0, 33.0)))
    assert paired_gains(taught, control) == pytest.approx([1.0, 3.0])


def test_share_of_the_gap():
    teacher, control, taught, _ = arms((30.0,), (35.0,), 40.0, (30.0,))
    assert gap_closed(taught, control, teacher) == pytest.approx(0.5)
    assert gap_closed(taught, teacher, control) is None


@pytest.mark.parametrize(
    ("gains", "start", "low", "high"),
    [
        (
            [2.7, 3.2, 3.4],
            "CrossKD helps: +3.1 AP ({}; seeds +2.7 to +3.4, all positive).",
            2.2,
            4.0,
        ),
        (
            [-2.7, -3.2, -3.4],
            "CrossKD hurts: -3.1 AP ({}; seeds -3.4 to -2.7, all negative).",
            -4.0,
            -2.2,
        ),
        (
            [2.0, -0.5, 1.0],
            "CrossKD: no clear gain, the seeds disagree (+0.8 AP, {}; seeds -0.5 to +2.0).",
            -2.3,
            4.0,
        ),
        (
            [2.0, 0.0],
            "CrossKD: no clear gain, some seeds show none (+1.0 AP, {}; seeds +0.0 to +2.0).",
            -11.7,
            13.7,
        ),
        (
            [2.0, -0.01],
            "CrossKD: no clear gain, some seeds show none (+1.0 AP, {}; seeds +0.0 to +2.0).",
            -11.8,
            13.8,
        ),
        ([-0.02, 0.01], "CrossKD: no gain (+0.0 AP, {}; seeds +0.0 to +0.0).", -0.2, 0.2),
        ([0.04, 0.04], "CrossKD: no gain (+0.0 AP, {}; seeds +0.0 to +0.0).", 0.0, 0.0),
        (
            [0.1, 4.0, 0.2],
            "CrossKD: no clear gain. +1.4 AP ({}; seeds +0.1 to +4.0, all positive), but",
            -4.1,
            7.0,
        ),
        ([3.1], "CrossKD: +3.1 AP with one seed, which says nothing about the spread", None, None),
    ],
)
def test_verdict_says_no_more_than_the_seeds(gains, start, low, high):
    # By hand: mean +- t * deviation / root of the number, t = 12.71 for two seeds, 4.30 for three.
    interval = low is not None and f"95 % interval {low:+.1f} to {high:+.1f}"
    assert verdict("CrossKD", gains).startswith(start.format(interval))


@pytest.mark.parametrize("sign", [1, -1])
def test_clear_is_a_two_sided_t_test(sign):
    # Two gains 1 +- d: t = 1 / d, and the limit for one degree of freedom is 12.71.
    assert is_clear([sign * (1 + 1 / 12.8), sign * (1 - 1 / 12.8)])
    assert not is_clear([sign * (1 + 1 / 12.6), sign * (1 - 1 / 12.6)])
    assert is_clear([sign * 2.0] * 3)
    assert not is_clear([sign * 2.0])


def test_verdicts_name_the_gap_and_the_same_time_control():
    first, second = verdicts(arms())
    assert first.startswith("CrossKD helps: +3.2 AP")
    assert first.endswith("It closes 64% of the 4.9 AP between student and teacher.")
    assert "given the same training time (1.5 x the epochs): +2.8 AP" in second
    assert second.endswith("(95 % interval +1.6 to +4.1; seeds +2.5 to +3.4).")


def test_a_gain_that_more_training_gives_too_is_said_so():
    [first, _] = verdicts(arms(same=(38.5, 38, 39.5)))
    assert first.startswith("CrossKD helps at equal steps, not at equal training time: +3.2 AP")


def test_a_quick_method_is_not_held_against_the_time_of_a_slow_one():
    rows = arms(same=(39.5, 39, 40.5))
    slow = tuple(replace(run, seconds=2 * run.seconds) for run in rows[2].runs)
    [quick, last] = verdicts([*rows[:3], Arm("head", "method", slow), rows[3]])
    assert quick.startswith("CrossKD helps: +3.2 AP")
    assert "given the time of a slower method (1.5 x the epochs; CrossKD itself took" in quick
    assert last.startswith("HEAD") and "given the same training time (1.5 x the epochs)" in last


def test_a_method_is_not_held_against_the_time_of_one_that_was_left_out():
    rows = arms(same=(39.5, 39, 40.5))
    longer = tuple(replace(run, epochs=24) for run in rows[3].runs)
    first, second = verdicts([*rows[:3], replace(rows[3], runs=longer)])
    assert first.startswith("CrossKD helps: +3.2 AP")
    assert "the time of a slower method (3 x the epochs; CrossKD itself took 1.5 x the" in second


def test_a_student_that_passes_its_teacher():
    assert "It reaches 41.0 AP, the teacher 40.1." in verdicts(arms(taught=(41, 41, 41)))[0]


def test_no_share_of_a_gap_that_is_none():
    assert "closes" not in " ".join(verdicts(arms(teacher=20.0)))
    assert "—" in plain_table(arms(teacher=20.0)).splitlines()[3]


def test_a_gain_that_rounds_to_none_has_one_sign_everywhere():
    rows = arms(taught=(34.98, 34.49, 35.99))
    assert "CrossKD: no gain (+0.0 AP" in verdicts(rows)[0]
    assert "+0.0 (+0.0 … +0.0)" in plain_table(rows)


def test_without_a_teacher_nothing_is_said_of_one():
    rows = arms()[1:]
    first, second = verdicts(rows)
    interval = "95 % interval +2.6 to +3.7"
    assert first == f"CrossKD helps: +3.2 AP ({interval}; seeds +3.0 to +3.4, all positive)."
    assert second.startswith("Against the student alone given the same training time")
    assert warnings(rows) == []
    shown = [plain_table(rows), table_notes(rows), markdown_table(rows)]
    assert not any("gap closed" in text.lower() or "teacher" in text for text in shown)
    assert len(set(map(len, [table_header(rows), *table_rows(rows)]))) == 1
    assert "Gap closed" in table_notes(arms())


def write_log(folder, aps, total=100):
    lines = [
        {"kind": "eval", "step": (k + 1) * total // len(aps), "metrics": {"AP": ap}}
        for k, ap in enumerate(aps)
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_late_gain_is_that_of_the_last_quarter(tmp_path):
    run = score(0, 30.0, write_log(tmp_path / "run", [0.1, 0.2, 0.28, 0.3]))
    assert late_gain(run) == pytest.approx(2.0)
    assert late_gain(score(0, 30.0, write_log(tmp_path / "short", [0.3]))) is None
    assert late_gain(score(0, 30.0, tmp_path / "absent")) is None
    half = write_log(tmp_path / "half", [0.2, 0.28])  # says nothing of the last quarter
    assert late_gain(score(0, 30.0, half)) is None


def test_warnings(tmp_path):
    assert warnings(arms()) == []
    assert "no better than the student alone" in warnings(arms(teacher=30.0))[0]
    rows = arms()
    folder = write_log(tmp_path / "run", [0.1, 0.2, 0.28, 0.3])
    rows[1] = Arm("student", "control", (score(0, 35.0, folder),))
    [text] = warnings(rows)
    assert "still gained 2.0 AP on val" in text


def test_a_gain_within_the_noise_of_the_test_images():
    rows = arms()
    sure, unsure = score(0, 38.0, gain_interval=(0.01, 0.05)), (-0.004, 0.03)
    runs = (sure, score(1, 37.6, gain_interval=unsure), score(2, 39.4, gain_interval=(0.0, 0.02)))
    rows[2] = Arm("crosskd", "method", runs)
    [text] = warnings(rows)
    assert "CrossKD could gain -0.4 to +3.0 AP with seed 1" in text
    rows[2] = Arm("crosskd", "method", (sure,))
    assert warnings(rows) == []


def test_table_texts():
    header, teacher, control, taught, same = plain_table(arms()).splitlines()
    assert header.split() == (
        "AP AP50 AP75 ΔAP (paired) gap closed parameters ms/image training".split()
    )
    assert teacher.split() == ["teacher", *["40.1"] * 3, "—", "—", "1.24", "M", "20.0", "—"]
    assert "35.2 ±0.8" in control and "1 min 40 s" in control
    assert "+3.2 (+3.0 … +3.4)" in taught and "64%" in taught
    assert same.startswith("student, same time")
    assert len({len(line) for line in (teacher, control, taught, same)}) <= 2
    rows = markdown_table(arms()).splitlines()
    assert len(rows) == 6 and len({row.count("|") for row in rows}) == 1


def test_printed_without_a_terminal_it_is_plain(capsys):
    print_table(arms(), ["A sentence."], ["A caveat."])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert text.startswith(plain_table(arms()))
    assert "A sentence." in text and "Warning: A caveat." in text


def test_times_that_can_be_compared():
    busy = [score(seed, 30.0, seconds=300.0) for seed in (0, 1)]
    quiet = [score(seed, 30.0, seconds=100.0 + 20 * seed) for seed in (0, 1)]
    assert comparable_times(busy, quiet) == ("time", [300, 110])
    known = [replace(run, processor_seconds=90.0) for run in busy]
    assert comparable_times(known, quiet) == ("time", [300, 110])
    alike = [replace(run, processor_seconds=run.seconds) for run in quiet]
    assert comparable_times(known, alike) == ("processor time", [90, 110])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(41.6, "42 s"), (59.7, "1 min 00 s"), (750, "12 min 30 s"), (11100, "3 h 05 min")],
)
def test_format_time(seconds, text):
    assert format_time(seconds) == text


def test_read_log_survives_a_kill(tmp_path):
    folder = write_log(tmp_path / "run", [0.05, 0.1, 0.2])
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "eval", "step": 66, "metrics": {"AP": 0.15}}) + "\n")
        log.write('{"kind": "eval", "step": 120, "met')
    assert [(e["step"], e["metrics"]["AP"]) for e in read_log(folder, "eval")] == [
        (33, 0.05),
        (66, 0.15),
        (100, 0.2),
    ]
    assert math.isclose(late_gain(score(0, 1.0, folder)), 5.0)


def test_undefined_numbers_are_dashes():
    rows = arms()
    numbers = {**rows[0].runs[0].numbers, "APl": -1.0}
    rows[0] = Arm("teacher", "teacher", (replace(rows[0].runs[0], numbers=numbers),))
    assert size_rows(rows)[0] == ["teacher", "40.1", "40.1", "—"]
    assert size_rows(rows)[1] == ["student", *["35.2 ±0.8"] * 3]

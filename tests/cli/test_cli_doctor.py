"""`doctor` as a user gives it, on images of 64 pixels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from detdistill.cli import doctor
from detdistill.doctor.finding import Finding, Section
from tests.cli.conftest import Run
from tests.cli.test_cli_runs import save_foreign

SMALL = [
    *("--set", "resize_short=[64]", "--set", "resize_long=64", "--set", "batch_size=2"),
    *("--set", "workers=0", "--set", "epochs=100", "--set", "warmup_steps=10"),
    *("--set", "student_options={base_channels: 8, fpn_channels: 16, tower_channels: 16}"),
]
PAIR = ["doctor", "--student", "gfl_r18", "--data", "my_coco", *SMALL]
LINE = re.compile(r"  (ok|note|warning|problem) +\S")


@pytest.fixture
def good_coco(my_coco: Path) -> Path:
    """The tiny set with but one class, of which there are boxes enough."""
    for path in (my_coco / "annotations").glob("*.json"):
        values = json.loads(path.read_text())
        values["categories"] = values["categories"][:1]
        for annotation in values["annotations"]:
            annotation["category_id"] = values["categories"][0]["id"]
        path.write_text(json.dumps(values))
    return my_coco


def test_alone_it_checks_the_installation(run: Run) -> None:
    code, out, err = run("doctor")
    assert code == 0 and err == ""
    assert "Installation" in out and "torch" in out and "Data" not in out
    assert out.splitlines()[-1] == "Next: detdistill doctor --student gfl_r18 --data FOLDER"
    assert "\x1b" not in out


def test_a_broken_installation_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Section("installation", "Installation", [Finding("problem", "torch", "reinstall")])
    monkeypatch.setattr("detdistill.doctor.installation.check_installation", lambda: broken)
    code, out, _ = run(*PAIR, "--json", "report.json")
    assert code == 1
    assert "  problem  torch\n           -> reinstall\n" in out
    assert "Data" not in out and "Next: repair the installation" in out
    assert json.loads(Path("report.json").read_text())["result"] == "problem"


def test_a_whole_examination(run: Run, my_coco: Path) -> None:
    """An untrained teacher finds nothing, which is a problem; all else is told as well."""
    save_foreign(Path("teacher.safetensors"))
    before = sorted(Path().rglob("*"))
    command = [*PAIR, "--teacher", "teacher.safetensors", "--images", "3"]
    code, out, err = run(*command, "--json", "report.json")
    assert code == 1, err
    assert set(Path().rglob("*")) - set(before) == {Path("report.json")}
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert titles[:6] == [
        *("Installation", "Data", "Objects as the student sees them", "Teacher", "Methods"),
        "Recipe",
    ]
    assert "finds next to nothing" in out and "val (3 of 4 images)" in out
    assert "  note     does not fit: head is for heads of different kinds" in out
    assert "  ok       crosskd fits; it adds 2 x 1x1 convolution" in out
    assert re.search(r"crosskd/cls +\S+ +\S+ +\S+ +\S+ +\S+\n", out)
    again = out.splitlines()[-1]
    assert again.startswith("Next: correct what is marked as a problem, then again: detdistill ")
    report = json.loads(Path("report.json").read_text())
    assert report["result"] == "problem"
    assert report["sections"]["data"]["numbers"]["splits"]["train"]["images"] == 8
    assert report["sections"]["teacher"]["numbers"]["images"] == 3
    steps = report["sections"]["step"]["numbers"]
    assert steps["crosskd"]["seconds"] > 0
    assert "crosskd/cls" in steps["crosskd"]["batches"][0]["terms"]


def test_every_finding_stands_on_its_line_with_what_to_do(run: Run, my_coco: Path) -> None:
    code, out, _ = run(*PAIR, "--method", "tf_head", "--set", "warmup_steps=1000")
    lines = out.splitlines()
    marked = [i for i, line in enumerate(lines) if LINE.match(line)]
    assert len(marked) > 8
    for i in marked:
        if lines[i].startswith(("  warning", "  problem")):
            following = next(line for line in lines[i + 1 :] if line.strip())
            assert following.startswith("           -> "), lines[i]
    assert code == 1 and "is never reached" in out


def test_without_a_teacher_one_is_to_be_trained(run: Run, good_coco: Path) -> None:
    code, out, err = run(*PAIR, "--images", "2")
    assert code == 0, out + err
    assert "no teacher was given" in out and "tf_head fits" in out
    assert out.splitlines()[-1].startswith(
        "Next: detdistill train --detector gfl_r50 --data my_coco --set 'resize_short=[64]'"
    )
    assert "student_options" not in out.splitlines()[-1]


def test_a_method_that_needs_no_teacher(run: Run, good_coco: Path) -> None:
    quick = ["--method", "tf_head", "--set", "methods.tf_head.warmup=10", "--images", "2"]
    code, out, err = run(*PAIR, *quick)
    assert code == 0, out + err
    assert "Next: detdistill distill --student gfl_r18 --method tf_head --data my_coco" in out


def test_a_teacher_that_is_only_named_and_not_needed(run: Run, good_coco: Path) -> None:
    """`distill` takes its form for the assistant, without training it."""
    options = "teacher_options={base_channels: 8, roi_channels: 16}"
    alone = ["--set", "methods.head={akd: false, ckd: false}", "--set", options, "--images", "2"]
    named = ["--teacher", "faster_rcnn_r18", "--method", "head", *alone]
    code, out, err = run(*PAIR, *named)
    assert code == 0, out + err
    assert "faster_rcnn_r18 is a detector's name: no method that is tried learns from it" in out
    assert "detdistill train" not in out
    assert out.splitlines()[-1].startswith(
        "Next: detdistill distill --teacher faster_rcnn_r18 --student gfl_r18 --method head"
    )


def test_a_method_that_was_asked_for_and_does_not_fit(run: Run, my_coco: Path) -> None:
    code, out, _ = run(*PAIR, "--method", "crosskd", "--images", "2")
    assert code == 1
    assert "  problem  does not fit: crosskd needs a teacher" in out
    assert "-> train a teacher: detdistill train --detector gfl_r50 --data my_coco" in out


def test_a_teacher_that_is_only_named_is_compared(run: Run, good_coco: Path) -> None:
    """As the bundled recipes name theirs; a teacher of few channels by its options."""
    options = "teacher_options={base_channels: 8, fpn_channels: 32, tower_channels: 16}"
    named = ["--teacher", "gfl_r18", "--set", options, "--method", "crosskd+pkd", "--images", "2"]
    code, out, err = run(*PAIR, *named)
    assert code == 0, out + err
    assert "yet to be trained" in out and "AP on" not in out
    assert "gradient of crosskd" in out and "gradient of pkd" in out
    assert out.splitlines()[-1].startswith(
        "Next: detdistill compare --teacher gfl_r18 --student gfl_r18 --methods crosskd+pkd"
    )


def test_a_good_teacher_is_distilled(
    run: Run, good_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detdistill.doctor import run as examination
    from detdistill.evaluation.coco import NUMBERS, CocoMetrics

    good = CocoMetrics(dict.fromkeys(NUMBERS, 0.5), {})
    monkeypatch.setattr(examination, "measure_ap", lambda teacher, val, *rest: (good, val))
    save_foreign(Path("teacher.safetensors"), num_classes=1)
    code, out, err = run(*PAIR, "--teacher", "teacher.safetensors", "--method", "pkd")
    assert code == 0, out + err
    assert "AP on val (4 of 4 images) is 50.0" in out
    assert out.splitlines()[-1].startswith(
        "Next: detdistill distill --teacher teacher.safetensors --student gfl_r18 --method pkd"
    )


def test_a_teacher_of_other_classes(run: Run, good_coco: Path) -> None:
    """Features can still be imitated: a problem unless that alone was asked for."""
    save_foreign(Path("teacher.safetensors"), num_classes=80)
    command = [*PAIR, "--teacher", "teacher.safetensors", "--images", "2"]
    code, out, _ = run(*command, "--method", "pkd")
    assert code == 0
    assert (
        "  warning  the teacher knows 80 classes, which its file does not name, the data have 1"
        in out
    )
    code, out, _ = run(*command, "--method", "crosskd")
    assert code == 1
    assert (
        "  problem  the teacher knows 80 classes, which its file does not name, the data have 1"
        in out
    )
    assert "  problem  does not fit: crosskd: the teacher" in out


def test_data_that_cannot_be_used_end_the_examination(run: Run, my_coco: Path) -> None:
    path = my_coco / "annotations" / "train.json"
    path.write_text(path.read_text()[:100])
    code, out, err = run(*PAIR)
    assert code == 1 and err == ""
    assert "  problem  my_coco/annotations/train.json: not JSON" in out
    assert "Teacher" not in out


def test_colours_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    doctor._show_finding(Finding("warning", "odd", "do", ("a  b",)))
    assert capsys.readouterr().out == ("  warning  odd\n           a  b\n           -> do\n")

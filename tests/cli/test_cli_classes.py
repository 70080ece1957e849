"""A teacher that knows more classes than the data, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pytest import fixture, warns

from detdistill import UserNotice, load_detector, save_detector
from detdistill.detectors import to_mmdetection_state
from tests.cli.conftest import Run
from tests.cli.test_cli_bad_input import refused
from tests.helpers import narrow

WHOLE = 12  # classes of the teacher: two before those of the data, which it has in reverse
SMALL = [
    *("--set", "max_steps=1", "--set", "resize_short=[64]", "--set", "resize_long=64"),
    *("--set", "batch_size=2", "--set", "workers=0", "--set", "epochs=1"),
    *("--set", "student_options={base_channels: 8, fpn_channels: 16, tower_channels: 16}"),
]
DISTILL = ["distill", "--student", "gfl_r18", "--method", "crosskd", "--out", "run"]
DISTILL += ["--data", "my_coco", *SMALL]


def categories(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "annotations/train.json").read_text())["categories"]


@fixture
def known(my_coco: Path) -> list[str]:
    """The classes of a teacher of other origin, which is written beside."""
    names = [category["name"] for category in categories(my_coco)]
    known = ["cow", "unicorn", *reversed(names)]
    teacher = narrow("gfl_r18", WHOLE)
    content = {"meta": {"CLASSES": tuple(known)}, "state_dict": to_mmdetection_state(teacher)}
    torch.save(content, "teacher.pth")
    return known


def test_it_is_cut_to_them(run: Run, my_coco: Path, known: list[str]) -> None:
    teacher = ["--teacher", "gfl_r18=teacher.pth"]
    code, out, err = run(*DISTILL, *teacher)
    assert code == 0, err
    assert "teacher gfl_r18, 10 of its 12 classes, val AP" in out + err
    assert load_detector("run").classes == known[:1:-1]

    code, out, err = run("doctor", *teacher, *DISTILL[1:5], "--data", "my_coco", *SMALL[2:])
    assert " M parameters, 10 of its 12 classes" in out
    assert "the data's 10 classes are among the teacher's; it is cut to them" in out

    weights = ["--weights", "teacher.pth", "--detector", "gfl_r18"]
    sizes = ["--set", "resize_short=[64]", "--set", "resize_long=64", "--set", "workers=0"]
    code, out, err = run("eval", *weights, "--data", "my_coco", *sizes)
    assert code == 0, err
    assert out.startswith("measured are 10 of the 12 classes that it knows\n")
    assert "Next: detdistill predict --weights teacher.pth --detector gfl_r18 IMAGES" in out

    pair = ["--teacher", "gfl_r18=teacher.pth", "--student", "run"]
    code, out, err = run("analyze", *pair, "--data", "my_coco", "--out", "pages")
    assert code == 0, err


def test_a_study_measures_it_on_them(run: Run, my_coco: Path, known: list[str]) -> None:
    arguments = ["--teacher", "gfl_r18=teacher.pth", "--student", "gfl_r18", "--seeds", "0"]
    arguments += ["--methods", "crosskd", "--data", "my_coco", "--out", "study"]
    name = categories(my_coco)[0]["name"]
    code, _, err = run("compare", *arguments, *SMALL, "--set", f"class_map.{name}=0")
    assert code == 0, err
    # The teacher is loaded for each run; what a label stands for is told once.
    assert err.count(f"class_map takes labels of gfl_r18: 0 is its 'cow', here {name}") == 1
    assert "AP" in json.loads(Path("study/teacher/test.json").read_text())["numbers"]


def test_a_study_knows_to_which_classes_it_was_cut(
    run: Run, my_coco: Path, known: list[str]
) -> None:
    model = load_detector("gfl_r18", "teacher.pth")
    save_detector(model, Path("teacher.safetensors"))
    arguments = ["--teacher", "teacher.safetensors", "--student", "gfl_r18", "--seeds", "0"]
    arguments += ["--methods", "crosskd", "--data", "my_coco", "--out", "study", *SMALL]
    code, _, err = run("compare", *arguments)
    assert code == 0, err
    facts = json.loads(Path("teacher.json").read_text())
    facts["classes"][2:4] = facts["classes"][3:1:-1]
    Path("teacher.json").write_text(json.dumps(facts))
    refused(run, ["compare", *arguments], "the teacher changed since this study began")


def test_names_that_differ_are_mapped(run: Run, my_coco: Path, known: list[str]) -> None:
    own = my_coco / "annotations"
    for split in ("train", "val", "test"):
        values = json.loads((own / f"{split}.json").read_text())
        values["categories"][0]["name"] = "moo"
        (own / f"{split}.json").write_text(json.dumps(values))
    arguments = [*DISTILL, "--teacher", "gfl_r18=teacher.pth"]
    refused(run, arguments, "crosskd: the teacher gfl_r18 knows no class 'moo' among its 12", "pkd")
    refused(run, [*arguments, "--set", "class_map.mo=cow"], "did you mean 'moo'?")
    refused(run, [*arguments, "--set", "class_map.moo=12"], "gfl_r18 has labels 0..11")
    refused(run, [*arguments, "--set", "class_map.moo=-1"], "class_map")
    measured = ["eval", "--weights", "teacher.pth", "--detector", "gfl_r18", "--data", "my_coco"]
    refused(run, measured, "knows no class 'moo' among its 12", "--set class_map.moo=NAME")
    study = ["compare", *arguments[1:3], "--methods", "pkd", *arguments[5:], "--seeds", "0"]
    refused(run, study, "a study measures its teacher, too", "--set class_map.moo=NAME")
    code, out, err = run(*arguments, "--set", "class_map.moo=cow")
    assert code == 0, err
    assert "10 of its 12 classes" in out + err
    # The map in the recipe of the run is the teacher's, not the student's.
    code, out, err = run("eval", "--weights", "run", "--recipe", "run/recipe.yaml")
    assert code == 0, err
    assert "measured are" not in out


def test_analyze_takes_the_map_of_the_students_run(run: Run, my_coco: Path) -> None:
    names = [category["name"] for category in categories(my_coco)]
    for name, known in (("teacher", ["moo", "cow", *names[1:]]), ("other", names)):
        model = narrow("gfl_r18", len(known), seed=len(known))
        model.classes = known
        save_detector(model, Path(f"{name}.safetensors"))
    mapped = ["--set", f"class_map.{names[0]}=cow"]
    assert run(*DISTILL, "--teacher", "teacher.safetensors", *mapped)[0] == 0
    pair = ["analyze", "--student", "run", "--data", "my_coco", "--images", "2", "--teacher"]

    code, _, err = run(*pair, "teacher.safetensors", "--out", "pages")
    assert code == 0, err
    assert "class_map is that of run/recipe.yaml" in err
    findings = json.loads(Path("pages/analysis.json").read_text())
    assert findings["conflict"] is not None
    # One that is given wins, and another teacher's classes are its own.
    wrong = ["--set", f"class_map.{names[0]}=cows", "--out", "never"]
    code, _, err = run(*pair, "teacher.safetensors", *wrong)
    assert code == 2 and "knows no class 'cows' among its 11" in err and "recipe.yaml" not in err
    code, _, err = run(*pair, "other.safetensors", "--out", "others")
    assert code == 0 and "class_map" not in err, err


def test_a_map_is_refused_before_a_teacher_is_trained(run: Run, my_coco: Path) -> None:
    arguments = ["compare", "--teacher", "gfl_r18", "--student", "gfl_r18", "--methods", "crosskd"]
    arguments += ["--data", "my_coco", "--out", "run", *SMALL, "--seeds", "0"]
    first = categories(my_coco)[0]["name"]
    refused(run, [*arguments, "--set", f"class_map.{first}=cow"], "knows no class 'cow'")


def test_names_that_occur_twice_are_told(run: Run, my_coco: Path, known: list[str]) -> None:
    content = torch.load("teacher.pth", weights_only=True)
    content["meta"]["CLASSES"] = ("cow", "cow", *known[2:])
    torch.save(content, "teacher.pth")
    code, _, err = run(*DISTILL, "--teacher", "gfl_r18=teacher.pth")
    assert code == 2 and "without names nothing tells which is which" in err
    with warns(UserNotice, match="names 'cow' more than once: the names are left out"):
        load_detector("gfl_r18", "teacher.pth")


def test_doctor_does_not_ask_for_a_teacher_that_it_was_given(run: Run, known: list[str]) -> None:
    given = ["--teacher", "gfl_r18=teacher.pth", *DISTILL[1:5], "--data", "my_coco", *SMALL[2:]]
    code, out, err = run("doctor", *given, "--images", "2", "--set", "class_map.disc=dics")
    assert code == 1, err
    assert "  problem  gfl_r18 knows no class 'dics' among its 12" in out
    assert "needs a teacher" not in out and "not tried: crosskd" in out


def test_a_round_trip_through_mmdetection_keeps_the_names(run: Run, my_coco: Path) -> None:
    model = narrow("gfl_r18", 2)
    model.classes = ["cat", "dog"]
    save_detector(model, Path("mine.safetensors"))
    assert run("convert", "--weights", "mine.safetensors", "--out", "theirs.pth")[0] == 0
    back = ["--detector", "gfl_r18", "--out", "again.safetensors"]
    assert run("convert", "--weights", "theirs.pth", *back)[0] == 0
    assert load_detector("again.safetensors").classes == ["cat", "dog"]

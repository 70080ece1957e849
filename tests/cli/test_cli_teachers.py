"""Teachers that are only named, and what to do with one that was just trained."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Run
from tests.cli.test_cli_runs import SMALL, TRAIN


@pytest.mark.parametrize(
    ("given", "width"),
    [([], 256), (["--teacher", "cascade_rcnn_r18"], 256), (["--set", "teacher=null"], 1024)],
)
def test_an_assistant_that_learns_alone_takes_the_form_of_a_teacher_that_is_only_named(
    given: list[str], width: int, run: Run, my_coco: Path
) -> None:
    """As in the study of the recipe; without one it is an R-CNN head as published."""
    distill = ["distill", "--recipe", "small/head", "--method", "assistant", *given]
    if given:  # the recipe's own options are then those of another
        given = ["--set", "teacher_options={base_channels: 8, roi_channels: 256}"]
    code, _, err = run(*distill, *given, "--data", "my_coco", "--out", "run", *SMALL)
    assert code == 0, err
    assert "teacher" not in err
    state = torch.load("run/last.ckpt", weights_only=False)["distiller"]
    layers = [key for key in state if re.fullmatch(r"methods\.head\..*\.shared\.0\.weight", key)]
    assert len(layers) == (3 if "cascade_rcnn_r18" in distill else 1)
    assert {len(state[layer]) for layer in layers} == {width}
    code, _, err = run(*distill, *given, "--data", "my_coco", "--out", "run", *SMALL, "--resume")
    assert code == 0, err


def test_a_teacher_that_the_recipe_only_names_is_to_be_trained(run: Run, my_coco: Path) -> None:
    akd = ["distill", "--recipe", "small/head", "--method", "akd", "--data", "my_coco"]
    options = ["--set", "lr=0.1", "--set", "teacher_options.base_channels=8", "--out", "run"]
    code, _, err = run(*akd, *options)
    assert code == 2
    assert err == (
        "detdistill: the recipe's teacher faster_rcnn_r18: a detector's name, but trained weights "
        "are needed; train it first, then give --teacher runs/teacher: detdistill train "
        "--detector faster_rcnn_r18 --recipe small/head --data my_coco --set lr=0.1 "
        "--set student_options.base_channels=8 --out runs/teacher\n"
    )
    for given in (["--teacher", "gfl_r50"], ["--set", "teacher=gfl_r50"]):
        code, _, err = run(*akd, *options, *given)
        assert code == 2
        assert f"detdistill: {' '.join(given)}: a detector's name" in err
        assert "--set teacher=" not in err.partition("detdistill train ")[2]
    Path("mine.yaml").write_text("student: gfl_r18\nteacher: runs/gone\nmethods: {pkd: {}}\n")
    code, _, err = run("distill", "--recipe", "mine.yaml", "--data", "my_coco", "--out", "run")
    assert code == 2
    assert "the recipe's teacher runs/gone: no such run folder" in err and "give --teacher" in err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--detector", "faster_rcnn_r18"], "--student gfl_r18 --method head --data my_coco"),
        (
            ["--recipe", "small/head", "--detector", "faster_rcnn_r18"],
            "teacher --method akd --recipe",
        ),
        (["--recipe", "small/head", "--detector", "gfl_r18"], "teacher --method crosskd --recipe"),
        (["--recipe", "bccd", "--detector", "gfl_r18"], "teacher --recipe bccd"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_comes_after_a_training_works_as_it_stands(
    given: list[str], told: str, run: Run, my_coco: Path
) -> None:
    narrow = ["--set", "student_options={base_channels: 8, fpn_channels: 32}"]
    code, out, err = run("train", *given, *TRAIN[3:], *narrow)
    assert code == 0, err
    following = out.splitlines()[-1]
    assert following.startswith("Next: detdistill distill --teacher teacher ") and told in following
    own = narrow if "--student" in following else []
    code, _, err = run(*shlex.split(following)[2:], *own)
    assert code == 0, err
    assert "faster_rcnn" not in given[-1] or "head/assistant_cls" in err


def test_the_map_of_another_teacher_is_left_out_after_a_training(run: Run, my_coco: Path) -> None:
    recipe = {"student": "gfl_r18", "class_map": {"disc": "frisbee"}, "methods": {"crosskd": {}}}
    Path("own.yaml").write_text(json.dumps(recipe))
    narrow = ["--set", "student_options={base_channels: 8, fpn_channels: 32}"]
    code, out, err = run("train", "--recipe", "own.yaml", *TRAIN[3:], *narrow)
    assert code == 0, err
    code, _, err = run(*shlex.split(out.splitlines()[-1])[2:], *narrow)
    assert code == 0, err

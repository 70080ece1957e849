"""Methods that cannot work with what they are given: one sentence before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detdistill import save_detector
from detdistill.distill.method import METHODS
from tests.cli.conftest import Run
from tests.cli.test_cli_bad_input import refused
from tests.detectors.test_torchvision_models import build
from tests.distill.test_every_method import METHOD_NAMES
from tests.helpers import narrow

CLASSES = 10  # of the built-in data
SMALL = [
    *("--set", "max_steps=1", "--set", "resize_short=[64]", "--set", "resize_long=64"),
    *("--set", "batch_size=2", "--set", "workers=0", "--set", "epochs=1"),
    *("--set", "student_options={base_channels: 8, fpn_channels: 16}"),
]
TEACHER = "teacher.safetensors"
GIVEN = ["--teacher", TEACHER, "--data", "my_coco", "--out", "run", *SMALL]


def save_teacher(name: str, num_classes: int = CLASSES) -> None:
    save_detector(narrow(name, num_classes), Path(TEACHER))


def distill(student: str, method: str, **options: object) -> list[str]:
    settings = [f"methods.{method}.{key}={value}" for key, value in options.items()]
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["distill", "--student", student, "--method", method, *GIVEN, *sets]


@pytest.mark.parametrize(
    ("student", "teacher", "method", "options", "fragments"),
    [
        # what the method needs of the pair
        ("gfl", "faster_rcnn", "crosskd", {}, ["dense teacher; faster_rcnn_r18 has no dense head"]),
        ("faster_rcnn", "gfl", "crosskd", {}, ["dense student; faster_rcnn_r18 has no dense head"]),
        ("gfl", "gfl", "crosskd_roi", {}, ["student with one RoI head", "gfl_r18"]),
        ("faster_rcnn", "cascade_rcnn", "crosskd_roi", {}, ["teacher with one RoI head"]),
        ("gfl", "faster_rcnn", "rm", {}, ["rm needs a dense teacher; faster_rcnn_r18"]),
        ("retinanet", "gfl", "rm", {}, ["anchor by anchor", "gfl_r18", "retinanet_r18"]),
        ("retinanet", "gfl", "mimic", {}, ["anchor by anchor", "crosskd"]),
        ("retinanet", "gfl", "soft_label", {}, ["anchor by anchor"]),
        ("retinanet", "retinanet", "ld", {}, ["distance distributions", "two GFLs", "crosskd"]),
        ("gfl", "atss", "ld", {}, ["not predicted by atss_r18 and gfl_r18"]),
        ("retinanet", "gfl", "pfi", {}, ["1 per location", "retinanet_r18 9"]),
        ("gfl", "gfl", "head", {}, ["both gfl", "'feature' with adapter 'per_level'"]),
        ("gfl", "retinanet", "mimic", {}, ["anchor by anchor", "anchors 'best'", "crosskd"]),
        ("gfl", "reppoints", "head", {"ckd_stop": "5"}, ["CKD is off", "set ckd to true"]),
        ("gfl", "atss", "crosskd", {"box_loss": "kl"}, ["atss_r18", "use box_loss 'giou'"]),
        ("gfl", "gfl", "crosskd", {"quality": "true"}, ["gfl_r18 has no quality branch"]),
        ("gfl", "retinanet", "feature", {"transfer_head": "true"}, ["needs equal heads"]),
        # strides
        ("retinanet", "faster_rcnn", "pkd", {}, ["[4, 8, 16, 32, 64]", "[8, 16, 32, 64, 128]"]),
        ("faster_rcnn", "gfl", "feature", {}, ["[8, 16, 32, 64, 128]", "same levels"]),
        # CKD without an anchor that a box came from
        (
            *("faster_rcnn", "cascade_rcnn", "head"),
            {"ckd": "true", "ckd_projector": "per_anchor"},
            ["which anchor", "have moved on since", "'single'"],
        ),
        ("faster_rcnn", "reppoints", "head", {"ckd": "true"}, ["class and box towers"]),
        # options
        ("gfl", "gfl", "crosskd", {"dept": 2}, ["no option 'dept'; did you mean 'depth'?"]),
        ("gfl", "gfl", "rm", {"warmpu": 2}, ["no option 'warmpu'; did you mean 'warmup'?"]),
        ("gfl", "gfl", "crosskd", {"depth": 9}, ["depth is 9", "choose 0 to 4"]),
        ("gfl", "gfl", "rm", {"score": "probs"}, ["score", "'prob' or 'logit'", "'probs'"]),
        ("gfl", "gfl", "ld", {"gamma": 1}, ["gamma", "less than 1", "found 1"]),
        ("gfl", "gfl", "g_detkd", {"contrast": "true"}, ["gfl_r18 has none", "leave contrast out"]),
        ("gfl", "gfl", "g_detkd", {"sgfi": "false"}, ["gfl_r18 has no RoI heads"]),
        ("gfl", "gfl", "pkd", {"levels": 9}, ["levels is 9", "choose 1 to 5"]),
        # weights and schedules
        ("gfl", "gfl", "crosskd", {"cls_weight": -1}, ["cls_weight is -1", "from 0 on"]),
        ("gfl", "gfl", "crosskd", {"cls_weight": ".nan"}, ["cls_weight is nan"]),
        ("gfl", "gfl", "crosskd", {"cls_weight": "much"}, ["cls_weight", "number", "'much'"]),
        ("gfl", "gfl", "pkd", {"weight": 0}, ["pkd: all its weights are 0"]),
        ("gfl", "gfl", "crosskd", {"warmup": -1}, ["warmup", "-1"]),
        ("gfl", "gfl", "crosskd", {"warmup": 2.5}, ["warmup", "integer", "2.5"]),
        ("gfl", "gfl", "crosskd", {"start": 9, "stop": 3}, ["'crosskd': stop is 3 and start 9"]),
    ],
    ids=str,
)
def test_a_pair_or_an_option_that_does_not_fit(
    student: str,
    teacher: str,
    method: str,
    options: dict[str, object],
    fragments: list[str],
    run: Run,
    my_coco: Path,
) -> None:
    save_teacher(f"{teacher}_r18")
    sentence = refused(run, distill(f"{student}_r18", method, **options), *fragments)
    assert method in sentence


def test_other_classes(run: Run, my_coco: Path) -> None:
    """Refused where scores are compared, and in a study; features alone may be imitated."""
    save_teacher("gfl_r18", 5)
    refused(run, distill("gfl_r18", "crosskd"), "gfl_r18 has 5 classes", "gfl_r18 10")
    study = ["compare", "--student", "gfl_r18", "--methods", "pkd", "--seeds", "0", *GIVEN]
    refused(run, study, "a study measures its teacher, too: gfl_r18 names none of its 5 classes")
    code, _, err = run(*distill("gfl_r18", "pkd"))
    assert code == 0, err
    assert "teacher gfl_r18 has other classes; its AP is not measured" in err


def test_a_view_whose_anchors_are_others(run: Run, my_coco: Path) -> None:
    torch.save(build("retinanet_v1", CLASSES).state_dict(), "teacher.pth")
    command = [*distill("retinanet_r18", "rm"), "--teacher", "retinanet_r18=teacher.pth"]
    refused(run, command, "anchor by anchor", "torchvision_retinanet_r18", "crosskd")


def test_a_method_that_cannot_act_in_time_is_told(run: Run, my_coco: Path) -> None:
    save_teacher("faster_rcnn_r18")
    code, _, err = run(*distill("retinanet_r18", "head"))
    assert code == 0, err
    told = "head acts from step 0, with full weights from 2000, but this run has 1 steps"
    assert f"warning: {told}; lower methods.head.warmup" in err
    stop = ["--set", "methods.head.warmup=9", "--set", "methods.head.stop=1", "--out", "stopped"]
    stop += ["--set", "methods.head.ckd_warmup=5"]
    code, _, err = run(*distill("retinanet_r18", "head"), *stop)
    assert code == 0, err
    assert "full weights from 9, but it stops at step 1; lower methods.head.warmup" in err
    told = "head's CKD acts from step 0, with full weights from 5, but it stops at step 1"
    assert f"{told}; lower methods.head.ckd_warmup" in err
    alone = ["--set", "methods.head={akd: false, ckd: false}", "--out", "alone"]
    code, _, err = run(*distill("retinanet_r18", "head"), *alone)
    assert code == 0, err
    assert "full weights" not in err


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_teacher_may_lack_exactly_where_nothing_needs_one(
    method: str, run: Run, my_coco: Path
) -> None:
    given = ["--data", "my_coco", "--out", "run", *SMALL]
    code, _, err = run("distill", "--student", "gfl_r18", "--method", method, *given)
    if METHODS.get(method).needs_teacher:
        assert code == 2 and not Path("run").exists()
        assert err.startswith("detdistill: no teacher was given: add --teacher RUN_OR_FILE")
    else:
        assert code == 0, err
        assert method == "tf_head"  # and head, where it distils nothing: see test_cli_teachers

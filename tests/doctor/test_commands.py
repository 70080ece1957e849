import pytest

from detdistill.detectors.registry import FAMILIES
from detdistill.doctor.commands import (
    Request,
    compare_command,
    distill_command,
    fitting_method,
    larger_detector,
    train_command,
)
from detdistill.doctor.pair import check_fit
from tests.helpers import narrow

REQUEST = Request(
    teacher="runs/my teacher",
    student="gfl_r18",
    data="d",
    recipe="r.yaml",
    assignments=("student_options.base_channels=8", "resize_short=[64]", "methods.pkd.weight=2"),
)


def test_commands_hold_what_was_given():
    assert distill_command(REQUEST, "pkd", with_teacher=True) == (
        "detdistill distill --teacher 'runs/my teacher' --student gfl_r18 --method pkd "
        "--recipe r.yaml --data d --set student_options.base_channels=8 "
        "--set 'resize_short=[64]' --set methods.pkd.weight=2 --out runs/distilled"
    )
    assert "--teacher" not in distill_command(REQUEST, "tf_head", with_teacher=False)
    assert "--methods pkd --seeds 0,1,2" in compare_command(REQUEST, "pkd")


def test_a_teacher_is_not_trained_with_the_students_settings():
    assert train_command(REQUEST, "gfl_r50") == (
        "detdistill train --detector gfl_r50 --recipe r.yaml --data d --set 'resize_short=[64]' "
        "--out runs/teacher"
    )


def test_a_teacher_is_trained_with_its_own_settings():
    assignments = ("teacher=gfl_r50", "teacher_options.base_channels=8", "methods={pkd: {}}")
    assignments += ("class_map.car=auto",)  # what another teacher calls it
    assert train_command(Request(data="d", assignments=assignments), "gfl_r50") == (
        "detdistill train --detector gfl_r50 --data d --set student_options.base_channels=8 "
        "--out runs/teacher"
    )


@pytest.mark.parametrize("teacher", FAMILIES.names())
@pytest.mark.parametrize("student", ["gfl", "faster_rcnn"])
def test_a_method_that_fits_the_pair(student, teacher):
    method = fitting_method(f"{teacher}_r50", f"{student}_r18_gn")
    pair = narrow(f"{student}_r18", 2), narrow(f"{teacher}_r18", 2)
    assert not check_fit(*pair, method, {method: {}}).reason
    dense = "rcnn" not in student + teacher
    assert (method == "crosskd") is dense


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("gfl_r18", "gfl_r50"),
        ("retinanet_mobilenetv2", "retinanet_r50"),
        ("fcos_r50_caffe_gn", "fcos_r101"),
        ("faster_rcnn_r101", "faster_rcnn_r101"),
    ],
)
def test_a_larger_detector(student, teacher):
    assert larger_detector(student) == teacher

"""CrossKD for two-stage detectors: its two terms by hand, where the gradient goes, refusals."""

import math

import pytest
import torch

import detdistill as dd
from detdistill.distill.crosskd_roi import CrossKDRoI, _boxes
from detdistill.errors import UserError
from detdistill.structures import RoIOutput
from tests.helpers import make_batch, narrow


def distiller(student="faster_rcnn_r18", method=None, **options):
    teacher = narrow("faster_rcnn_r18", seed=1, **options)
    return dd.Distiller(narrow(student), teacher, {"crosskd_roi": method or dd.CrossKDRoI()})


def output(logits, boxes):
    return RoIOutput([], torch.tensor(logits), torch.tensor(boxes))


def test_classes_are_the_softened_divergence_per_box():
    # Two boxes; at temperature 2 the teacher's first is (1/4, 3/4), everything else is even.
    found = output([[0.0, 0.0], [1.0, 1.0]], [[0.0] * 4] * 2)
    wanted = output([[0.0, 2 * math.log(3)], [5.0, 5.0]], [[0.0] * 4] * 2)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    method = CrossKDRoI(temperature=2.0)
    assert method._classes(found, wanted).item() == pytest.approx(4 * by_hand / 2)


def test_boxes_are_those_of_the_teachers_class_weighted_by_its_probability():
    model = narrow("faster_rcnn_r18", num_classes=2)
    # The first box is class 1 with 1/2; the second class 0 with 1/4, although it is background.
    wanted = output(
        [[0.0, math.log(2), 0.0], [math.log(2), 0.0, math.log(5)]],
        [[9.0] * 4 + [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0] + [9.0] * 4],
    )
    found = output(
        [[0.0] * 3] * 2,
        [[0.0] * 4 + [1.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 6.0] + [0.0] * 4],
    )
    by_hand = (0.5 * 2 + 0.25 * 4) / (4 * (0.5 + 0.25))
    assert _boxes(model, found, wanted).item() == pytest.approx(by_hand)


def test_the_pyramid_learns_and_neither_teacher_nor_rpn_head_does():
    model = distiller(fpn_channels=24)
    terms = model(make_batch())
    sum(value for name, value in terms.items() if name.startswith("crosskd_roi/")).backward()
    learning = {name.split(".")[0] for name, p in model.student.named_parameters() if _moves(p)}
    assert learning == {"backbone", "fpn"}
    assert all(_moves(p) for p in model.methods.parameters())
    assert all(p.grad is None for p in model.teacher.parameters())


def _moves(parameter):
    return parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_equal_detectors_agree():
    student, teacher = narrow("faster_rcnn_r18").eval(), narrow("faster_rcnn_r18")
    terms = dd.Distiller(student, teacher, {"crosskd_roi": dd.CrossKDRoI()}).eval()(make_batch())
    assert terms["crosskd_roi/cls"].item() == pytest.approx(0, abs=1e-6)
    assert terms["crosskd_roi/box"].item() == pytest.approx(0, abs=1e-6)


def test_a_batch_without_boxes_stays_finite():
    model = distiller()
    terms = model(make_batch(counts=(0, 0)))
    assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [
        ("gfl_r18", "faster_rcnn_r18", "gfl_r18 has none or several"),
        ("faster_rcnn_r18", "cascade_rcnn_r18", "cascade_rcnn_r18 has none or several"),
    ],
)
def test_other_pairs_are_refused(student, teacher, words):
    with pytest.raises(UserError, match=words):
        dd.Distiller(narrow(student), narrow(teacher), {"crosskd_roi": dd.CrossKDRoI()})

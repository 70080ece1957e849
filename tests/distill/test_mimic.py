"""Prediction mimicking and soft labels: tables worked by hand, whom they reach, refusals."""

import copy
from math import log
from types import SimpleNamespace

import pytest
import torch

from detdistill import (
    CrossKD,
    Distiller,
    PredictionMimicking,
    SoftLabel,
    UserError,
    create_method,
)
from detdistill.distill.published import PUBLISHED
from tests.distill import handmade
from tests.helpers import make_batch, narrow

R18 = ["atss_r18", "fcos_r18", "gfl_r18", "retinanet_r18"]
METHODS = {"mimic": PredictionMimicking, "soft_label": SoftLabel}


def distil(student, teacher, batch=None, name="mimic", **options):
    distiller = Distiller(student, teacher, {name: METHODS[name](**options)}).train()
    losses = distiller(batch or make_batch())
    return distiller, {k: v for k, v in losses.items() if k.startswith(f"{name}/")}


@pytest.mark.parametrize("name", R18)
def test_mimic_reaches_the_whole_student(name):
    student, teacher = narrow(name), narrow(name, seed=1)
    _, losses = distil(student, teacher)
    sum(losses.values()).backward()
    for part, parameter in student.named_parameters():
        assert parameter.grad is not None or part.startswith("quality."), part
    for part in (student.backbone, student.fpn, student.towers["cls"], student.towers["box"]):
        assert any(p.grad.any() for p in part.parameters())
    assert student.logits.weight.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", R18)
def test_mimic_is_crosskd_where_the_teachers_head_is_the_students(name):
    # Equal detectors: the cut at the tower's end without alignment gives the own predictions.
    student = narrow(name)
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in (*teacher.backbone.parameters(), *teacher.fpn.parameters()):
            parameter.mul_(1.1)
    student.eval(), teacher.eval()
    batch = make_batch()
    cross = Distiller(student, teacher, {"crosskd": CrossKD(depth=4, align=False)}).eval()(batch)
    own = Distiller(student, teacher, {"mimic": PredictionMimicking()}).eval()(batch)
    terms = [term.removeprefix("mimic/") for term in own if term.startswith("mimic/")]
    assert terms == [term.removeprefix("crosskd/") for term in cross if "crosskd/" in term]
    for term in terms:
        assert own[f"mimic/{term}"] > 0
        torch.testing.assert_close(own[f"mimic/{term}"], cross[f"crosskd/{term}"])


def test_mimic_by_hand():
    # One anchor each in two images, two classes. Scores of the student 1/2 and 1/2, of the teacher
    # 0.8 and 1/2: (ln 2) 0.3 + 0. In the other image 0.2 and 0.9: (ln 2) 0.3 + (ln 2) 0.4.
    # Two positives: 1.0 ln 2 / 2 in all.
    scores = torch.tensor([[0.8, 0.5], [0.2, 0.9]]).reshape(2, 1, 2, 1, 1)
    assignment = handmade.assignment([[0], [0]], [[0], [0]])
    step = handmade.step(
        handmade.output([torch.zeros_like(scores)]),
        handmade.output([scores.logit()]),
        [[0], [0]],
        of_teacher=assignment,
    )
    method = PredictionMimicking(box=False)
    model = narrow("retinanet_r18", 2)
    method.prepare(model, narrow("retinanet_r18", 2, seed=1))
    step.student_model = model
    assert method(step)["cls"].item() == pytest.approx(0.5 * log(2))


def test_the_best_anchor_of_a_cell_by_hand():
    # Two anchors a cell, scores of the teacher 0.2 and 0.8 in one cell, 0.6 and 0.3 in the other;
    # the student says 1/2: (ln 2) 0.3 + (ln 2) 0.1. The anchor of 0.6 is ignored: (ln 2) 0.3.
    scores = torch.tensor([[0.2, 0.6], [0.8, 0.3]]).reshape(1, 2, 1, 1, 2)
    assignment = handmade.assignment([[0, -1, -1, -1]], [[0]])
    step = handmade.step(
        handmade.output([torch.zeros(1, 1, 1, 1, 2)]),
        handmade.output([scores.logit()]),
        of_teacher=assignment,
    )
    student = narrow("gfl_r18", 1)
    method = PredictionMimicking(box=False, anchors="best")
    method.prepare(student, narrow("retinanet_r18", 1, seed=1))
    step.teacher_model.grid = SimpleNamespace(per_location=2)
    step.student_model = student
    step.student.anchors.append(torch.zeros(2, 4))
    assert method(step)["cls"].item() == pytest.approx(0.4 * log(2))
    assignment.weights[0, 2] = 0  # the first anchor of the second cell
    assert method(step)["cls"].item() == pytest.approx(0.3 * log(2))


def test_the_best_anchors_boxes_are_copied():
    # A student whose boxes are those of the teacher's best anchors has nothing to learn.
    student, teacher, batch = narrow("gfl_r18"), narrow("retinanet_r18", seed=1), make_batch()
    handmade.spread_predictions(teacher)
    method = PredictionMimicking(cls=False, anchors="best")
    distiller = Distiller(student, teacher, {"mimic": method}).train()
    with torch.no_grad():
        assert distiller(batch)["mimic/box"] > 1e-3
        out = teacher(batch)
        flat, anchors = out.predictions.flatten(), teacher.flat_anchors(out.anchors)
        boxes = teacher.decode(flat.boxes, anchors)
        rows = torch.arange(0, boxes.shape[1], 9) + flat.logits.amax(-1).view(
            len(boxes), -1, 9
        ).argmax(-1)
        best, decode = boxes[torch.arange(len(boxes))[:, None], rows], student.decode
        # The student's own loss decodes single positives, not a batch of all cells.
        student.decode = lambda encoded, at: best if encoded.dim() == 3 else decode(encoded, at)
        assert distiller(batch)["mimic/box"].item() == pytest.approx(0, abs=1e-5)


def test_best_anchors_need_one_prediction_a_cell():
    with pytest.raises(
        UserError, match="anchors 'best' needs a student with one prediction a cell"
    ):
        build = PredictionMimicking(anchors="best")
        Distiller(narrow("retinanet_r18"), narrow("retinanet_r18"), {"mimic": build})


def test_soft_labels_by_hand():
    # Positives only, two of three anchors. Student 1/2 and 1/2, teacher 3/4 and 1/2:
    # 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812. Student 1/4 and 1/2, teacher 3/4 and 1/4:
    # 3/4 ln 3 + 1/4 ln 1/3 = 0.549306 and 1/4 ln 1/2 + 3/4 ln 3/2 = 0.130812.
    teacher = torch.tensor([[0.75, 0.5], [0.9, 0.9], [0.75, 0.25]])
    student = torch.tensor([[0.5, 0.5], [0.1, 0.1], [0.25, 0.5]])
    maps = [scores.logit().T.reshape(1, 1, 2, 1, 3) for scores in (student, teacher)]
    assignment = handmade.assignment([[0, -1, 0]], [[1]])

    def found(factor, **options):
        sides = [handmade.output([factor * logits]) for logits in maps]
        return SoftLabel(**options)(handmade.step(*sides, of_teacher=assignment))["cls"].item()

    wanted = (0.130812 + 0.549306 + 0.130812) / 2
    assert found(1) == pytest.approx(wanted, abs=1e-5)
    assert found(3, temperature=3.0) == pytest.approx(9 * wanted, abs=1e-4)


@pytest.mark.parametrize("name", R18)
def test_soft_labels_reach_the_classification_and_all_before_it(name):
    student, teacher = narrow(name), narrow(name, seed=1)
    handmade.spread_predictions(student, teacher)
    distiller, losses = distil(student, teacher, name="soft_label", weight=3.0)
    loss = losses["soft_label/cls"]
    assert loss > 0
    assert loss.item() == pytest.approx(3 * distiller.raw["soft_label/cls"].item())
    loss.backward()
    for part in (student.backbone, student.fpn, student.towers["cls"], student.logits):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in student.towers["box"].parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("method", METHODS)
def test_equal_students_have_nothing_to_learn(name, method):
    student = narrow(name).eval()
    distiller = Distiller(student, copy.deepcopy(student), {method: METHODS[method]()}).eval()
    losses = distiller(make_batch())
    for term, value in losses.items():
        # The BCE towards equal centerness is its entropy, not 0.
        if term.startswith(f"{method}/") and term != "mimic/quality":
            assert value.item() == pytest.approx(0, abs=1e-3), term


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_finite_without_boxes(name, counts):
    for method in METHODS:
        student = narrow(name, 1)
        batch = make_batch(counts, num_classes=1)
        _, losses = distil(student, narrow(name, 1, seed=1), batch, method)
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values())
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
        if method == "soft_label" and counts == (0, 0):
            assert losses["soft_label/cls"].item() == 0
            assert student.logits.weight.grad is not None


@pytest.mark.parametrize("family", PUBLISHED)
def test_weights_and_losses_are_crosskds(family):
    distiller, losses = distil(narrow(f"{family}_r18"), narrow(f"{family}_r18", seed=1))
    method = distiller.methods["mimic"]
    published = PUBLISHED[family]
    wanted = {"cls": published.cls_weight, "box": published.box_weight}
    if published.quality_weight is not None:
        wanted["quality"] = published.quality_weight
    assert (method.weights, method.loss.box_loss) == (wanted, published.box_loss)
    for term, weight in wanted.items():
        raw = distiller.raw[f"mimic/{term}"].item()
        assert losses[f"mimic/{term}"].item() == pytest.approx(raw * weight)


@pytest.mark.parametrize(("student", "teacher"), [("gfl_r18", "atss_r18"), ("atss_r18", "gfl_r18")])
def test_unlike_codings_of_equal_anchors_meet_at_their_boxes(student, teacher):
    distiller, losses = distil(narrow(student), narrow(teacher, seed=1))
    method = distiller.methods["mimic"]
    assert method.weights == {"cls": 1.0, "box": 1.0}
    assert method.loss.box_loss == "giou"
    assert all(value.isfinite() and value > 0 for value in losses.values())


def test_boxes_are_decoded_by_the_head_that_predicts_them():
    # A GFL student has nothing to learn where an ATSS teacher's boxes are its own.
    student, teacher, batch = narrow("gfl_r18"), narrow("atss_r18", seed=1), make_batch()
    distiller = Distiller(student, teacher, {"mimic": PredictionMimicking(cls=False)}).train()
    with torch.no_grad():
        assert distiller(batch)["mimic/box"] > 1e-3
        own = student(batch).predictions.flatten().boxes
        teacher.decode = lambda boxes, anchors: student.decode(own, anchors)
        assert distiller(batch)["mimic/box"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"box": False}, {"cls"}),
        ({"cls": False, "box_loss": "iou"}, {"box", "quality"}),
        ({"cls": False, "box": False, "quality": True, "quality_weight": 0.5}, {"quality"}),
    ],
)
def test_branch_switches(options, terms):
    distiller, losses = distil(narrow("atss_r18"), narrow("atss_r18", seed=1), **options)
    assert set(losses) == {f"mimic/{term}" for term in terms}
    assert distiller.methods["mimic"].weights == {
        term: options.get(f"{term}_weight", 1.0) for term in terms
    }


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method):
    build = METHODS[method]
    with pytest.raises(UserError, match=f"{method} compares .* the teacher retinanet_r18"):
        Distiller(narrow("gfl_r18"), narrow("retinanet_r18"), {method: build()})
    with pytest.raises(UserError, match=f"{method}: the teacher gfl_r18 has 5 classes"):
        Distiller(narrow(), narrow(num_classes=5), {method: build()})
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(narrow(), None, {method: build()})
    with pytest.raises(UserError, match="option temperature"):
        create_method(method, temperature=0.0)


def test_the_way_out_of_unlike_anchors_is_named_where_there_is_one():
    def sentence(student, teacher, name="mimic"):
        with pytest.raises(UserError) as caught:
            Distiller(narrow(student), narrow(teacher, seed=1), {name: METHODS[name]()})
        return str(caught.value)

    for teacher in ("retinanet_r18", "fcos_r18"):
        assert "choose a teacher with the student's, anchors 'best', by" in sentence(
            "gfl_r18", teacher
        )
        Distiller(narrow(), narrow(teacher), {"mimic": PredictionMimicking(anchors="best")})
    for given in (("retinanet_r18", "gfl_r18"), ("gfl_r18", "retinanet_r18", "soft_label")):
        assert "anchors 'best'" not in sentence(*given)
        assert "the student's, or crosskd, which does not need them to agree" in sentence(*given)


def test_refusals_of_mimic():
    for student in (narrow("atss_r18"), narrow(reg_max=8)):
        with pytest.raises(UserError, match="mimic: box_loss 'kl' needs distance distributions"):
            Distiller(student, narrow(), {"mimic": PredictionMimicking(box_loss="kl")})
    with pytest.raises(UserError, match="mimic: quality=True, but gfl_r18 has no quality"):
        method = PredictionMimicking(quality=True)
        Distiller(narrow("gfl_r18"), narrow("atss_r18"), {"mimic": method})
    with pytest.raises(UserError, match="mimic with cls=False and box=False"):
        PredictionMimicking(cls=False, box=False)

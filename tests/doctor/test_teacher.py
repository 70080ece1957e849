import pytest
import torch

from detdistill import save_detector
from detdistill.data.eval_loader import spread_subset
from detdistill.detectors import DenseDetector
from detdistill.doctor.teacher import (
    check_ap,
    check_classes,
    check_input,
    measure_ap,
    open_teacher,
)
from detdistill.errors import UserError
from detdistill.evaluation.coco import NUMBERS, CocoMetrics
from detdistill.structures import Detections
from tests.doctor.conftest import dataset_of, levels
from tests.helpers import narrow

GET = "detdistill train --detector gfl_r50 --data my_coco --out runs/teacher"
CLASSES = ["cat", "dog", "bird"]


def teacher_of(classes, **facts):
    model = narrow("gfl_r18", len(classes) if classes else 3)
    model.classes = classes
    for name, value in facts.items():
        setattr(model, name, value)
    return model


def test_no_teacher(recipe):
    found = open_teacher(recipe, CLASSES, GET)
    assert found.model is None and levels(found.findings) == ["note"]
    assert found.findings[0].advice == GET


def test_a_teacher_that_is_only_named(recipe):
    small = {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16}
    settings = recipe.model_copy(update={"teacher": "gfl_r18", "teacher_options": small})
    found = open_teacher(settings, CLASSES, GET)
    assert found.model.num_classes == 3 and not found.trained
    assert "yet to be trained" in found.findings[0].text


def test_a_trained_teacher(recipe, tmp_path):
    path = tmp_path / "model.safetensors"
    save_detector(teacher_of(CLASSES), path)
    found = open_teacher(recipe.model_copy(update={"teacher": str(tmp_path)}), CLASSES, GET)
    assert found.trained and found.model.classes == CLASSES
    assert levels(found.findings) == ["ok"] and "3 classes" in found.findings[0].text


def test_a_damaged_teacher_is_a_problem_a_missing_one_bad_input(recipe, tmp_path):
    path = tmp_path / "model.safetensors"
    save_detector(teacher_of(CLASSES), path)
    path.write_bytes(path.read_bytes()[:1000])
    settings = recipe.model_copy(update={"teacher": str(path)})
    found = open_teacher(settings, CLASSES, GET)
    assert found.model is None and levels(found.findings) == ["problem"]
    path.unlink()
    with pytest.raises(UserError, match="no such teacher"):
        open_teacher(settings, CLASSES, GET)


@pytest.mark.parametrize(
    ("own", "level", "part"),
    [
        (CLASSES, "ok", "same order"),
        (None, "warning", "names no classes"),
        (["cat", "dog", "cow"], "problem", "does not know the class 'bird' among its 3"),
        (["person", "car"], "problem", "the class 'cat' and 2 more among its 2; did you mean"),
    ],
)
def test_classes(own, level, part):
    [found] = check_classes(teacher_of(own), CLASSES, True, GET)
    assert found.level == level and part in found.text
    if level == "problem":
        assert GET in found.advice
        assert levels(check_classes(teacher_of(own), CLASSES, False, GET)) == ["warning"]


def test_sizes_and_normalisation(recipe):
    student = narrow()
    [found] = check_input(teacher_of(CLASSES, input_size=(64, 64)), student, recipe)
    assert found.level == "ok"
    [found] = check_input(teacher_of(CLASSES, input_size=(800, 1333)), student, recipe)
    assert found.level == "warning"
    assert "--set 'resize_short=[800]' --set resize_long=1333" in found.advice
    own = teacher_of(CLASSES)
    own.pixel_mean.zero_()
    unknown, normalisation = check_input(own, student, recipe)
    assert unknown.level == "note" and "does not say" in unknown.text
    assert "each normalises for itself" in normalisation.text


def metrics_of(ap, **per_class):
    return CocoMetrics({name: ap for name in NUMBERS}, per_class)


@pytest.mark.parametrize(
    ("ap", "level"), [(-1.0, "warning"), (0.004, "problem"), (0.06, "warning"), (0.4, "ok")]
)
def test_the_verdict_on_ap(ap, level):
    subset = dataset_of([[[0, 0, 9, 9]]], split="val")
    [found] = check_ap(metrics_of(ap, cat=ap, dog=-1.0), subset, 30, GET)
    assert found.level == level and "1 of 30 images" in found.text
    assert ap < 0 or f"{100 * ap:.1f}" in found.text
    if level == "problem":
        assert GET in found.advice


def test_a_class_that_is_never_found():
    box = [0, 0, 9, 9]
    subset = dataset_of([[box] * 9], [[0] * 4 + [1] * 5], split="val")
    good, missed = check_ap(metrics_of(0.4, cat=0.0, dog=0.001), subset, 1, GET)
    assert good.level == "ok"
    assert missed.level == "warning" and missed.text.endswith("dog (5 boxes)")


def test_ap_is_measured_on_some_images_alone(recipe, val, monkeypatch):
    """A teacher that knows the answers of the images it is shown finds all of them."""
    subset = spread_subset(val, 2)
    assert [record.image_id for record in subset.records] == [
        val.records[i].image_id for i in (0, 2)
    ]
    # All images have one size here, so the order of evaluation is that of the records.
    answers = iter(subset.records)

    def tell(self, output, sizes, **limits):
        records = [next(answers) for _ in sizes]
        return [Detections(r.boxes_xyxy, torch.ones(len(r.labels)), r.labels) for r in records]

    monkeypatch.setattr(DenseDetector, "detect", tell)
    seen = []
    metrics, used = measure_ap(
        narrow(num_classes=len(val.classes)),
        val,
        recipe,
        torch.device("cpu"),
        2,
        lambda done, total: seen.append((done, total)),
    )
    assert metrics.numbers["AP"] == pytest.approx(1.0)
    assert len(used) == 2 and seen[-1] == (2, 2)

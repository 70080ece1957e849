"""What every registered method must do with every detector; new ones of both are found here."""

import copy
from itertools import product

import pytest
import torch

from detdistill import (
    Batch,
    Distiller,
    UserError,
    as_detector,
    create_method,
    list_detectors,
    list_methods,
)
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import split_name
from detdistill.detectors.registry import FAMILIES
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.detectors.view_base import TorchvisionView
from detdistill.distill.method import METHODS
from tests.detectors import test_two_stage_views as two_stage_views
from tests.detectors import test_views as views
from tests.distill.handmade import spread_predictions
from tests.helpers import narrow

FAMILY_NAMES = FAMILIES.names()
# Those of the package: examples in the documentation register others.
METHOD_NAMES = [m for m in list_methods() if METHODS.get(m).__module__.startswith("detdistill.")]
WITH_TEACHER = [m for m in METHOD_NAMES if METHODS.get(m).needs_teacher]
TWO_STAGE = {f for f in FAMILY_NAMES if issubclass(FAMILIES.get(f), TwoStageDetector)}
DENSE = set(FAMILY_NAMES) - TWO_STAGE
REFUSED = {
    "crosskd": (TWO_STAGE, "needs a dense"),
    "crosskd_roi": (DENSE | {"cascade_rcnn"}, "one RoI head"),
    "ld": (set(FAMILY_NAMES) - {"gfl"}, "needs (a dense|distance distributions)"),
    "mimic": (TWO_STAGE, "needs a dense"),
    "pfi": (TWO_STAGE, "needs a dense"),
    "rm": (TWO_STAGE, "needs a dense"),
    "soft_label": (TWO_STAGE, "needs a dense"),
}
"""Families of students that a method refuses, and words of the reason; it must take all others."""
UNLIKE = {"head"}
"""Methods for a teacher of another family than the student's; all others must take their own."""
FITTING = [
    (m, f) for m, f in product(METHOD_NAMES, FAMILY_NAMES) if f not in REFUSED.get(m, ((), ""))[0]
]
LATER = 5000  # steps; beyond the warm-up of every method
BODY = {"backbone", "fpn"}
PARTS = (
    "fpn",
    "backbone",
    "towers.cls",
    "towers.box",
    "rpn",
    "roi_heads",
)  # all else: "predictors"
REACHED = {
    "crosskd": {"towers.cls", "towers.box"},
    "crosskd_roi": set(),
    "feature": set(),
    "g_detkd": {"towers.cls"},
    "head": {"towers.cls"},
    "ld": {"towers.cls", "towers.box", "predictors"},
    "mimic": {"towers.cls", "towers.box", "predictors"},
    "pfi": {"towers.cls", "predictors"},
    "pkd": set(),
    "rm": {"towers.cls", "predictors"},
    "soft_label": {"towers.cls", "predictors"},
    "tf_head": {"towers.cls"},
}
"""What each method teaches of a dense student beside its body."""


def two_images(seed=0):
    """64 px, two boxes each, large enough for every assigner to give them several candidates."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator).to(torch.uint8)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 16.0, 62.0, 58.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor(labels)} for labels in ([0, 2], [1, 1])]
    return Batch(images, [(64, 64)] * 2, targets, [1, 2])


def put_together(method, student, teacher, **options):
    """A distiller in the midst of training.

    Raises:
        UserError: where the method refuses the pair.
    """
    spread_predictions(student, *([teacher] if teacher else []))
    found = Distiller(student, teacher, {method: create_method(method, **options)}).train()
    found.iteration = LATER
    return found


def assert_one_sentence(method, error):
    sentence = str(error)
    assert method in sentence and " " in sentence and "\n" not in sentence, sentence


def distiller_of(method, student, teacher, **options):
    """The same, or None where the pair is refused."""
    try:
        return put_together(method, student, teacher, **options)
    except UserError as error:
        assert_one_sentence(method, error)
        return None


def teacher_of(method, family):
    return narrow(f"{family}_r18", seed=1) if METHODS.get(method).needs_teacher else None


def fitting_distiller(method, name):
    """Where the method takes the student, with a teacher that it must take, too."""
    own = split_name(name, {})[0]
    unlike = next(family for family in FAMILY_NAMES if family != own)
    family = unlike if method in UNLIKE else own
    return put_together(method, narrow(name), teacher_of(method, family))


def part_of(parameter):
    """Which part of a student a parameter belongs to, by its name."""
    name = parameter.removeprefix("model.")
    return next((part for part in PARTS if f".{part}." in f".{name}"), "predictors")


def expected_parts(method, distiller):
    """All that the method should teach, or None where nobody has said so."""
    student, teacher = distiller.student, distiller.teacher
    if isinstance(student, TorchvisionView) or method not in REACHED:
        return None
    weights = distiller.methods[method].weights
    vectors = any(term.startswith(("ckd", "contrast")) for term in weights)
    if not isinstance(student, DenseDetector):
        heads = {"rpn"} if method == "tf_head" else {"roi_heads"} if vectors else set()
        return BODY | heads
    if method in ("head", "g_detkd") and isinstance(teacher, DenseDetector):
        return BODY | ({"towers.cls", "towers.box"} if vectors else set())
    parts = BODY | REACHED[method]
    if student.family == "reppoints" and "predictors" in parts:
        parts |= {"towers.box"}  # its points say where its classes look
    return parts


def assert_finite_and_not_zero(method, distiller, terms):
    own = {name: value for name, value in terms.items() if name.startswith(f"{method}/")}
    assert set(own) == {f"{method}/{term}" for term in distiller.methods[method].weights}
    for name, value in own.items():
        assert value.shape == () and value.isfinite() and value != 0, (name, value)
    return own


def assert_reaches(method, distiller, terms):
    """The method's own gradient: where it should be, finite, nowhere else."""
    own = assert_finite_and_not_zero(method, distiller, terms)
    sum(own.values()).backward(retain_graph=True)
    reached = set()
    for name, parameter in distiller.student.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            reached |= {part_of(name)} if parameter.grad.any() else set()
    assert reached >= BODY
    expected = expected_parts(method, distiller)
    assert expected is None or reached == expected
    for name, parameter in distiller.methods.named_parameters():
        assert parameter.grad is not None, name
    if distiller.teacher is not None:
        assert all(p.grad is None for p in distiller.teacher.parameters())


def assert_trains(method, distiller):
    """Three steps, whose terms are finite and not zero."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for seed in range(3):
        terms = distiller(two_images(seed))
        if seed == 0:
            assert_reaches(method, distiller, terms)
        assert_finite_and_not_zero(method, distiller, terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
        optimizer.step()
        assert all(value.isfinite() for value in terms.values())
    assert distiller.iteration == LATER + 3


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_three_steps_of_training(method, family):
    assert_trains(method, fitting_distiller(method, f"{family}_r18"))


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_teachers_of_other_families_teach_or_are_refused_with_a_sentence(method, family):
    for other in FAMILY_NAMES if METHODS.get(method).needs_teacher else ():
        student, teacher = narrow(f"{family}_r18"), teacher_of(method, other)
        distiller = distiller_of(method, student, teacher)
        if distiller is not None and other != family:
            assert_reaches(method, distiller, distiller(two_images()))


@pytest.mark.parametrize(("student", "teacher"), product(FAMILY_NAMES, FAMILY_NAMES))
def test_three_steps_of_head_with_ckd_from_every_kind_of_teacher(student, teacher):
    pair = narrow(f"{student}_r18"), teacher_of("head", teacher)
    distiller = distiller_of("head", *pair, ckd=True)
    refused = student == teacher or (student in TWO_STAGE and teacher in DENSE)
    assert (distiller is None) == refused
    if distiller is not None:
        assert_trains("head", distiller)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("gfl", "gfl"),
        ("retinanet", "retinanet"),
        ("retinanet", "faster_rcnn"),
        ("faster_rcnn", "faster_rcnn"),
    ],
)
def test_all_methods_that_fit_a_pair_train_it_together(student, teacher):
    pair = [narrow(f"{family}_r18", seed=seed) for seed, family in enumerate((student, teacher))]
    fitting = [m for m in METHOD_NAMES if distiller_of(m, *copy.deepcopy(pair)) is not None]
    spread_predictions(*pair)
    together = Distiller(*pair, {m: create_method(m) for m in fitting}).train()
    together.iteration = LATER
    terms = together(two_images())
    assert len(fitting) > 1 and {name.split("/")[0] for name in terms} == {"task", *fitting}
    for method in fitting:
        assert_finite_and_not_zero(method, together, terms)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in together.parameters())


@pytest.mark.parametrize(
    ("method", "family"), [pair for pair in product(REFUSED, FAMILY_NAMES) if pair not in FITTING]
)
def test_students_that_no_teacher_fits_are_refused_with_the_reason(method, family):
    for other in FAMILY_NAMES:
        with pytest.raises(UserError, match=REFUSED[method][1]) as caught:
            put_together(method, narrow(f"{family}_r18"), teacher_of(method, other))
        assert_one_sentence(method, caught.value)


def test_the_tables_name_every_method_and_leave_each_a_student():
    assert set(METHOD_NAMES) == set(REACHED) == {method for method, _ in FITTING}
    assert {*REFUSED, *UNLIKE} <= set(METHOD_NAMES)


def view(kind, seed=0):
    dense = kind in views.BUILD
    tests = views if dense else two_stage_views
    return as_detector(tests.lively(tests.BUILD[kind](), seed=seed))


@pytest.mark.parametrize("kind", [*views.BUILD, "v1"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_views_of_torchvisions_detectors_teach_each_other_or_are_refused(method, kind):
    teacher = view(kind, seed=1) if METHODS.get(method).needs_teacher else None
    distiller = distiller_of(method, view(kind), teacher)
    if distiller is not None:
        assert_reaches(method, distiller, distiller(two_images()))


@pytest.mark.parametrize("kind", ["fcos", "v1"])
@pytest.mark.parametrize("method", WITH_TEACHER)
def test_views_and_our_detectors_teach_each_other_or_are_refused(method, kind):
    other = {"fcos": "faster_rcnn_r18", "v1": "retinanet_r18"}[kind]
    for student, teacher in (
        (narrow(other, views.CLASSES), view(kind)),
        (view(kind), narrow(other, views.CLASSES)),
    ):
        distiller = distiller_of(method, student, teacher)
        if distiller is not None:
            assert_reaches(method, distiller, distiller(two_images()))


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_a_batch_without_boxes(method, family):
    distiller = fitting_distiller(method, f"{family}_r18")
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = two_images()
    terms = distiller(Batch(batch.images, batch.sizes, [empty] * 2, [1, 2]))
    sum(terms.values()).backward()
    names = {f"{method}/{term}" for term in distiller.methods[method].weights}
    assert names <= set(terms)
    assert all(value.isfinite() for value in terms.values())
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("method", "family"), FITTING)
def test_bfloat16_gives_about_the_same_terms(method, family):
    distiller = fitting_distiller(method, f"{family}_r18")
    distiller.eval()
    with torch.no_grad():
        full = distiller(two_images())
        with torch.autocast("cpu", torch.bfloat16):
            half = distiller(two_images())
    for term in distiller.methods[method].weights:
        name = f"{method}/{term}"
        assert half[name].dtype == torch.float32, name
        # Loosely: methods that look at proposals may meet other ones.
        assert half[name].item() == pytest.approx(full[name].item(), rel=0.2, abs=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"),
    [
        (m, n)
        for m, n in product(METHOD_NAMES, list_detectors())
        if (m, split_name(n, {})[0]) in FITTING
    ],
)
def test_every_listed_detector(method, name):
    assert_trains(method, fitting_distiller(method, name))

"""What every registered method must do with every detector; new ones of both are found here."""

from itertools import product

import pytest
import torch

from detdistill import (
    Batch,
    Distiller,
    UserError,
    create_method,
    list_detectors,
    list_methods,
)
from detdistill.detectors.factory import split_name
from detdistill.detectors.registry import FAMILIES
from detdistill.distill.method import METHODS
from tests.distill.handmade import spread_predictions
from tests.helpers import narrow

FAMILY_NAMES = FAMILIES.names()
LATER = 5000  # steps; beyond the warm-up of every method


def two_images(seed=0):
    """64 px, two boxes each, large enough for every assigner to give them several candidates."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator).to(torch.uint8)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 16.0, 62.0, 58.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor(labels)} for labels in ([0, 2], [1, 1])]
    return Batch(images, [(64, 64)] * 2, targets, [1, 2])


def distiller_of(method, student, teacher):
    """A distiller in the midst of training, or None where the pair is refused."""
    spread_predictions(student, *([teacher] if teacher else []))
    try:
        found = Distiller(student, teacher, {method: create_method(method)}).train()
    except UserError as error:
        sentence = str(error)
        assert method in sentence and " " in sentence and "\n" not in sentence, sentence
        return None
    found.iteration = LATER
    return found


def pair_of(method, student_family, teacher_family):
    student = narrow(f"{student_family}_r18")
    with_teacher = METHODS.get(method).needs_teacher
    return student, narrow(f"{teacher_family}_r18", seed=1) if with_teacher else None


def assert_reaches_the_body(method, distiller, terms):
    own = {name: value for name, value in terms.items() if name.startswith(f"{method}/")}
    assert set(own) == {f"{method}/{term}" for term in distiller.methods[method].weights}
    for name, value in own.items():
        assert value.shape == () and value.isfinite() and value != 0, (name, value)
    sum(own.values()).backward(retain_graph=True)
    for part in (distiller.student.backbone, distiller.student.fpn):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert any(gradient.any() for gradient in gradients)
        assert all(gradient.isfinite().all() for gradient in gradients)
    for name, parameter in distiller.methods.named_parameters():
        assert parameter.grad is not None, name
    if distiller.teacher is not None:
        assert all(p.grad is None for p in distiller.teacher.parameters())


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", list_methods())
def test_three_steps_with_a_teacher_of_the_same_family(method, family):
    distiller = distiller_of(method, *pair_of(method, family, family))
    if distiller is None:
        return
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for seed in range(3):
        terms = distiller(two_images(seed))
        if seed == 0:
            assert_reaches_the_body(method, distiller, terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
        optimizer.step()
        assert all(value.isfinite() for value in terms.values())
    assert distiller.iteration == LATER + 3


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", list_methods())
def test_teachers_of_other_families_teach_or_are_refused_with_a_sentence(method, family):
    for other in FAMILY_NAMES if METHODS.get(method).needs_teacher else ():
        distiller = distiller_of(method, *pair_of(method, family, other))
        if distiller is not None and other != family:
            assert_reaches_the_body(method, distiller, distiller(two_images()))


@pytest.mark.parametrize("method", list_methods())
def test_some_pair_fits(method):
    pairs = product(FAMILY_NAMES, repeat=2)
    assert any(distiller_of(method, *pair_of(method, *pair)) for pair in pairs)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", list_methods())
def test_a_batch_without_boxes(method, family):
    distiller = distiller_of(method, *pair_of(method, family, family))
    if distiller is None:
        return
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = two_images()
    terms = distiller(Batch(batch.images, batch.sizes, [empty] * 2, [1, 2]))
    sum(terms.values()).backward()
    names = {f"{method}/{term}" for term in distiller.methods[method].weights}
    assert names <= set(terms)
    assert all(value.isfinite() for value in terms.values())
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("method", list_methods())
def test_bfloat16_gives_about_the_same_terms(method, family):
    distiller = distiller_of(method, *pair_of(method, family, family))
    if distiller is None:
        return
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
@pytest.mark.parametrize("name", list_detectors())
@pytest.mark.parametrize("method", list_methods())
def test_every_listed_detector(method, name):
    _, teacher = pair_of(method, *[split_name(name, {})[0]] * 2)
    distiller = distiller_of(method, narrow(name), teacher)
    if distiller is not None:
        assert_reaches_the_body(method, distiller, distiller(two_images()))

"""PFI: tables worked by hand, each option, whom it reaches, what is refused."""

import copy

import pytest
import torch

from detdistill import PFI, Distiller, UserError, create_method
from tests.distill import handmade
from tests.helpers import make_batch, narrow

R18 = ["atss_r18", "fcos_r18", "gfl_r18", "retinanet_r18"]

# Two levels of two images, two channels, one anchor, two classes. The student is 0 throughout.
# Level 0 is 1 x 2, level 1 is 1 x 1. Mean squares of the teacher's two logits and two features:
#   image 0, level 0: P = (1 + 9)/2 = 5 and (0 + 4)/2 = 2;  F = (4 + 0)/2 = 2 and (9 + 1)/2 = 5
#   image 1, level 0: P = 0 and (16 + 0)/2 = 8;             F = (1 + 1)/2 = 1 and (1 + 0)/2 = 1/2
#   image 0, level 1: P = (1 + 1)/2 = 1;                    F = (4 + 2)/2 = 3
#   image 1, level 1: P = (2 + 0)/2 = 1;                    F = (0 + 8)/2 = 4
# Products: (10, 10), (0, 4) on level 0; 3 and 4 on level 1.
ROOT2 = 2**0.5
LOGITS = [[[[1.0, 0.0]], [[3.0, 2.0]]], [[[0.0, 4.0]], [[0.0, 0.0]]]]
FEATURES = [[[[2.0, 3.0]], [[0.0, 1.0]]], [[[1.0, 1.0]], [[1.0, 0.0]]]]
LOGITS_1 = [[[[1.0]], [[1.0]]], [[[ROOT2]], [[0.0]]]]
FEATURES_1 = [[[[2.0]], [[ROOT2]]], [[[0.0]], [[8**0.5]]]]


def one(teacher_logits, teacher_maps, **options):
    """The raw term of a student that is 0 everywhere, and its logits and maps."""
    teacher_logits = [torch.tensor(level)[:, None] for level in teacher_logits]
    teacher_maps = [torch.tensor(level) for level in teacher_maps]
    logits = [torch.zeros_like(level, requires_grad=True) for level in teacher_logits]
    maps = [torch.zeros_like(level, requires_grad=True) for level in teacher_maps]
    method = PFI(**options)
    method.levels, method.adapter = list(range(len(maps))), torch.nn.Identity()
    sides = handmade.output(logits, maps), handmade.output(teacher_logits, teacher_maps)
    return method(handmade.step(*sides))["map"], logits, maps


@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        # Means (10 + 10 + 0 + 4) / 4 = 6 and (3 + 4) / 2 = 3.5.
        ("l1", (6 + 3.5) / 2),
        # Per image sqrt(200) / 2 and 4 / 2, their mean; 3 and 4, their mean.
        ("l2", ((200**0.5 / 2 + 2) / 2 + 3.5) / 2),
        # (100 + 100 + 0 + 16) / 4 = 54 and (9 + 16) / 2 = 12.5.
        ("sq", (54 + 12.5) / 2),
    ],
)
def test_each_norm_by_hand(norm, wanted):
    found, _, _ = one([LOGITS, LOGITS_1], [FEATURES, FEATURES_1], score="logit", norm=norm)
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_scores_after_the_sigmoid_by_default():
    # Scores 0.8 and 0.5 against 0.5: P = (0.3^2 + 0) / 2 = 0.045; F = (4 + 2) / 2 = 3.
    logits = [[[torch.tensor(0.8).logit().item()]], [[0.0]]]
    found, _, _ = one([[logits]], [FEATURES_1[:1]])
    assert found.item() == pytest.approx(0.135, rel=1e-5)


def test_anchors_and_classes_count_alike():
    method = PFI(score="logit")
    teacher = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape(1, 2, 3, 1, 1)
    gap = method.prediction_gap(torch.zeros(1, 2, 3, 1, 1), teacher)
    assert gap.shape == (1, 1, 1)
    assert gap.item() == pytest.approx(91 / 6)


@pytest.mark.parametrize("norm", ["l1", "l2", "sq"])
@pytest.mark.parametrize("equal", ["predictions", "features"])
def test_nothing_to_learn_where_either_agrees(norm, equal):
    zeros = [[[[0.0, 0.0]], [[0.0, 0.0]]]] * 2
    pair = ([zeros], [FEATURES]) if equal == "predictions" else ([LOGITS], [zeros])
    loss, logits, maps = one(*pair, norm=norm)
    loss.backward()
    assert loss.item() == 0
    for part in (*logits, *maps):
        assert part.grad.isfinite().all() and not part.grad.any()


def test_a_position_weighs_by_its_prediction():
    # On image 0 P is 5 and 2: a step of the feature counts 5 and 2 times.
    loss, _, maps = one([LOGITS], [FEATURES], score="logit")
    loss.backward()
    # d/df of mean over 4 positions of P * (f - t)^2 / 2, at f = 0: -P t / 4.
    wanted = torch.tensor([[[-5 * 2.0, -2 * 3.0]], [[0.0, -2 * 1.0]]]) / 4
    torch.testing.assert_close(maps[0].grad[0], wanted)


@pytest.mark.parametrize("detach", [False, True])
def test_predictions_learn_unless_detached(detach):
    loss, logits, maps = one([LOGITS], [FEATURES], score="logit", detach_prediction=detach)
    loss.backward()
    assert loss.item() == pytest.approx(6)
    assert maps[0].grad.any()
    if detach:
        assert logits[0].grad is None
    else:
        # d/dy of mean over 4 positions of F * (y - t)^2 / 2, at y = 0: -F t / 4.
        wanted = torch.tensor([[[-2 * 1.0, 0.0]], [[-2 * 3.0, -5 * 2.0]]]) / 4
        torch.testing.assert_close(logits[0].grad[0, 0], wanted)


def distil(student, teacher, batch=None, **options):
    distiller = Distiller(student, teacher, {"pfi": PFI(**options)}).train()
    return distiller, distiller(batch or make_batch())["pfi/map"]


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("detach", [False, True])
def test_reaches_pyramid_and_classification(name, detach):
    student, teacher = narrow(name), narrow(name, seed=1)
    distiller, loss = distil(student, teacher, detach_prediction=detach)
    assert loss > 0
    assert loss.item() == pytest.approx(1.5 * distiller.raw["pfi/map"].item())
    loss.backward()
    for part in (student.backbone, student.fpn):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    for part in (student.towers["cls"], student.logits):
        assert all((p.grad is None) == detach for p in part.parameters())
        assert detach or any(p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in student.towers["box"].parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    student = narrow().eval()
    distiller = Distiller(student, copy.deepcopy(student), {"pfi": PFI()}).eval()
    assert distiller(make_batch())["pfi/map"].item() == 0


def test_unequal_widths_meet_in_one_adapter_for_all_levels():
    distiller, loss = distil(narrow(fpn_channels=8), narrow(seed=1, fpn_channels=24))
    loss.backward()
    adapters = list(distiller.methods["pfi"].adapter.parameters())
    assert [tuple(p.shape) for p in adapters] == [(24, 8, 1, 1), (24,)]
    assert adapters[0].grad.any()
    equal, _ = distil(narrow(), narrow(seed=1))
    assert not list(equal.methods["pfi"].parameters())


def test_equal_widths_may_have_the_adapter_too():
    distiller, loss = distil(narrow(), narrow(seed=1), adapter="always")
    loss.backward()
    width = distiller.student.pyramid_channels
    adapters = list(distiller.methods["pfi"].parameters())
    assert [tuple(p.shape) for p in adapters] == [(width, width, 1, 1), (width,)]
    assert adapters[0].grad.any()
    # It stands on the student's side: phi(f) = 2f + 1 doubles these maps and adds 1.
    with torch.no_grad():
        adapters[0].copy_(2 * torch.eye(width)[:, :, None, None])
        adapters[1].fill_(1.0)
        batch = make_batch()
        student, teacher = (m(batch) for m in (distiller.student, distiller.teacher))
        wanted = []
        for level in range(len(student.pyramid)):
            sides = (student.predictions.logits[level], teacher.predictions.logits[level])
            gap = (sides[0].sigmoid() - sides[1].sigmoid()).square().mean((1, 2))
            moved = 2 * student.pyramid[level] + 1 - teacher.pyramid[level]
            wanted.append((gap * moved.square().mean(1)).mean())
        found = distiller(batch)["pfi/map"]
    assert found.item() == pytest.approx(1.5 * torch.stack(wanted).mean().item(), rel=1e-4)


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_needs_no_boxes(counts, num_classes):
    models = narrow(num_classes=num_classes), narrow(num_classes=num_classes, seed=1)
    _, loss = distil(*models, make_batch(counts, num_classes=num_classes))
    assert loss > 0


def test_unlike_heads_with_equally_many_anchors_meet():
    _, loss = distil(narrow("fcos_r18"), narrow("atss_r18", seed=1))
    assert loss > 0


def test_refusals():
    with pytest.raises(UserError, match=r"retinanet_r18 has 9 per location, .* gfl_r18 1"):
        Distiller(narrow("gfl_r18"), narrow("retinanet_r18"), {"pfi": PFI()})
    with pytest.raises(UserError, match="pfi: the teacher gfl_r18 has 5 classes"):
        Distiller(narrow(), narrow(num_classes=5), {"pfi": PFI()})
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(narrow(), None, {"pfi": PFI()})
    for option in ("score", "norm", "adapter"):
        with pytest.raises(UserError, match=f"pfi: {option} is 'none'; expected '"):
            PFI(**{option: "none"})
        with pytest.raises(UserError, match=f"method 'pfi', option {option}"):
            create_method("pfi", **{option: "none"})
    student = narrow()
    student.strides = (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match=r"pfi: the teacher's pyramid .* \[8, 16, 32, 64, 128\]"):
        Distiller(student, narrow(seed=1), {"pfi": PFI()})

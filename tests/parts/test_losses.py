"""Losses against their formulas, written out the slow way."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detdistill.boxes import (
    clip_xyxy,
    elementwise_iou,
    keep_ratio_size,
    ltrb_to_xyxy,
    pairwise_iou,
    xyxy_to_ltrb,
)
from detdistill.parts import losses
from detdistill.parts.coders import deltas_to_xyxy, distribution_to_ltrb, xyxy_to_deltas

torch.manual_seed(0)
LOGITS = torch.randn(2, 7, 4) * 3
LABELS = torch.tensor([[0, 4, 4, 3, 4, 1, 4], [4, 4, 2, 4, 4, 4, 0]])  # 4 is background
WEIGHTS = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).float()
ONE_HOT = F.one_hot(LABELS, 5)[..., :4].float()


def gradient(function, logits):
    logits = logits.clone().requires_grad_()
    function(logits).backward()
    return logits.grad


def assert_same(found, wanted):
    torch.testing.assert_close(found(LOGITS), wanted(LOGITS))
    torch.testing.assert_close(gradient(found, LOGITS), gradient(wanted, LOGITS))


def test_focal_loss_equals_torchvision():
    assert_same(
        lambda z: losses.focal_loss_sum(z, LABELS, WEIGHTS),
        lambda z: (sigmoid_focal_loss(z, ONE_HOT) * WEIGHTS[..., None]).sum(),
    )


def test_quality_focal_loss_equals_its_formula():
    quality = torch.rand(2, 7)
    target = ONE_HOT * quality[..., None]

    def formula(z):
        bce = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        return (bce * (z.sigmoid() - target).abs().pow(2) * WEIGHTS[..., None]).sum()

    assert_same(lambda z: losses.quality_focal_loss_sum(z, LABELS, quality, WEIGHTS), formula)


@pytest.mark.parametrize("beta", [1, 1.5, 2])
def test_soft_target_focal_equals_its_formula(beta):
    target = torch.rand(2, 7, 4)

    def formula(z):
        bce = F.binary_cross_entropy_with_logits(z, target, reduction="none")
        return (bce * (z.sigmoid() - target).abs().pow(beta) * WEIGHTS[..., None]).sum()

    assert_same(lambda z: losses.soft_target_focal_sum(z, target, WEIGHTS, beta), formula)


def test_soft_target_focal_is_zero_only_in_gradient_at_equal_scores():
    target = LOGITS.sigmoid()
    assert losses.soft_target_focal_sum(LOGITS, target, WEIGHTS, 1).item() == 0
    worse = losses.soft_target_focal_sum(LOGITS + 1, target, WEIGHTS, 1)
    assert worse > 0


def test_distribution_focal_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]])
    p = logits.softmax(-1)[0].log()
    found = losses.distribution_focal_loss(logits, torch.tensor([1.25]))
    assert found.item() == pytest.approx(-(0.75 * p[1] + 0.25 * p[2]).item())


def test_distribution_kl_by_hand():
    student, teacher = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0])
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    wanted = (p * (p / q).log()).sum() * 4
    torch.testing.assert_close(losses.distribution_kl(student, teacher, 2.0), wanted)
    assert losses.distribution_kl(teacher, teacher, 1.0).abs() < 1e-7


def boxes(count=20):
    low = torch.rand(count, 2) * 50
    return torch.cat((low, low + torch.rand(count, 2) * 40 + 1), 1)


def test_giou_equals_torchvision():
    one, two = boxes(), boxes()
    torch.testing.assert_close(losses.giou_loss(one, two), generalized_box_iou_loss(one, two))


def test_pairwise_and_elementwise_iou_agree():
    one, two = boxes(), boxes()
    torch.testing.assert_close(pairwise_iou(one, two).diagonal(), elementwise_iou(one, two))


def test_deltas_and_distances_invert():
    one, anchors = boxes(), boxes()
    torch.testing.assert_close(deltas_to_xyxy(xyxy_to_deltas(one, anchors), anchors), one)
    points = torch.rand(20, 2) * 60
    torch.testing.assert_close(ltrb_to_xyxy(xyxy_to_ltrb(one, points), points), one)


def test_deltas_do_not_explode():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    found = deltas_to_xyxy(torch.full((1, 4), 1e4), anchor)
    assert (found[:, 2:] - found[:, :2]).tolist() == [[1000.0, 1000.0]]


def test_distribution_expectation():
    logits = torch.full((1, 4, 5), -100.0)
    for side, peak in enumerate((0, 1, 3, 4)):
        logits[0, side, peak] = 100.0
    assert distribution_to_ltrb(logits.flatten(1), 5).tolist() == [[0, 1, 3, 4]]


def test_clip_and_resize():
    box = torch.tensor([-5.0, 2.0, 99.0, 70.0])
    assert clip_xyxy(box, (60, 80)).tolist() == [0, 2, 80, 60]
    assert keep_ratio_size((480, 640), 320, 544) == (320, 427)
    assert keep_ratio_size((100, 1000), 320, 544) == (54, 544)

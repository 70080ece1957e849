"""Single losses, coders, NMS, RoIAlign and IoU of the published code: values and gradients."""

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, nms

from detdistill.boxes import (
    clip_xyxy,
    elementwise_giou,
    elementwise_iou,
    ltrb_to_xyxy,
    pairwise_iou,
    xyxy_to_ltrb,
)
from detdistill.detectors.roi_head import RoIHead
from detdistill.distill.pkd import pattern_difference
from detdistill.parts.coders import deltas_to_xyxy, xyxy_to_deltas
from detdistill.parts.losses import (
    distribution_focal_loss,
    distribution_kl,
    focal_loss_sum,
    giou_loss,
    log_iou_loss,
    quality_focal_loss_sum,
    soft_target_focal_sum,
)
from detdistill.structures import Proposals, Pyramid

SIZE = (180, 190)  # what the published boxes are clipped to


@cache
def primitives():
    return torch.load(Path(__file__).parent / "primitives.pt", weights_only=True)


def close(found, wanted, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def ones(rows):
    return torch.ones(len(rows))


# Each takes the found tensor, the target, a weight per row and the divisor.
LOSSES = {
    "kd_qfl": lambda x, y, w, n: soft_target_focal_sum(x, y.sigmoid(), w, 1) / n,
    "kd_qfl_beta2_noweight": lambda x, y, w, n: (
        0.4 * soft_target_focal_sum(x, y.sigmoid(), w, 2) / n
    ),
    "kd_qfl_mean": lambda x, y, w, n: soft_target_focal_sum(x, y.sigmoid(), w, 1) / x.numel(),
    "kd_kl_T1_sum": lambda x, y, w, n: 4 * (distribution_kl(x, y, 1) * w).sum() / n,
    "kd_kl_T2_sum": lambda x, y, w, n: 4 * (distribution_kl(x, y, 2) * w).sum() / n,
    "kd_kl_T1_mean": lambda x, y, w, n: distribution_kl(x, y, 1).mean() / x.shape[1],
    "pkd": lambda x, y, w, n: 6 * pattern_difference(x, y),
    "qfl": lambda x, y, w, n: quality_focal_loss_sum(x, *y, w) / n,
    "dfl": lambda x, y, w, n: 0.25 * (distribution_focal_loss(x, y) * w).sum() / n,
    "focal": lambda x, y, w, n: focal_loss_sum(x, y, w) / n,
    "giou": lambda x, y, w, n: 2 * (giou_loss(x, y) * w).sum() / n,
    "giou_disjoint": lambda x, y, w, n: (giou_loss(x, y) * w).sum() / n,
    "iou_log": lambda x, y, w, n: 0.75 * (log_iou_loss(x, y) * w).sum() / n,
    # What RPN and RoI heads call.
    "l1": lambda x, y, w, n: (F.smooth_l1_loss(x, y, reduction="none", beta=0.0) * w).sum() / n,
    "softmax_ce": lambda x, y, w, n: (F.cross_entropy(x, y, reduction="none") * w).sum() / n,
    "bce_centerness": lambda x, y, w, n: (
        F.binary_cross_entropy_with_logits(x, y, reduction="sum") / n
    ),
}


def test_every_published_loss_is_compared():
    assert set(primitives()) - set(LOSSES) == {"coders", "nms", "roi_align", "iou"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name):
    case = primitives()[name]
    found, target = case["args"]
    found = found.clone().requires_grad_()
    weight = case["kwargs"].get("weight", ones(found))
    loss = LOSSES[name](found, target, weight, case["kwargs"].get("avg_factor"))
    close(loss, case["value"])
    loss.backward()
    close(found.grad, case["grad"])


def test_deltas():
    case = primitives()["coders"]["delta1"]
    close(xyxy_to_deltas(case["gt"], case["anchors"]), case["encoded"])
    decoded = deltas_to_xyxy(case["deltas"], case["anchors"])
    close(decoded, case["decoded"])
    close(clip_xyxy(decoded, SIZE), case["decoded_clip"])


def test_scaled_deltas():
    case, head = primitives()["coders"]["delta_atss"], RoIHead(1, in_channels=1, channels=1)
    scales = torch.tensor(head.delta_scales)
    close(xyxy_to_deltas(case["gt"], case["anchors"]) / scales, case["encoded"], atol=1e-4)
    decoded = head.decode(case["deltas"], case["anchors"])
    close(decoded, case["decoded"], atol=1e-4)
    close(clip_xyxy(decoded, SIZE), case["decoded_clip"], atol=1e-4)


def test_distances():
    case = primitives()["coders"]["distance"]
    decoded = ltrb_to_xyxy(case["distances"], case["points"])
    close(decoded, case["decoded"])
    close(clip_xyxy(decoded, SIZE), case["decoded_clip"])
    bins = xyxy_to_ltrb(case["gt"], case["points"]).clamp(0, 16 - 0.1)
    close(bins, case["encoded_max16"])


def test_nms():
    case = primitives()["nms"]
    assert torch.equal(nms(case["boxes"], case["scores"], 0.5), case["keep_05"])
    keep = batched_nms(case["boxes"], case["scores"], case["ids"], 0.6)
    assert torch.equal(keep, case["batched_keep_06"])
    close(torch.cat((case["boxes"], case["scores"][:, None]), 1)[keep], case["batched_dets"])


def test_roi_align():
    case = primitives()["roi_align"]
    level = case["feat"].clone().requires_grad_()
    images, boxes = case["rois"][:, 0], case["rois"][:, 1:]
    order = images.argsort(stable=True)
    boxes_xyxy = [boxes[images == i] for i in range(len(level))]
    proposals = Proposals(
        boxes_xyxy,
        [ones(b) for b in boxes_xyxy],
        [torch.zeros(len(b), 4, dtype=torch.int64) for b in boxes_xyxy],
    )
    pooled = RoIHead(1, in_channels=4, channels=1).pool(Pyramid([level], (8,)), proposals)
    close(pooled, case["out"][order])
    pooled.square().sum().backward()
    close(level.grad, case["grad"], atol=1e-4)


def test_iou():
    case = primitives()["iou"]
    close(pairwise_iou(case["a"], case["b"]), case["pair"])
    close(elementwise_iou(case["a"], case["b"]), case["aligned"])
    close(elementwise_giou(case["a"], case["b"]), case["giou"])

"""Which anchor learns which ground-truth box, for the whole batch at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detdistill.boxes import (
    area,
    centers_xy,
    elementwise_iou,
    pairwise_center_penalty,
    pairwise_iou,
    xyxy_to_ltrb,
)
from detdistill.structures import Targets

BACKGROUND = -1
IGNORED = -2


def assign_max_iou(
    anchors: Tensor,
    valid: Tensor,
    targets: Targets,
    *,
    positive: float = 0.5,
    negative: float = 0.4,
    forced: float | None = 0.0,
) -> Tensor:
    """RetinaNet's rule (arXiv 1708.02002 section 4), with MMDetection's low-quality matches.

    Anchors with IoU >= `positive` learn their best box, below `negative` they are background,
    between they are ignored. Each box also takes every anchor that equals its best IoU; a later
    box wins. Unlike the published code a box that touches no anchor takes none. Equal anchors tie
    exactly, so the last bit of the IoU may decide how many match.

    Args:
        anchors: (P, 4) xyxy pixels, or (B, P, 4) where every image has its own.
        valid: (B, P) bool; others are ignored and take no part.
        targets: the ground truth, at least one slot per image.
        positive: least IoU of a positive.
        negative: IoU below which an anchor is background.
        forced: least IoU of the anchors that a box takes because none is better; None for none.

    Returns:
        (B, P) int64: index of the matched box, `BACKGROUND` or `IGNORED`.
    """
    iou = pairwise_iou(targets.boxes, anchors)
    possible = targets.present[:, :, None] & valid[:, None, :]
    iou = iou.masked_fill(~possible, -1)
    best, matched = iou.max(1)
    matched = torch.where(best >= positive, matched, IGNORED)
    matched = torch.where(best < negative, BACKGROUND, matched)
    if forced is not None:
        best_of_box = iou.amax(2, keepdim=True)
        takes = (iou == best_of_box) & (best_of_box > 0) & (best_of_box >= forced)
        slots = torch.arange(iou.shape[1], device=iou.device)[None, :, None]
        last = torch.where(takes, slots, -1).amax(1)
        matched = torch.where(last >= 0, last, matched)
    return torch.where(valid, matched, IGNORED)


def take_matches(
    matched: Tensor, targets: Targets, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the anchors of a match (B, P) learn.

    Returns:
        (B, P) bool: positives; (B, P) int64 labels, `num_classes` for the rest; (B, P, 4) boxes,
        zeros for the rest.
    """
    positive = matched >= 0
    index = matched.clamp(min=0)
    labels = torch.where(positive, targets.labels.gather(1, index), num_classes)
    boxes = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return positive, labels, boxes * positive[..., None]


def assign_atss(
    anchors: Sequence[Tensor], valid: Tensor, targets: Targets, *, top_k: int = 9
) -> Tensor:
    """Adaptive training sample selection (arXiv 1912.02424, algorithm 1).

    Args:
        anchors: per level (H*W, 4) xyxy pixels, one anchor per location.
        valid: (B, P) bool; others are ignored and never among the candidates.
        targets: the ground truth, at least one slot per image.
        top_k: candidates per box and level.

    Returns:
        (B, P) int64: index of the matched box, `BACKGROUND` or `IGNORED`.
    """
    found = _atss_candidates(anchors, valid, targets, top_k)
    boxes, points = targets.boxes[:, :, None], centers_xy(found.boxes_xyxy)
    inside = xyxy_to_ltrb(boxes, points).amin(-1) > 0.01
    good = found.usable & inside & (found.iou >= found.threshold) & targets.present[:, :, None]
    # An anchor wanted by several boxes goes to the one it overlaps most.
    table = found.iou.new_full((*good.shape[:2], valid.shape[1]), -1.0)
    table.scatter_(2, found.index, torch.where(good, found.iou, -1.0))
    best, matched = table.max(1)
    matched = torch.where(best >= 0, matched, BACKGROUND)
    return torch.where(valid, matched, IGNORED)


def possible_iou(anchors: Tensor, valid: Tensor, targets: Targets) -> Tensor:
    """IoU (B, N, P) of each box with anchors (P, 4); 0 where the slot or the anchor is padding."""
    iou = pairwise_iou(targets.boxes, anchors)
    return iou.masked_fill(~(targets.present[:, :, None] & valid[:, None]), 0)


def valuable_region(
    anchors: Sequence[Tensor],
    valid: Tensor,
    targets: Targets,
    iou: Tensor,
    *,
    gamma: float = 0.25,
    top_k: int = 9,
) -> Tensor:
    """LD's valuable localization region (arXiv 2102.12252): anchors that are nearly positive.

    With t the IoU from which ATSS takes a candidate of a box, an anchor is in the region of that
    box where gamma * t <= DIoU < t. Its centre may lie anywhere, and it may be positive.

    Args:
        anchors: per level (H*W, 4) xyxy pixels, one anchor per location.
        valid: (B, P) bool; others are never in a region.
        targets: the ground truth, at least one slot per image.
        iou: (B, N, P) of `possible_iou`.
        gamma: share of t at which the region begins, 0..1.
        top_k: candidates per box and level, of which t is made.

    Returns:
        (B, P) the greatest IoU with a box in whose region the anchor is, 0 where in none.
    """
    threshold = _atss_candidates(anchors, valid, targets, top_k).threshold
    diou = iou - pairwise_center_penalty(targets.boxes, torch.cat(list(anchors)))
    inside = (diou >= gamma * threshold) & (diou < threshold)
    return torch.where(inside, iou, 0).amax(1)  # the IoU of padding is 0 already


def imitation_region(iou: Tensor, *, share: float = 0.5) -> Tensor:
    """FGFI's region (arXiv 1906.03609): anchors near the best one of some box.

    Args:
        iou: (B, N, P) of `possible_iou`.
        share: of the best IoU of a box, above which an anchor is near it.

    Returns:
        (B, P) bool.
    """
    return (iou > share * iou.amax(2, keepdim=True)).any(1)


def assign_points(
    points: Sequence[Tensor],
    targets: Targets,
    *,
    strides: Sequence[int],
    ranges: Sequence[tuple[float, float]],
    radius: float | None = None,
) -> Tensor:
    """FCOS's rule (arXiv 1904.01355 section 3.2): inside a box whose size suits the level.

    A point learns the smallest box that it lies in and whose farthest side is within the range of
    the point's level.

    Args:
        points: per level (H*W, 2) pixels.
        targets: the ground truth, at least one slot per image.
        strides: of the levels.
        ranges: least and greatest distance to the farthest side per level, pixels, both included.
        radius: centre sampling: only points within so many strides of the box's centre, both
            ways, count; None takes the whole box.

    Returns:
        (B, P) int64: index of the matched box or `BACKGROUND`.
    """
    smallest = [
        _fitting_areas(level, targets, stride, low_high, radius)
        for level, stride, low_high in zip(points, strides, ranges, strict=True)
    ]
    areas, matched = torch.cat(smallest, -1).min(1)
    return torch.where(areas.isfinite(), matched, BACKGROUND)


def assign_nearest_point(
    points: Sequence[Tensor],
    valid: Tensor,
    targets: Targets,
    *,
    strides: Sequence[int],
    scale: float = 4.0,
) -> Tensor:
    """RepPoints' rule (arXiv 1904.11490 section 4.2): one point of one level per box.

    The box's level is log2 of the mean of its sides in units of `scale`, the point the nearest to
    its centre, measured in sides of the box. A point that several boxes want learns the one whose
    centre is nearest, the earlier one where equal.

    Args:
        points: per level (H*W, 2) pixels.
        valid: (B, P) bool; others are ignored and never the nearest.
        targets: the ground truth, at least one slot per image.
        strides: of the levels.
        scale: side of a box that suits a stride of 1.

    Returns:
        (B, P) int64: index of the matched box, `BACKGROUND` or `IGNORED`.
    """
    boxes = targets.boxes[:, :, None]  # (B, N, 1, 4)
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6)
    # Published: the geometric mean of the sides, rounded towards zero after the logarithm.
    level_of_box = (sides / scale).log2().mean(-1).trunc()
    levels = [math.log2(stride) for stride in strides]
    level_of_box = level_of_box.clamp(min(levels), max(levels))
    level_of_point = torch.cat(
        [boxes.new_full((len(p),), n) for p, n in zip(points, levels, strict=True)]
    )
    allowed = valid[:, None] & targets.present[:, :, None] & (level_of_box == level_of_point)
    distance = ((torch.cat(list(points)) - centers_xy(boxes)) / sides).norm(dim=-1)
    near, index = distance.masked_fill(~allowed, torch.inf).min(-1, keepdim=True)
    wanted = torch.full_like(distance, torch.inf).scatter_(2, index, near)
    best, matched = wanted.min(1)
    matched = torch.where(best.isfinite(), matched, BACKGROUND)
    return torch.where(valid, matched, IGNORED)


def _fitting_areas(
    points: Tensor,
    targets: Targets,
    stride: int,
    low_high: tuple[float, float],
    radius: float | None,
) -> Tensor:
    """Areas (B, N, P) of the boxes that points (P, 2) of a level may learn, infinite elsewhere."""
    boxes = targets.boxes[:, :, None]
    ltrb = xyxy_to_ltrb(boxes, points)
    farthest = ltrb.amax(-1)
    inside = ltrb.amin(-1) > 0
    if radius is not None:
        away = (points - centers_xy(boxes)).abs().amax(-1)
        inside &= away < radius * stride
    fits = inside & (farthest >= low_high[0]) & (farthest <= low_high[1])
    return torch.where(fits & targets.present[:, :, None], area(boxes), torch.inf)


@dataclass(frozen=True)
class _Candidates:
    """The nearest anchors of every box, and from which IoU on ATSS takes them.

    Attributes:
        index: (B, N, T) int64, 0..P-1.
        boxes_xyxy: (B, N, T, 4) pixels.
        usable: (B, N, T) bool: which are valid anchors.
        iou: (B, N, T) with the box.
        threshold: (B, N, 1) mean plus unbiased deviation of the usable IoUs; 0 without any.
    """

    index: Tensor
    boxes_xyxy: Tensor
    usable: Tensor
    iou: Tensor
    threshold: Tensor


def _atss_candidates(
    anchors: Sequence[Tensor], valid: Tensor, targets: Targets, top_k: int
) -> _Candidates:
    index, usable = _nearest_per_level(anchors, valid, targets, top_k)
    chosen = torch.cat(list(anchors))[index]
    iou = elementwise_iou(targets.boxes[:, :, None], chosen)
    count = usable.sum(-1, keepdim=True)
    mean = (iou * usable).sum(-1, keepdim=True) / count.clamp(min=1)
    variance = ((iou - mean).square() * usable).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return _Candidates(index, chosen, usable, iou, mean + variance.sqrt())


def _nearest_per_level(
    anchors: Sequence[Tensor], valid: Tensor, targets: Targets, top_k: int
) -> tuple[Tensor, Tensor]:
    """Indices (B, N, T) of the nearest anchors per level and which of them are valid."""
    indices, usable, start = [], [], 0
    centers = centers_xy(targets.boxes)
    for level in anchors:
        end = start + len(level)
        distance = (centers[:, :, None] - centers_xy(level)[None, None]).square().sum(-1).sqrt()
        distance = distance.masked_fill(~valid[:, None, start:end], torch.inf)
        near, index = distance.topk(min(top_k, len(level)), dim=-1, largest=False)
        indices.append(index + start)
        usable.append(near.isfinite())
        start = end
    return torch.cat(indices, -1), torch.cat(usable, -1)

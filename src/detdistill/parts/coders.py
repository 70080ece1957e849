"""Between a head's own box encodings and boxes in pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detdistill.boxes import ltrb_to_xyxy

MAX_LOG_RATIO = math.log(1000 / 16)  # a box grows or shrinks at most 62.5-fold


def deltas_to_xyxy(deltas: Tensor, anchors: Tensor) -> Tensor:
    """(..., P, 4) centre shifts and log size ratios on anchors (P, 4) to boxes (..., P, 4)."""
    sizes = anchors[..., 2:] - anchors[..., :2]
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2 + deltas[..., :2] * sizes
    half = sizes * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat((centers - half, centers + half), -1)


def xyxy_to_deltas(boxes_xyxy: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `deltas_to_xyxy` for boxes (..., 4) with positive sizes."""
    sizes = anchors[..., 2:] - anchors[..., :2]
    box_sizes = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    shift = (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:] - anchors[..., :2] - anchors[..., 2:]) / 2
    return torch.cat((shift / sizes, (box_sizes / sizes).log()), -1)


def distribution_to_ltrb(distribution: Tensor, bins: int) -> Tensor:
    """(..., 4*bins) logits over 0..bins-1 to expected distances (..., 4), in bins (GFL eq. 5)."""
    probabilities = distribution.reshape(*distribution.shape[:-1], 4, bins).softmax(-1)
    values = torch.arange(bins, dtype=probabilities.dtype, device=distribution.device)
    return torch.sum(probabilities * values, -1)  # no matrix product: autocast would round it


def distribution_to_xyxy(
    distribution: Tensor, points: Tensor, strides: Tensor, bins: int
) -> Tensor:
    """(..., P, 4*bins) around points (P, 2), one bin being one stride (P, 1), to boxes."""
    return ltrb_to_xyxy(distribution_to_ltrb(distribution, bins) * strides, points)


def points_to_xyxy(points_yx: Tensor, centers: Tensor, log_factors: Tensor) -> Tensor:
    """RepPoints' moment rule (arXiv 1904.11490 eq. 6) from points to boxes (..., P, 4), pixels.

    The box's centre is the mean of the points, its half sides are their deviations times learned
    factors.

    Args:
        points_yx: (..., P, 2*n) y and x of n points, relative to `centers`.
        centers: (P, 2) x and y.
        log_factors: (2,) logarithms for width and height.
    """
    points_xy = torch.stack((points_yx[..., 1::2], points_yx[..., 0::2]), -1)
    middle = points_xy.mean(-2)
    variance = (points_xy - middle[..., None, :]).square().sum(-2) / (points_xy.shape[-2] - 1)
    # Points that coincide have no finite gradient of their deviation.
    half = variance.clamp(min=1e-12).sqrt() * log_factors.exp()
    return torch.cat((middle + centers - half, middle + centers + half), -1)

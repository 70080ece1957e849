"""Box geometry. Every function names its formats; boxes are pixels unless said otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """IoU of every box with every other: (..., N, 4) and (..., P, 4) to (..., N, P), 0..1."""
    low = torch.maximum(boxes_xyxy[..., :, None, :2], others_xyxy[..., None, :, :2])
    high = torch.minimum(boxes_xyxy[..., :, None, 2:], others_xyxy[..., None, :, 2:])
    overlap = (high - low).clamp_(min=0).prod(-1)
    union = area(boxes_xyxy)[..., :, None] + area(others_xyxy)[..., None, :] - overlap
    return overlap / union.clamp_(min=1e-6)


def pairwise_center_penalty(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """What DIoU (arXiv 1911.08287) takes off the IoU of every box with every other.

    Squared distance of the centres over the squared diagonal of the smallest box around both:
    (..., N, 4) and (..., P, 4) to (..., N, P), 0..1.
    """
    low = torch.minimum(boxes_xyxy[..., :, None, :2], others_xyxy[..., None, :, :2])
    high = torch.maximum(boxes_xyxy[..., :, None, 2:], others_xyxy[..., None, :, 2:])
    diagonal = (high - low).square_().sum(-1)
    away = centers_xy(boxes_xyxy)[..., :, None, :] - centers_xy(others_xyxy)[..., None, :, :]
    return away.square_().sum(-1) / diagonal.clamp_(min=1e-6)


def area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) to (...), pixels squared."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def has_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) to (...) bool: False for what clipping leaves of a box beyond the image."""
    return (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(-1)


def elementwise_iou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """IoU of box i with other i: two (..., 4) to (...), 0..1; differentiable."""
    overlap, union = _overlap_and_union(boxes_xyxy, others_xyxy)
    return overlap / union


def elementwise_giou(boxes_xyxy: Tensor, others_xyxy: Tensor) -> Tensor:
    """Generalised IoU of box i with other i: two (..., 4) to (...), -1..1; differentiable."""
    overlap, union = _overlap_and_union(boxes_xyxy, others_xyxy)
    low = torch.minimum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    high = torch.maximum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1).clamp(min=1e-6)
    return overlap / union - (hull - union) / hull


def _overlap_and_union(boxes_xyxy: Tensor, others_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(boxes_xyxy[..., :2], others_xyxy[..., :2])
    high = torch.minimum(boxes_xyxy[..., 2:], others_xyxy[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = area(boxes_xyxy) + area(others_xyxy) - overlap
    return overlap, union.clamp(min=1e-6)


def centers_xy(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) to the centre points (..., 2)."""
    return (boxes_xyxy[..., :2] + boxes_xyxy[..., 2:]) / 2


def ltrb_to_xyxy(ltrb: Tensor, points: Tensor) -> Tensor:
    """Distances to left, top, right, bottom (..., 4) around points (..., 2) to boxes."""
    return torch.cat((points - ltrb[..., :2], points + ltrb[..., 2:]), -1)


def xyxy_to_ltrb(boxes_xyxy: Tensor, points: Tensor) -> Tensor:
    """Boxes (..., 4) to their distances from points (..., 2); negative where a point is outside."""
    return torch.cat((points - boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - points), -1)


def centerness(boxes_xyxy: Tensor, points: Tensor) -> Tensor:
    """Centrality of points (..., 2) inside boxes (..., 4): (...), 0 at a side, 1 at the centre."""
    ltrb = xyxy_to_ltrb(boxes_xyxy, points)
    near = torch.minimum(ltrb[..., :2], ltrb[..., 2:])
    far = torch.maximum(ltrb[..., :2], ltrb[..., 2:])
    return (near / far).prod(-1).sqrt()  # FCOS (arXiv 1904.01355) eq. 3


def clip_xyxy(boxes_xyxy: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) clipped to an image of (h, w) pixels."""
    height, width = size
    x = boxes_xyxy[..., 0::2].clamp(0, width)
    y = boxes_xyxy[..., 1::2].clamp(0, height)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def keep_ratio_size(size: tuple[int, int], short: float, long: float) -> tuple[int, int]:
    """(h, w) scaled so that the short side is `short` unless the long side would pass `long`."""
    height, width = size
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

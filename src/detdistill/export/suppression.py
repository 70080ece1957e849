"""Class-wise NMS as one operation, which PyTorch traces and ONNX has a node for."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


@torch.library.custom_op("detdistill::survivors", mutates_args=())
def survivors(boxes_xyxy: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """Which boxes NMS leaves.

    Args:
        boxes_xyxy: (B, M, 4) pixels.
        scores: (B, K, M), above 0 in at most one class of each box.
        iou: above which the weaker of two boxes of a class goes.
        most: how many boxes of a class stay at most.

    Returns:
        (B, M) float32: 1 for the boxes that stay, 0 for others.
    """
    kept = torch.zeros_like(boxes_xyxy[..., 0])
    for image, image_scores in enumerate(scores):
        for of_class in image_scores:
            candidates = (of_class > 0).nonzero()[:, 0]
            stay = nms(boxes_xyxy[image, candidates], of_class[candidates], iou)[:most]
            kept[image, candidates[stay]] = 1
    return kept


@survivors.register_fake
def _(boxes_xyxy: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    return torch.empty_like(boxes_xyxy[..., 0])

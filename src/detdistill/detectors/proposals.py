"""From the output of a dense head to proposals: any dense head can serve as an RPN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from detdistill.boxes import clip_xyxy
from detdistill.structures import DenseOutput, Proposals

NMS_THRESHOLD = 0.7


class Decoder(Protocol):
    """A dense head, as far as proposals need it."""

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Encodings (..., P, D) on anchors (..., P, 4) to boxes (..., P, 4)."""


@torch.no_grad()
def propose(
    head: Decoder,
    output: DenseOutput,
    sizes: Sequence[tuple[int, int]],
    *,
    per_level: int = 2000,
    max_per_image: int = 1000,
    nms_threshold: float = NMS_THRESHOLD,
    min_size: float = 0.0,
) -> Proposals:
    """The boxes most likely to hold an object, of whatever class; without gradient.

    A box counts as much as its best class (HEAD, arXiv 2207.05345; published code); a quality
    branch does not count. NMS runs within each level.

    Args:
        head: decodes the boxes.
        output: what the head predicted.
        sizes: (h, w) of each image in pixels; boxes are clipped to them.
        per_level: best boxes of a level that go into NMS.
        max_per_image: best boxes of an image that come out.
        nms_threshold: IoU above which the weaker of two boxes goes.
        min_size: boxes whose width or height is not above it are dropped, pixels.
    """
    levels = [
        _best_of_level(head, output, level, per_level) for level in range(len(output.anchors))
    ]
    boxes, scores, origin = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
    chosen: tuple[list[Tensor], ...] = ([], [], [])
    for image, size in enumerate(sizes):
        clipped = clip_xyxy(boxes[image], size)
        large = (clipped[:, 2:] - clipped[:, :2] > min_size).all(1)
        parts = (clipped[large], scores[image][large], origin[image][large])
        keep = batched_nms(*parts[:2], parts[2][:, 0], nms_threshold)[:max_per_image]
        for found, part in zip(chosen, parts, strict=True):
            found.append(part[keep])
    return Proposals(*chosen)


def _best_of_level(
    head: Decoder, output: DenseOutput, level: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, k, 4), scores (B, k) and origins (B, k, 4) of the best places, best first."""
    # Logits rank where the scores of float32 have long reached 1.
    objectness = output.predictions.logits[level].amax(2).permute(0, 2, 3, 1)  # (B, H, W, A)
    _, _, width, per_location = objectness.shape
    flat = objectness.flatten(1).float()
    logits, index = flat.topk(min(count, flat.shape[1]), 1)
    cell, anchor = index // per_location, index % per_location
    y, x = cell // width, cell % width
    images = torch.arange(len(index), device=index.device)[:, None]
    encodings = output.predictions.boxes[level][images, anchor, :, y, x].float()
    boxes = head.decode(encodings, output.anchors[level][index])
    origin = torch.stack((torch.full_like(y, level), y, x, anchor), -1)
    return boxes, logits.sigmoid(), origin

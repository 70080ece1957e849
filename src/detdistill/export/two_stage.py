"""The graph of two-stage detectors: proposals in a fixed number of slots, then their RoI heads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from detdistill.boxes import has_area
from detdistill.detectors.proposals import NMS_THRESHOLD as PROPOSAL_NMS
from detdistill.detectors.roi_head import (
    LEVELS,
    NMS_THRESHOLD,
    POOLED,
    RoIHead,
    pool_level,
    pooling_level,
)
from detdistill.detectors.two_stage import TEST_PER_LEVEL, TwoStageDetector
from detdistill.export.graph import MAX_DETECTIONS, FinalGraph, clip_to_sizes, rows_at
from detdistill.export.suppression import survivors
from detdistill.structures import DenseOutput, Pyramid


class TwoStageGraph(FinalGraph):
    """What `TwoStageDetector.detect` finds. Slots without a proposal count as score 0."""

    detector: TwoStageDetector

    def __init__(
        self, detector: TwoStageDetector, size: tuple[int, int], dtype: torch.dtype = torch.uint8
    ) -> None:
        """Takes over the detector."""
        super().__init__(detector, detector.rpn, size, dtype)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The slots."""
        output = self.predictions(images, sizes)
        boxes, present = self._proposals(output, sizes)
        heads: list[RoIHead] = list(self.detector.roi_heads)  # type: ignore[arg-type]
        logits, deltas = _look(heads[0], output.pyramid, boxes)
        summed = logits
        for head, after in pairwise(heads):
            boxes = clip_to_sizes(head.decode(deltas, boxes), sizes)
            logits, deltas = _look(after, output.pyramid, boxes)
            summed = summed + logits
        scores = (summed / len(heads)).softmax(-1)[..., :-1] * present[..., None]
        return self._detections(heads[-1], boxes, deltas, scores, sizes)

    def _proposals(self, output: DenseOutput, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """`TwoStageDetector.propose`: boxes (B, R, 4), and which of them are some (B, R)."""
        rpn, parts = self.detector.rpn, []
        for logits, maps, anchors in zip(
            output.predictions.logits, output.predictions.boxes, output.anchors, strict=True
        ):
            objectness = logits[:, :, 0].permute(0, 2, 3, 1).flatten(1)
            best, index = objectness.topk(min(TEST_PER_LEVEL, objectness.shape[1]))
            encodings = maps.permute(0, 3, 4, 1, 2).flatten(1, 3)
            boxes = rpn.decode(rows_at(encodings, index), anchors[index])
            boxes = clip_to_sizes(boxes, sizes)
            # Sigmoids would be 0 for many, and such a proposal still counts.
            ranks = torch.arange(best.shape[1], 0, -1) * has_area(boxes).float()
            kept = survivors(boxes, ranks[:, None], PROPOSAL_NMS, best.shape[1])
            parts.append((boxes, torch.where(kept > 0, best, -torch.inf)))
        boxes, scores = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        best, index = scores.topk(min(self.detector.test_proposals, scores.shape[1]))
        return rows_at(boxes, index), best > -torch.inf

    def _detections(
        self, head: RoIHead, boxes: Tensor, deltas: Tensor, scores: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        """`RoIHead.detect`: NMS of each class on boxes of its own."""
        images, number, classes = scores.shape
        each = deltas.reshape(images, number, -1, 4).expand(-1, -1, classes, -1)
        found = head.decode(each, boxes[:, :, None]).transpose(1, 2).flatten(1, 2)
        found = clip_to_sizes(found, sizes)
        flat = scores.transpose(1, 2).flatten(1)
        flat = torch.where(has_area(found) & (flat > self.score_threshold), flat, 0.0)
        kept = survivors(
            found.reshape(-1, number, 4), flat.reshape(-1, 1, number), NMS_THRESHOLD, MAX_DETECTIONS
        )
        labels = torch.arange(classes).repeat_interleave(number).expand(images, -1)
        return self.best(found, flat * kept.reshape(-1, classes * number), labels)


def _look(head: RoIHead, pyramid: Pyramid, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, R, K + 1) and deltas (B, R, 4 or 4 * K) of boxes (B, R, 4)."""
    image = torch.arange(boxes.shape[0])[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat((image.to(boxes), boxes), -1).flatten(0, 1)
    levels, strides = pyramid.levels[:LEVELS], pyramid.strides[:LEVELS]
    level_of_box = pooling_level(rois[:, 1:], len(levels))
    features = head.shared_features(pooled(list(levels), rois, level_of_box, list(strides)))[-1]
    logits, deltas = head.logits(features), head.deltas(features)
    shape = *boxes.shape[:2], -1
    return logits.reshape(shape).float(), deltas.reshape(shape)


@torch.library.custom_op("detdistill::pooled", mutates_args=())
def pooled(
    levels: list[Tensor], rois: Tensor, level_of_box: Tensor, strides: Sequence[int]
) -> Tensor:
    """RoIAlign, each box on its level, as one operation, since each level has any number of them.

    Args:
        levels: (B, C, H, W) of each level.
        rois: (R, 5) image and corners.
        level_of_box: (R,) int64.
        strides: of the levels.

    Returns:
        (R, C, 7, 7) float32.
    """
    out = rois.new_zeros((len(rois), levels[0].shape[1], POOLED, POOLED))
    for i, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        own = level_of_box == i
        out[own] = pool_level(level, stride, rois[own])
    return out


@pooled.register_fake
def _(levels: list[Tensor], rois: Tensor, level_of_box: Tensor, strides: Sequence[int]) -> Tensor:
    return rois.new_empty((rois.shape[0], levels[0].shape[1], POOLED, POOLED))

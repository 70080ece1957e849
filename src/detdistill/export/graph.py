"""What the exported graph computes: the detector's own stages, for a whole batch at once.

A file of ONNX has no Python: no loop over the images of a batch whose number is open, and no sizes
but tensors. Normalisation and clipping are written that way here; all else is called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detdistill.boxes import has_area
from detdistill.detectors import DenseDetector, FPNDetector
from detdistill.detectors.inference import BEST_PER_LEVEL
from detdistill.detectors.rpn import RPN
from detdistill.export.suppression import survivors
from detdistill.structures import DenseOutput, Pyramid, flatten_maps

SCORE_THRESHOLD, MAX_DETECTIONS = 0.05, 100  # as `predict`
NOTHING = -1
"""Label of a slot that holds no detection."""


class _FixedAnchors:
    """The anchors of one input size: tracing would leave its stand-ins in the caches of a grid."""

    def __init__(self, anchors: list[Tensor], per_location: int) -> None:
        self.anchors, self.per_location = anchors, per_location

    def __call__(self, pyramid: Pyramid) -> list[Tensor]:
        return self.anchors


class Graph(nn.Module):
    """From pixels to what a dense head predicts, for images of one type and size alone.

    Args:
        detector: is taken over.
        anchored: the detector, or its RPN.
        size: (h, w) pixels to which images are padded.
        dtype: of the images.
    """

    outputs: tuple[str, ...]

    def __init__(
        self,
        detector: FPNDetector,
        anchored: DenseDetector | RPN,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """Fixes the anchors."""
        super().__init__()
        self.detector, self.size, self.dtype = detector, size, dtype
        with torch.no_grad():
            pyramid = detector.pyramid(torch.zeros(1, 3, *size))
        anchors = [level.clone() for level in anchored.grid(pyramid)]
        anchored.grid = _FixedAnchors(anchors, anchored.grid.per_location)  # type: ignore[assignment]

    def predictions(self, images: Tensor, sizes: Tensor) -> DenseOutput:
        """What the detector predicts, whatever the padding holds.

        Args:
            images: (B, 3, H, W) RGB, 0..255, padded at the right and the bottom with anything.
            sizes: (B, 2) int64, h and w of each image before padding.
        """
        height, width = images.shape[-2:]
        below = torch.arange(height)[:, None] >= sizes[:, 0, None, None, None]
        beside = torch.arange(width) >= sizes[:, 1, None, None, None]
        pixels = torch.where(below | beside, 0.0, self.detector.own_pixels(images))
        return self.detector.head(self.detector.pyramid(pixels))


class RawGraph(Graph):
    """From pixels to every decoded box and its final scores."""

    detector: DenseDetector
    outputs = ("boxes_xyxy", "scores")

    def __init__(
        self, detector: DenseDetector, size: tuple[int, int], dtype: torch.dtype = torch.uint8
    ) -> None:
        """Takes over the detector."""
        super().__init__(detector, detector, size, dtype)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Boxes (B, P, 4), pixels of the batch, clipped; scores (B, P, K), 0..1."""
        output = self.predictions(images, sizes)
        flat = output.predictions.flatten()
        anchors = self.detector.flat_anchors(output.anchors)
        boxes = clip_to_sizes(self.detector.decode(flat.boxes, anchors), sizes)
        scores = flat.logits.sigmoid()
        if flat.quality is not None:
            scores = self.detector.with_quality(scores, flat.quality[..., None])
        return boxes, scores * has_area(boxes)[..., None]


class FinalGraph(Graph):
    """From pixels to what a detector's `detect` finds, in a fixed number of slots.

    Boxes (B, M, 4), scores (B, M) and int64 labels (B, M), best first. Slots that hold no detection
    come last, with score 0 and label `NOTHING`.
    """

    outputs = ("boxes_xyxy", "scores", "labels")
    score_threshold: Tensor

    def __init__(
        self,
        detector: FPNDetector,
        anchored: DenseDetector | RPN,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """The threshold becomes a tensor of its own in the file."""
        super().__init__(detector, anchored, size, dtype)
        self.register_buffer("score_threshold", torch.tensor(SCORE_THRESHOLD))

    def best(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The slots, from boxes (B, P, 4), scores (B, P), 0 for what NMS removed, and labels."""
        best, index = scores.topk(min(MAX_DETECTIONS, scores.shape[1]))
        found = best > 0
        return (
            torch.where(found[..., None], rows_at(boxes, index), 0.0),
            best,
            torch.where(found, labels.gather(1, index), NOTHING),
        )


class DetectionGraph(FinalGraph):
    """What `DenseDetector.detect` finds."""

    detector: DenseDetector

    def __init__(
        self, detector: DenseDetector, size: tuple[int, int], dtype: torch.dtype = torch.uint8
    ) -> None:
        """Takes over the detector."""
        super().__init__(detector, detector, size, dtype)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The slots."""
        output = self.predictions(images, sizes)
        levels = [self._best_of_level(output, level) for level in range(len(output.anchors))]
        boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*levels, strict=True))
        boxes = clip_to_sizes(boxes, sizes)
        scores = torch.where(has_area(boxes), scores, 0.0)
        classes = torch.arange(self.detector.num_classes)[:, None]
        by_class = torch.where(labels[:, None] == classes, scores[:, None], 0.0)
        kept = survivors(boxes, by_class, self.detector.nms_threshold, MAX_DETECTIONS)
        return self.best(boxes, scores * kept, labels)

    def _best_of_level(self, output: DenseOutput, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """`inference.detect_image` before NMS: boxes (B, M, 4), scores (B, M), labels (B, M).

        What does not pass the threshold has score 0.
        """
        maps, anchors = output.predictions, output.anchors[level]
        class_scores = flatten_maps([maps.logits[level]]).sigmoid()
        classes = class_scores.shape[2]
        pairs = class_scores.flatten(1)
        scores, index = pairs.topk(min(BEST_PER_LEVEL, pairs.shape[1]))
        passed = scores > self.score_threshold
        rows, labels = index // classes, index % classes
        if maps.quality is not None:
            quality = maps.quality[level].permute(0, 2, 3, 1).flatten(1).float()
            scores = self.detector.with_quality(scores, quality.gather(1, rows))
        chosen = rows_at(flatten_maps([maps.boxes[level]]), rows)
        return self.detector.decode(chosen, anchors[rows]), scores * passed, labels


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """Of each image's rows (B, P, D) those at an index (B, M): (B, M, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def clip_to_sizes(boxes_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (B, M, 4) clipped to images of (B, 2) pixels, h and w."""
    limits = sizes.flip(1).repeat(1, 2)[:, None].float()
    return boxes_xyxy.clamp(min=0).minimum(limits)

"""From the output of a dense head to final boxes, and from any image to its boxes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as image_ops

from detdistill.boxes import clip_xyxy, has_area, keep_ratio_size
from detdistill.errors import UserError, UserNotice
from detdistill.structures import Batch, DenseOutput, Detections, flatten_maps

if TYPE_CHECKING:
    from detdistill.detectors.base import FPNDetector
    from detdistill.detectors.dense import DenseDetector

BEST_PER_LEVEL = 1000


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then each module is in its own mode again, also after a failure."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def detect_image(
    detector: DenseDetector,
    output: DenseOutput,
    image: int,
    size: tuple[int, int],
    score_threshold: float,
    max_detections: int,
) -> Detections:
    """What `DenseDetector.detect` says, for one image of the batch, (h, w) pixels large."""
    found = output.predictions
    qualities: Sequence[Tensor | None] = found.quality or [None] * len(found.logits)
    boxes, scores, labels = [], [], []
    for logits, encodings, quality, anchors in zip(
        found.logits, found.boxes, qualities, output.anchors, strict=True
    ):
        level_scores = flatten_maps([logits[image, None]])[0].sigmoid()
        rows, classes = (level_scores > score_threshold).nonzero(as_tuple=True)
        kept, order = level_scores[rows, classes].sort(descending=True, stable=True)
        kept, order = kept[:BEST_PER_LEVEL], order[:BEST_PER_LEVEL]
        rows, classes = rows[order], classes[order]
        if quality is not None:
            of_rows = quality[image].permute(1, 2, 0).flatten()[rows].float()
            kept = detector.with_quality(kept, of_rows)
        chosen = flatten_maps([encodings[image, None]])[0, rows]
        boxes.append(clip_xyxy(detector.decode(chosen, anchors[rows]), size))
        scores.append(kept)
        labels.append(classes)
    parts = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    return best_boxes(*parts, detector.nms_threshold, max_detections)


def best_boxes(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, nms_threshold: float, max_detections: int
) -> Detections:
    """The best of clipped boxes (M, 4) after class-wise NMS."""
    # A box beyond the image has no area left; NMS would never suppress it.
    seen = has_area(boxes_xyxy)
    boxes_xyxy, scores, labels = (part[seen] for part in (boxes_xyxy, scores, labels))
    keep = batched_nms(boxes_xyxy, scores, labels, nms_threshold)[:max_detections]
    return Detections(boxes_xyxy[keep], scores[keep], labels[keep])


def predict_image(
    detector: FPNDetector, image: Tensor, score_threshold: float, max_detections: int
) -> Detections:
    """What `FPNDetector.predict` says, for one image (3, h, w)."""
    shape = tuple(getattr(image, "shape", ()))
    if not isinstance(image, Tensor) or len(shape) != 3 or shape[0] != 3 or 0 in shape:
        raise UserError(
            f"predict found an image that is a {type(image).__name__} of shape {shape}; expected "
            f"tensors (3, h, w), RGB, in a list or as (B, 3, h, w)"
        )
    if image.is_floating_point() and 0 < image.max() <= 1:
        warnings.warn(
            "predict found a float image without a value above 1; images are 0..255, so multiply "
            "one of 0..1 by 255",
            UserNotice,
            stacklevel=2,
        )
    height, width = int(image.shape[-2]), int(image.shape[-1])
    size = (height, width)
    if detector.input_size is not None:
        size = keep_ratio_size(size, *detector.input_size)
        image = image_ops.resize(image, list(size), antialias=True)
    batch = Batch.from_images([image]).to(next(detector.parameters()).device)
    [found] = detector.detect(
        detector(batch),
        [size],
        score_threshold=score_threshold,
        max_detections=max_detections,
    )
    return found.scaled(width / size[1], height / size[0])

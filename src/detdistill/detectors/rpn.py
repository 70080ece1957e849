"""The region proposal network (Ren et al., arXiv 1506.01497 section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.dense import DenseDetector, split_anchors
from detdistill.parts.anchors import AnchorGrid, cells_on_image
from detdistill.parts.assigners import BACKGROUND, assign_max_iou, take_matches
from detdistill.parts.coders import deltas_to_xyxy, xyxy_to_deltas
from detdistill.parts.heads import Tower, predictor
from detdistill.parts.losses import Reduce, mean_over_processes
from detdistill.parts.samplers import sample_balanced
from detdistill.structures import Assignment, DenseOutput, Predictions, Pyramid, Targets

ANCHOR_SCALE = 8
RATIOS = (0.5, 1.0, 2.0)
IOU_POSITIVE, IOU_NEGATIVE = 0.7, 0.3
SAMPLES, POSITIVE_FRACTION = 256, 0.5


class RPN(nn.Module):
    """A dense head with the one class "object": a shared convolution, three anchors per location.

    Args:
        channels: of the pyramid and of the convolution.
        box_beta: where the smooth L1 loss of the deltas turns linear; 0 is L1.
        crossing: whether anchors that cross the border of their image learn.
        reduce: whether normalisers are averaged over processes ("global") or not ("local").
    """

    def __init__(
        self,
        channels: int,
        *,
        box_beta: float = 0.0,
        crossing: bool = True,
        reduce: Reduce = "local",
    ) -> None:
        """All convolutions start from N(0, 0.01)."""
        super().__init__()
        self.box_beta, self.crossing, self.reduce = box_beta, crossing, reduce
        self.grid = AnchorGrid([ANCHOR_SCALE], RATIOS)
        self.tower = Tower(channels, channels, 1, group_norm=False)
        self.logits = predictor(channels, self.grid.per_location, kernel=1)
        self.deltas = predictor(channels, self.grid.per_location * 4, kernel=1)

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """Predictions and anchors; its only tower is called "shared"."""
        logits, boxes, kept = [], [], []
        for level in pyramid:
            end, maps = self.tower(level, keep_pre_activation)
            logits.append(split_anchors(self.logits(end), self.grid.per_location))
            boxes.append(split_anchors(self.deltas(end), self.grid.per_location))
            kept.append(maps)
        anchors = self.grid(pyramid)
        return DenseOutput(Predictions(logits, boxes), {"shared": kept}, anchors, pyramid)

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., P, 4) to boxes (..., P, 4)."""
        return deltas_to_xyxy(boxes, anchors)

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment:
        """A random 256 anchors per image, at most half of them positive.

        `weights` is 1 for the sampled ones, `positive` and `matched` speak of those alone, and
        `num_positive` counts them all, negatives too, as published.
        """
        objects = replace(targets, labels=targets.labels.clamp(max=0))
        matched = self.match(output, targets)
        sampled = sample_balanced(
            matched >= 0,
            matched == BACKGROUND,
            count=SAMPLES,
            positive_fraction=POSITIVE_FRACTION,
        )
        matched = torch.where(sampled, matched, BACKGROUND)
        positive, labels, boxes = take_matches(matched, objects, 1)
        counts = [part.sum(1).clamp(min=1) for part in (positive, sampled & ~positive)]
        return Assignment(
            labels=labels,
            weights=sampled.float(),
            positive=positive,
            boxes=boxes,
            matched=matched,
            num_positive=mean_over_processes(torch.cat(counts).sum().float(), self.reduce),
        )

    def match(self, output: DenseOutput, targets: Targets) -> Tensor:
        """(B, P) int64: which object each anchor is given before any are drawn, as in `assign`."""
        anchors = DenseDetector.flat_anchors(output.anchors)
        valid = cells_on_image(output.pyramid, targets.sizes, self.grid.per_location)
        if not self.crossing:
            valid &= _inside(anchors, targets.sizes)
        return assign_max_iou(
            anchors,
            valid,
            targets,
            positive=IOU_POSITIVE,
            negative=IOU_NEGATIVE,
            forced=IOU_NEGATIVE,
        )

    def loss(self, output: DenseOutput, assignment: Assignment) -> dict[str, Tensor]:
        """Raw terms `cls`, BCE, and `box`, L1 on deltas; both over the sampled anchors."""
        flat = output.predictions.flatten()
        sampled = assignment.weights > 0
        cls = F.binary_cross_entropy_with_logits(
            flat.logits[sampled][:, 0], assignment.positive[sampled].float(), reduction="sum"
        )
        image, row = assignment.positive.nonzero(as_tuple=True)
        anchors = DenseDetector.flat_anchors(output.anchors)[row]
        wanted = xyxy_to_deltas(assignment.boxes[image, row], anchors)
        found = flat.boxes[image, row]
        box = F.smooth_l1_loss(found, wanted, reduction="sum", beta=self.box_beta)
        return {
            "cls": cls / assignment.num_positive,
            "box": (box + flat.boxes.sum() * 0) / assignment.num_positive,
        }


def _inside(anchors: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, P) bool: anchors (P, 4) that lie in images of (h, w) pixels."""
    far = anchors.new_tensor([[width, height] for height, width in sizes])
    return (anchors[:, :2] >= 0).all(1) & (anchors[None, :, 2:] < far[:, None]).all(2)

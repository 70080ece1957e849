"""GFL, generalized focal loss (Li et al., arXiv 2006.04388) as MMDetection trains it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from detdistill.boxes import centers_xy, elementwise_iou, xyxy_to_ltrb
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.registry import register_detector
from detdistill.parts.anchors import AnchorGrid
from detdistill.parts.assigners import assign_atss
from detdistill.parts.coders import distribution_to_xyxy
from detdistill.parts.fpn import ExtraFrom
from detdistill.parts.heads import Scale, predictor
from detdistill.parts.losses import (
    Reduce,
    distribution_focal_loss,
    giou_loss,
    mean_over_processes,
    quality_focal_loss_sum,
)
from detdistill.registry import Depth, Width
from detdistill.structures import Assignment, DenseOutput, Targets, flatten_maps

ANCHOR_SCALE = 8  # anchors are squares of 8 strides


@register_detector("gfl")
class GFL(DenseDetector):
    """One square anchor per location, scores that mean IoU, distances as distributions."""

    family = "gfl"
    box_coding = "distribution"
    loss_weights = {"cls": 1.0, "box": 2.0, "dfl": 0.25}
    nms_threshold = 0.6

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet50",
        pretrained: bool = False,
        base_channels: Width = 64,
        frozen_stages: Literal[0, 1, 2, 3, 4] = 0,
        norm_eval: bool = False,
        fpn_channels: Width = 256,
        fpn_extra: ExtraFrom = "p5",
        tower_channels: Width = 256,
        tower_depth: Depth = 4,
        group_norm: bool = True,
        reg_max: Width = 16,
        reduce: Reduce = "global",
    ) -> None:
        """Keywords are those of `DenseDetector`; `reg_max` + 1 bins per distance."""
        super().__init__(
            backbone=backbone,
            num_classes=num_classes,
            pretrained=pretrained,
            base_channels=base_channels,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            fpn_channels=fpn_channels,
            fpn_extra=fpn_extra,
            tower_channels=tower_channels,
            tower_depth=tower_depth,
            group_norm=group_norm,
            grid=AnchorGrid([ANCHOR_SCALE], [1.0]),
            reduce=reduce,
        )
        self.reg_max = reg_max
        width = self.towers["cls"].out_channels
        self.logits = predictor(width, num_classes, prior=0.01)  # type: ignore[arg-type]
        self.distributions = predictor(width, 4 * (reg_max + 1))  # type: ignore[arg-type]
        self.scales = nn.ModuleList(Scale() for _ in self.strides)

    def predict_cls(self, end: Tensor) -> Tensor:
        """Tower end to (B, K, H, W)."""
        return self.logits(end)  # type: ignore[no-any-return]

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """Tower end to (B, 4*(R+1), H, W), times the level's scale."""
        return self.scales[level](self.distributions(end))  # type: ignore[no-any-return]

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Distributions (..., P, 4*(R+1)) to boxes (..., P, 4)."""
        strides = (anchors[..., 2:3] - anchors[..., 0:1]) / ANCHOR_SCALE
        return distribution_to_xyxy(boxes, centers_xy(anchors), strides, self.reg_max + 1)

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """Adaptive training sample selection with 9 candidates per level."""
        return assign_atss(anchors, valid, targets)

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """`task/cls`: QFL; `task/box`: GIoU; `task/dfl`: DFL.

        The box terms weigh each positive by its best score, without gradient, and divide by the
        sum of those weights (at least 1).
        """
        assignment = assignment or self.assign(output, targets)
        flat = output.predictions.flatten()
        image, row = assignment.positive.nonzero(as_tuple=True)
        encodings, wanted = flat.boxes[image, row], assignment.boxes[image, row]
        anchors = self.flat_anchors(output.anchors)[row]
        found = self.decode(encodings, anchors)
        quality = _scatter_iou(found.detach(), assignment)
        cls = quality_focal_loss_sum(flat.logits, assignment.labels, quality, assignment.weights)
        weight = flat.logits.detach()[image, row].sigmoid().amax(-1)
        weight_sum = mean_over_processes(weight.sum(), self.reduce, at_least=1)
        strides = (anchors[:, 2:3] - anchors[:, 0:1]) / ANCHOR_SCALE
        distances = xyxy_to_ltrb(wanted, centers_xy(anchors)) / strides
        bins = distances.clamp(0, self.reg_max - 0.1).flatten()
        dfl = distribution_focal_loss(encodings.reshape(-1, self.reg_max + 1), bins)
        tie = flat.boxes.sum() * 0
        return self.weighted(
            {
                "cls": cls / assignment.num_positive,
                "box": (giou_loss(found, wanted) * weight).sum() / weight_sum + tie,
                # Published: the mean over the four sides, then over the weights.
                "dfl": (dfl.reshape(-1, 4).mean(1) * weight).sum() / weight_sum + tie,
            }
        )

    @torch.no_grad()
    def class_targets(self, output: DenseOutput, assignment: Assignment) -> Tensor:
        """(B, P) the IoU of each positive's own box with its object, 0 elsewhere."""
        image, row = assignment.positive.nonzero(as_tuple=True)
        encodings = flatten_maps(output.predictions.boxes)[image, row]
        found = self.decode(encodings, self.flat_anchors(output.anchors)[row])
        return _scatter_iou(found, assignment)


def _scatter_iou(found: Tensor, assignment: Assignment) -> Tensor:
    """IoU of the positives' boxes (M, 4) with their objects, as (B, P)."""
    quality = assignment.weights.new_zeros(assignment.weights.shape)
    quality[assignment.positive] = elementwise_iou(found, assignment.boxes[assignment.positive])
    return quality

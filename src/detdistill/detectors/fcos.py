"""FCOS (Tian et al., arXiv 1904.01355) as MMDetection trains it."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.boxes import centers_xy, ltrb_to_xyxy
from detdistill.detectors.centerness import CenternessDetector
from detdistill.detectors.registry import register_detector
from detdistill.parts.anchors import PointGrid
from detdistill.parts.assigners import assign_points
from detdistill.parts.fpn import ExtraFrom
from detdistill.parts.heads import Scale, predictor
from detdistill.parts.losses import Reduce, giou_loss, log_iou_loss, mean_over_processes
from detdistill.registry import Depth, Width
from detdistill.structures import Targets

RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, float("inf")))
CENTER_RADIUS = 1.5  # strides


@register_detector("fcos")
class FCOS(CenternessDetector):
    """No anchors: each point inside a box learns its distances to the sides.

    The defaults are those of the plain published detector; the improved one is
    `FCOS(group_norm=True, center_sampling=True, norm_on_bbox=True, centerness_on_reg=True,
    box_loss="giou")`.
    """

    family = "fcos"
    box_coding = "distances"
    loss_weights = {"cls": 1.0, "box": 1.0, "quality": 1.0}
    nms_threshold = 0.5
    caffe_mean = (122.7717, 115.9465, 102.9801)  # Detectron's, unlike the other families'
    suffixes = ("_gn",)
    masks_padding = False
    relu_before_extra = True
    least_centerness = 1e-6

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
        group_norm: bool = False,
        center_sampling: bool = False,
        norm_on_bbox: bool = False,
        centerness_on_reg: bool = False,
        box_loss: Literal["iou", "giou"] = "iou",
        reduce: Reduce = "global",
    ) -> None:
        """Keywords are those of `DenseDetector`, and FCOS's four later improvements."""
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
            grid=PointGrid(),
            reduce=reduce,
        )
        self.radius = CENTER_RADIUS if center_sampling else None
        self.norm_on_bbox, self.box_loss = norm_on_bbox, box_loss
        self.quality_tower = "box" if centerness_on_reg else "cls"
        self._add_predictors()

    def _add_predictors(self) -> None:
        width: int = self.towers["cls"].out_channels  # type: ignore[assignment]
        self.logits = predictor(width, self.num_classes, prior=0.01)
        self.distances = predictor(width, 4)
        self.quality = predictor(width, 1)
        self.scales = nn.ModuleList(Scale() for _ in self.strides)

    def predict_cls(self, end: Tensor) -> Tensor:
        """Tower end to (B, K, H, W)."""
        return self.logits(end)  # type: ignore[no-any-return]

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """Tower end to distances (B, 4, H, W), pixels, float32.

        In pixels while training too, where the published code stays in strides: IoU does not
        depend on the unit, and CrossKD meets equal units on both sides.
        """
        scaled = self.scales[level](self.distances(end)).float()
        if self.norm_on_bbox:
            return F.relu(scaled) * self.strides[level]
        return scaled.exp()  # type: ignore[no-any-return]

    def predict_quality(self, end: Tensor) -> Tensor:
        """End of the class or the box tower to centerness logits (B, 1, H, W)."""
        return self.quality(end)  # type: ignore[no-any-return]

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Distances (..., P, 4) to boxes (..., P, 4)."""
        return ltrb_to_xyxy(boxes, centers_xy(anchors))

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal for heads whose `assign` gives equal results on equal pyramids."""
        return *super().assignment_key, self.radius

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """The smallest box that a point lies in and that suits its level."""
        points = [centers_xy(level) for level in anchors]
        return assign_points(
            points, targets, strides=self.strides, ranges=RANGES, radius=self.radius
        )

    def count_positive(self, positive: Tensor) -> Tensor:
        """Positives of the batch, at least 1 in all."""
        return mean_over_processes(positive.sum().float(), self.reduce, at_least=1)

    def box_losses(self, boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
        """-log IoU, or GIoU."""
        loss = giou_loss if self.box_loss == "giou" else log_iou_loss
        return loss(boxes_xyxy, targets_xyxy)

"""ATSS (Zhang et al., arXiv 1912.02424) as MMDetection trains it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from detdistill.detectors.centerness import CenternessDetector
from detdistill.detectors.registry import register_detector
from detdistill.parts.anchors import AnchorGrid
from detdistill.parts.assigners import assign_atss
from detdistill.parts.coders import deltas_to_xyxy
from detdistill.parts.fpn import ExtraFrom
from detdistill.parts.heads import Scale, predictor
from detdistill.parts.losses import Reduce, giou_loss
from detdistill.registry import Depth, Width
from detdistill.structures import Targets

ANCHOR_SCALE = 8  # anchors are squares of 8 strides
DELTA_SCALES = (0.1, 0.1, 0.2, 0.2)  # what a predicted delta of 1 means


@register_detector("atss")
class ATSS(CenternessDetector):
    """One square anchor per location, adaptive positives, centerness beside the boxes."""

    family = "atss"
    box_coding = "deltas"
    loss_weights = {"cls": 1.0, "box": 2.0, "quality": 1.0}
    nms_threshold = 0.6
    quality_tower = "box"
    least_centerness = 1.0

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
        reduce: Reduce = "global",
    ) -> None:
        """Keywords are those of `DenseDetector`; the defaults are the published ones."""
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
        width: int = self.towers["cls"].out_channels  # type: ignore[assignment]
        self.logits = predictor(width, num_classes, prior=0.01)
        self.deltas = predictor(width, 4)
        self.quality = predictor(width, 1)
        self.scales = nn.ModuleList(Scale() for _ in self.strides)

    def predict_cls(self, end: Tensor) -> Tensor:
        """Tower end to (B, K, H, W)."""
        return self.logits(end)  # type: ignore[no-any-return]

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """Tower end to (B, 4, H, W), times the level's scale."""
        return self.scales[level](self.deltas(end))  # type: ignore[no-any-return]

    def predict_quality(self, end: Tensor) -> Tensor:
        """End of the box tower to centerness logits (B, 1, H, W)."""
        return self.quality(end)  # type: ignore[no-any-return]

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., P, 4) to boxes (..., P, 4)."""
        return deltas_to_xyxy(boxes * boxes.new_tensor(DELTA_SCALES), anchors)

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """Adaptive training sample selection with 9 candidates per level."""
        return assign_atss(anchors, valid, targets)

    def box_losses(self, boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
        """GIoU."""
        return giou_loss(boxes_xyxy, targets_xyxy)

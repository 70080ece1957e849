"""Cascade R-CNN (Cai and Vasconcelos, arXiv 1712.00726) with FPN, as MMDetection trains it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from detdistill.detectors.registry import register_detector
from detdistill.detectors.roi_head import RoIHead, Samples
from detdistill.detectors.rpn import RPN
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.parts.losses import Reduce
from detdistill.registry import Width

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
DELTA_SCALES = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
RPN_BETA = 1 / 9


@register_detector("cascade_rcnn")
class CascadeRCNN(TwoStageDetector):
    """Three RoI heads, each stricter than the one before; smooth L1 on class-agnostic deltas.

    The weights are those of the published configuration; the paper weighs all stages alike.
    """

    family = "cascade_rcnn"
    loss_weights = {
        "rpn_cls": 1.0,
        "rpn_box": 1.0,
        "cls_1": 1.0,
        "box_1": 1.0,
        "cls_2": 0.5,
        "box_2": 0.5,
        "cls_3": 0.25,
        "box_3": 0.25,
    }
    training_proposals = 2000

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
        roi_channels: Width = 1024,
        roi_samples: Samples = 512,
        reduce: Reduce = "local",
    ) -> None:
        """Keywords are those of `FPNDetector` and, with `roi_`, of `RoIHead`."""
        super().__init__(
            backbone=backbone,
            num_classes=num_classes,
            pretrained=pretrained,
            base_channels=base_channels,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            fpn_channels=fpn_channels,
            fpn_extra="pool",
        )
        self.rpn = RPN(fpn_channels, box_beta=RPN_BETA, crossing=False, reduce=reduce)
        self.roi_heads = nn.ModuleList(
            RoIHead(
                num_classes,
                in_channels=fpn_channels,
                channels=roi_channels,
                samples=roi_samples,
                class_agnostic=True,
                iou_threshold=threshold,
                delta_scales=scales,
                box_beta=1.0,
                reduce=reduce,
            )
            for threshold, scales in zip(IOU_THRESHOLDS, DELTA_SCALES, strict=True)
        )

"""Faster R-CNN (Ren et al., arXiv 1506.01497) with FPN, as MMDetection trains it."""

from __future__ import annotations

from typing import Literal

from torch import nn

from detdistill.detectors.registry import register_detector
from detdistill.detectors.roi_head import RoIHead, Samples
from detdistill.detectors.rpn import RPN
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.parts.losses import Reduce
from detdistill.registry import Width


@register_detector("faster_rcnn")
class FasterRCNN(TwoStageDetector):
    """One RoI head; softmax over the classes and background, L1 on deltas."""

    family = "faster_rcnn"
    loss_weights = {"rpn_cls": 1.0, "rpn_box": 1.0, "cls": 1.0, "box": 1.0}

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
        class_agnostic: bool = False,
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
        self.rpn = RPN(fpn_channels, reduce=reduce)
        head = RoIHead(
            num_classes,
            in_channels=fpn_channels,
            channels=roi_channels,
            samples=roi_samples,
            class_agnostic=class_agnostic,
            reduce=reduce,
        )
        self.roi_heads = nn.ModuleList([head])

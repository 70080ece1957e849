"""RetinaNet (Lin et al., arXiv 1708.02002) as MMDetection trains it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.registry import register_detector
from detdistill.parts.anchors import AnchorGrid
from detdistill.parts.assigners import assign_max_iou
from detdistill.parts.coders import deltas_to_xyxy, xyxy_to_deltas
from detdistill.parts.fpn import ExtraFrom
from detdistill.parts.heads import predictor
from detdistill.parts.losses import Reduce, focal_loss_sum
from detdistill.registry import Depth, Width
from detdistill.structures import Assignment, DenseOutput, Targets


@register_detector("retinanet")
class RetinaNet(DenseDetector):
    """Nine anchors per location, focal loss, L1 on deltas; towers without normalisation."""

    family = "retinanet"
    box_coding = "deltas"
    loss_weights = {"cls": 1.0, "box": 1.0}
    nms_threshold = 0.5

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
        fpn_extra: ExtraFrom = "c5",
        tower_channels: Width = 256,
        tower_depth: Depth = 4,
        group_norm: bool = False,
        reduce: Reduce = "local",
    ) -> None:
        """Keywords are those of `DenseDetector`; the defaults are the published ones."""
        octave = [4 * 2 ** (i / 3) for i in range(3)]
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
            grid=AnchorGrid(octave, [0.5, 1.0, 2.0]),
            reduce=reduce,
        )
        anchors, width = self.grid.per_location, self.towers["cls"].out_channels
        self.logits = predictor(width, anchors * num_classes, prior=0.01)  # type: ignore[arg-type]
        self.deltas = predictor(width, anchors * 4)  # type: ignore[arg-type]

    def predict_cls(self, end: Tensor) -> Tensor:
        """Tower end to (B, 9*K, H, W)."""
        return self.logits(end)  # type: ignore[no-any-return]

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """Tower end to (B, 9*4, H, W); all levels share the predictor."""
        return self.deltas(end)  # type: ignore[no-any-return]

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., P, 4) to boxes (..., P, 4)."""
        return deltas_to_xyxy(boxes, anchors)

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """IoU 0.5 / 0.4 with low-quality matches."""
        return assign_max_iou(self.flat_anchors(anchors), valid, targets)

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """`task/cls`: focal loss; `task/box`: L1 on deltas; both over the number of positives."""
        assignment = assignment or self.assign(output, targets)
        flat = output.predictions.flatten()
        cls = focal_loss_sum(flat.logits, assignment.labels, assignment.weights)
        image, row = assignment.positive.nonzero(as_tuple=True)
        wanted = xyxy_to_deltas(
            assignment.boxes[image, row], self.flat_anchors(output.anchors)[row]
        )
        box = (flat.boxes[image, row] - wanted).abs().sum() + flat.boxes.sum() * 0
        return self.weighted(
            {"cls": cls / assignment.num_positive, "box": box / assignment.num_positive}
        )

"""RepPoints (Yang et al., arXiv 1904.11490) as MMDetection trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.boxes import centers_xy
from detdistill.detectors.dense import DenseDetector, split_anchors
from detdistill.detectors.registry import register_detector
from detdistill.parts.anchors import PointGrid
from detdistill.parts.assigners import assign_max_iou, assign_nearest_point
from detdistill.parts.coders import points_to_xyxy
from detdistill.parts.fpn import ExtraFrom
from detdistill.parts.heads import PointConv, hidden_conv, predictor
from detdistill.parts.losses import Reduce, focal_loss_sum
from detdistill.registry import Depth, Width
from detdistill.structures import (
    Assignment,
    DenseOutput,
    Predictions,
    Pyramid,
    Targets,
    flatten_maps,
)

POINTS = 9  # the taps of a 3x3 deformable convolution
BOX_UNIT = 4  # strides; box losses are in this unit
MOMENT_RATE = 0.01  # share of the gradient that the moment factors get
POINT_RATE = 0.1  # share of the gradient that the first points get through the convolutions on them
BETA = 1 / 9  # where smooth L1 turns from square to linear


@register_detector("reppoints")
class RepPoints(DenseDetector):
    """Nine points per location, placed twice; boxes are their mean and deviation.

    The first points say where two deformable convolutions look, one for the classes and one for
    the refinement of the points. `DenseOutput.features` holds, per level, `points` (B, 18, H, W),
    the first points as y and x from the location in pixels, and three maps after their ReLU: `init`
    (before the first points), `cls` and `refine` (the deformable convolutions).

    The first points learn from `assign_init`; classes and refined points from `assign`, which
    matches the boxes of the first points and so depends on the predictions.

    The defaults are those of the published detector with GroupNorm in pyramid and head.
    """

    family = "reppoints"
    box_coding = "points"
    loss_weights = {"cls": 1.0, "box_init": 0.5, "box": 1.0}
    nms_threshold = 0.5
    inner_maps = ("init", "cls", "refine")

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
        fpn_group_norm: bool = True,
        tower_channels: Width = 256,
        tower_depth: Depth = 3,
        group_norm: bool = True,
        reduce: Reduce = "local",
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
            fpn_group_norm=fpn_group_norm,
            tower_channels=tower_channels,
            tower_depth=tower_depth,
            group_norm=group_norm,
            grid=PointGrid(offset=0.0),
            reduce=reduce,
        )
        width: int = self.towers["cls"].out_channels  # type: ignore[assignment]
        self.init_conv = hidden_conv(width)
        self.init_points = predictor(width, 2 * POINTS, kernel=1)
        self.deform = nn.ModuleDict({b: PointConv(width, width) for b in ("cls", "box")})
        self.refined_points = predictor(width, 2 * POINTS, kernel=1)
        self.logits = predictor(width, num_classes, prior=0.01, kernel=1)
        self.moment_transfer = nn.Parameter(torch.zeros(2))

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """Towers, predictions and anchors of a pyramid, and the `features` of the class."""
        ends, kept = self.run_towers(pyramid, keep_pre_activation)
        predictions, features = self._refine(ends)
        return DenseOutput(predictions, kept, self.grid(pyramid), pyramid, features)

    def towers_for(self, prediction: str) -> tuple[str, ...]:
        """The classes are read at the points, which the box tower places."""
        return ("cls", "box") if prediction == "cls" else super().towers_for(prediction)

    def _predict(self, ends: Mapping[str, Sequence[Tensor]]) -> Predictions:
        return self._refine(ends)[0]

    def _refine(
        self, ends: Mapping[str, Sequence[Tensor]]
    ) -> tuple[Predictions, dict[str, list[Tensor]]]:
        logits: list[Tensor] = []
        boxes: list[Tensor] = []
        features: dict[str, list[Tensor]] = {"points": [], "init": [], "cls": [], "refine": []}
        for level, end in enumerate(ends.get("box", ())):
            init = F.relu(self.init_conv(end), inplace=True)
            points = self.init_points(init)  # in strides
            looked_at = (1 - POINT_RATE) * points.detach() + POINT_RATE * points
            refine = F.relu(self.deform["box"](end, looked_at), inplace=True)
            refined = self.refined_points(refine) + points.detach()
            boxes.append(split_anchors(refined.float() * self.strides[level], 1))
            features["points"].append(points.float() * self.strides[level])
            features["init"].append(init)
            features["refine"].append(refine)
            if "cls" in ends:
                seen = F.relu(self.deform["cls"](ends["cls"][level], looked_at), inplace=True)
                features["cls"].append(seen)
                logits.append(split_anchors(self.logits(seen), 1))
        return Predictions(logits, boxes), features

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Points (..., P, 18), y and x from the location in pixels, to boxes (..., P, 4)."""
        # The moment factors learn a hundredth as fast as the rest, as published.
        factors = self.moment_transfer * MOMENT_RATE
        factors = factors + self.moment_transfer.detach() * (1 - MOMENT_RATE)
        return points_to_xyxy(boxes, centers_xy(anchors), factors)

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal to no other's: the assignment depends on this detector's predictions."""
        return *super().assignment_key, id(self)

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """One point per box, for the first points."""
        points = [centers_xy(level) for level in anchors]
        return assign_nearest_point(points, valid, targets, strides=self.strides, scale=BOX_UNIT)

    def assign_init(self, output: DenseOutput, targets: Targets) -> Assignment:
        """Who learns what among the first points, from their locations alone."""
        return super().assign(output, targets)

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment:
        """Who learns what among classes and refined points: IoU 0.5 / 0.4 of the first boxes."""
        with torch.no_grad():
            boxes = self.decode(self._first_points(output), self.flat_anchors(output.anchors))
        matched = assign_max_iou(boxes, self.valid_cells(output, targets), targets)
        return self.assignment_of(matched, targets)

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """`task/cls`: focal loss; `task/box_init`, `task/box`: smooth L1 of the two boxes."""
        assignment = assignment or self.assign(output, targets)
        first = self.assign_init(output, targets)
        flat = output.predictions.flatten()
        cls = focal_loss_sum(flat.logits, assignment.labels, assignment.weights)
        return self.weighted(
            {
                "cls": cls / assignment.num_positive,
                "box_init": self._box_sum(self._first_points(output), first, output)
                / first.num_positive,
                "box": self._box_sum(flat.boxes, assignment, output) / assignment.num_positive,
            }
        )

    def _box_sum(self, points: Tensor, assignment: Assignment, output: DenseOutput) -> Tensor:
        """Smooth L1 of the positives' boxes in units of four strides, summed over all sides."""
        image, row = assignment.positive.nonzero(as_tuple=True)
        found = self.decode(points[image, row], self.flat_anchors(output.anchors)[row])
        units = torch.cat(
            [
                level.new_full((len(level), 1), BOX_UNIT * stride)
                for level, stride in zip(output.anchors, self.strides, strict=True)
            ]
        )[row]
        wanted = assignment.boxes[image, row]
        loss = F.smooth_l1_loss(found / units, wanted / units, beta=BETA, reduction="sum")
        return loss + points.sum() * 0

    @staticmethod
    def _first_points(output: DenseOutput) -> Tensor:
        """(B, P, 18) float32 pixels."""
        return flatten_maps([split_anchors(level, 1) for level in output.features["points"]])

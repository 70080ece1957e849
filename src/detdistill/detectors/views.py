"""torchvision's detectors as they are: the same stages over the user's own model object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead

from detdistill.boxes import area, centers_xy, xyxy_to_ltrb
from detdistill.detectors.centerness import CenternessDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.two_stage_views import FasterRCNNView
from detdistill.detectors.view_base import (
    AnchorView,
    TorchvisionView,
    decode_on,
    limits,
    match_rows,
    tower_over,
)
from detdistill.errors import UserError
from detdistill.parts.assigners import BACKGROUND, IGNORED
from detdistill.parts.losses import mean_over_processes
from detdistill.structures import (
    Assignment,
    DenseOutput,
    Detections,
    FlatPredictions,
    Targets,
    flatten_maps,
)

TERMS = {"classification": "cls", "bbox_regression": "box", "bbox_ctrness": "quality"}


def as_detector(model: nn.Module, *, labels: Sequence[int] | None = None) -> TorchvisionView:
    """A view of a torchvision RetinaNet, FCOS or Faster R-CNN that shows our stages.

    The view has no parameters of its own: it trains, and distils, the very object it is given,
    which the user goes on to use and to save as before. Matching, sampling and post-processing are
    the model's own.

    Args:
        model: what the builders in `torchvision.models.detection` return, e.g.
            `retinanet_resnet50_fpn_v2`; any backbone, but torchvision's own heads.
        labels: for each of our classes 0..K-1 the model's label. None takes all labels of a
            RetinaNet or an FCOS as they are (data sets of torchvision leave 0 to the background:
            `range(1, 91)`), and all but the background's of a Faster R-CNN.

    Raises:
        UserError: for any other model, or a label that the model does not have.
    """
    if isinstance(model, FasterRCNN):
        return FasterRCNNView(model, labels)
    for kind, head, view in ((RetinaNet, RetinaNetHead, RetinaNetView), (FCOS, FCOSHead, FCOSView)):
        if isinstance(model, kind) and isinstance(model.head, head):
            return view(model, labels)
    raise UserError(
        f"as_detector takes torchvision's RetinaNet, FCOS and Faster R-CNN with their own heads, "
        f"not {type(model).__module__}.{type(model).__name__}"
    )


class DenseView(TorchvisionView, DenseDetector):
    """What the views of dense detectors share; see `as_detector`."""

    masks_padding = False  # torchvision's cells beyond an image are background

    def __init__(self, model: Any, labels: Sequence[int] | None) -> None:
        """All labels are classes, unless chosen: a sigmoid head has no background."""
        super().__init__(model, labels, range(model.head.classification_head.num_classes))
        self.reduce, self.nms_threshold = "local", float(model.nms_thresh)
        self.grid = AnchorView(model.anchor_generator, self.strides[0])  # type: ignore[assignment]
        heads = {"cls": model.head.classification_head, "box": model.head.regression_head}
        # No ModuleDict, which would register the model's layers for a second time.
        self.towers = {b: tower_over(head.conv) for b, head in heads.items()}  # type: ignore[assignment]

    def predict_cls(self, end: Tensor) -> Tensor:
        """Tower end to (B, A*K, H, W), of the chosen labels alone."""
        logits: Tensor = self.model.head.classification_head.cls_logits(end)
        if self.labels is None:
            return logits
        batch, _, height, width = logits.shape
        chosen = logits.reshape(batch, self.grid.per_location, -1, height, width)[:, :, self.labels]
        return chosen.flatten(1, 2)

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """Tower end to (B, A*4, H, W) in the model's own encoding."""
        boxes: Tensor = self.model.head.regression_head.bbox_reg(end)
        return boxes

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal for views whose `assign` gives equal results on equal pyramids."""
        return type(self), self.grid.key, self.num_classes, self.strides, *self._rule()

    def _rule(self) -> tuple[object, ...]:
        """The settings of the model's matching."""
        raise NotImplementedError

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """The losses of the model's own head, as `task/cls`, `task/box` and `task/quality`."""
        assignment = assignment or self.assign(output, targets)
        matched = torch.where(assignment.weights > 0, assignment.matched, IGNORED)
        truth = [
            {"boxes": boxes[present], "labels": labels[present]}
            for boxes, labels, present in zip(
                targets.boxes, targets.labels, targets.present, strict=True
            )
        ]
        found = _by_torchvisions_names(output.predictions.flatten())
        anchors = [self.flat_anchors(output.anchors)] * len(truth)
        losses = self.model.head.compute_loss(truth, found, anchors, list(matched))
        return self.weighted({TERMS[name]: value for name, value in losses.items()})

    @torch.no_grad()
    def detect(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """The model's own post-processing; None takes its own limits."""
        maps = output.predictions
        levels = [
            _by_torchvisions_names(
                FlatPredictions(
                    flatten_maps([maps.logits[i]]),
                    flatten_maps([maps.boxes[i]]),
                    None if maps.quality is None else maps.quality[i].flatten(1).float(),
                )
            )
            for i in range(len(self.strides))
        ]
        outputs = {name: [level[name] for level in levels] for name in levels[0]}
        with limits(self.model, score_threshold, max_detections):
            found = self.model.postprocess_detections(
                outputs, [output.anchors] * len(sizes), list(sizes)
            )
        return [Detections(one["boxes"], one["scores"], one["labels"]) for one in found]


class RetinaNetView(DenseView):
    """Stages over torchvision's RetinaNet, v1 and v2."""

    family = "retinanet"
    box_coding = "deltas"
    loss_weights: Mapping[str, float] = {"cls": 1.0, "box": 1.0}

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., P, 4) to boxes (..., P, 4)."""
        return decode_on(self.model.box_coder, boxes, anchors)

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """By the model's own matcher."""
        return match_rows(self.model.proposal_matcher, self.flat_anchors(anchors), targets)

    def _rule(self) -> tuple[object, ...]:
        matcher = self.model.proposal_matcher
        return matcher.high_threshold, matcher.low_threshold, matcher.allow_low_quality_matches


class FCOSView(DenseView, CenternessDetector):
    """Stages over torchvision's FCOS. Its distances are in sizes of the anchor, not in pixels."""

    family = "fcos"
    box_coding = "distances"
    loss_weights: Mapping[str, float] = {"cls": 1.0, "box": 1.0, "quality": 1.0}
    quality_tower = "box"
    least_centerness = 1e-6

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """Tower end to distances (B, 4, H, W)."""
        return F.relu(super().predict_box(end, level))

    def predict_quality(self, end: Tensor) -> Tensor:
        """End of the box tower to centerness logits (B, 1, H, W)."""
        quality: Tensor = self.model.head.regression_head.bbox_ctrness(end)
        return quality

    def with_quality(self, scores: Tensor, quality: Tensor) -> Tensor:
        """The geometric mean of both, as in the model's own post-processing."""
        return super().with_quality(scores, quality).sqrt()

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Distances (..., P, 4) to boxes (..., P, 4)."""
        decoded: Tensor = self.model.box_coder.decode(boxes, anchors)
        return decoded

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """The rule of torchvision, which stands inside its loss and cannot be called.

        Unlike ours (`assign_points`) it leaves the ends of a level's range out, and compares areas
        as 1e8 - area in float32, so that areas which differ by less than 8 pixels tie.
        """
        flat = self.flat_anchors(anchors)
        points, side = centers_xy(flat), flat[:, 2] - flat[:, 0]
        low, high = side * 4, side * 8
        low[: len(anchors[0])] = 0
        high[-len(anchors[-1]) :] = torch.inf
        boxes = targets.boxes[:, :, None]
        away = (points - centers_xy(boxes)).abs().amax(-1)
        ltrb = xyxy_to_ltrb(boxes, points)
        farthest = ltrb.amax(-1)
        fits = (away < self.model.center_sampling_radius * side) & (ltrb.amin(-1) > 0)
        fits &= (farthest > low) & (farthest < high) & targets.present[:, :, None]
        best, matched = (fits.float() * (1e8 - area(boxes))).max(1)
        return torch.where(best < 1e-5, BACKGROUND, matched)

    def count_positive(self, positive: Tensor) -> Tensor:
        """Positives of the batch, at least 1 in all."""
        return mean_over_processes(positive.sum().float(), self.reduce, at_least=1)

    def _rule(self) -> tuple[object, ...]:
        return (self.model.center_sampling_radius,)


def _by_torchvisions_names(flat: FlatPredictions) -> dict[str, Tensor]:
    named = {"cls_logits": flat.logits, "bbox_regression": flat.boxes}
    return named if flat.quality is None else {**named, "bbox_ctrness": flat.quality[..., None]}

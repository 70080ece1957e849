"""torchvision's Faster R-CNN as it is: the same stages over the user's own model object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.roi_head import RoIHead, with_others_as_background
from detdistill.detectors.rpn import RPN
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.detectors.view_base import (
    AnchorView,
    TorchvisionView,
    decode_on,
    limits,
    match_rows,
    tower_over,
)
from detdistill.errors import UserError
from detdistill.parts.assigners import BACKGROUND, take_matches
from detdistill.structures import (
    GROUND_TRUTH,
    Assignment,
    DenseOutput,
    Detections,
    Proposals,
    Pyramid,
    RoIOutput,
    Targets,
    TwoStageAssignment,
)

SMOOTH = 1 / 9  # where torchvision's loss of the deltas turns linear
SMALLEST = 1e-3  # pixels; proposals below go


class FasterRCNNView(TorchvisionView, TwoStageDetector):
    """Stages over torchvision's Faster R-CNN, v1, v2 and on MobileNetV3.

    Its label 0 is the background, so that our class k is its label k + 1. Random draws are made by
    its own samplers and in its own order: the same random state gives the same losses.
    """

    family = "faster_rcnn"
    loss_weights: Mapping[str, float] = {"rpn_cls": 1.0, "rpn_box": 1.0, "cls": 1.0, "box": 1.0}

    def __init__(self, model: Any, labels: Sequence[int] | None) -> None:
        """Reads the facts off the model; `UserError` for masks, keypoints and heads of others."""
        heads = model.roi_heads
        if heads.has_mask() or heads.has_keypoint():
            raise UserError(
                "as_detector takes torchvision's Faster R-CNN, without masks and keypoints"
            )
        if not isinstance(heads.box_predictor, FastRCNNPredictor):
            raise UserError(
                f"as_detector knows torchvision's FastRCNNPredictor, not "
                f"{type(heads.box_predictor).__name__}"
            )
        known = range(1, heads.box_predictor.cls_score.out_features)
        super().__init__(model, labels, known)
        head = RoIHeadView(heads, self.level_names, self.labels or list(known))
        # Around nn.Module, which would register the model's layers for a second time.
        object.__setattr__(self, "rpn", RPNView(model.rpn, self.strides[0]))
        self.roi_heads = [head]  # type: ignore[assignment]

    def propose(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        per_level: int | None = None,
        max_per_image: int | None = None,
        nms_threshold: float | None = None,
        min_size: float = SMALLEST,
    ) -> Proposals:
        """The RPN's best boxes; None takes the model's own settings for testing."""
        rpn = self.model.rpn
        found = super().propose(
            output,
            sizes,
            per_level=rpn._pre_nms_top_n["testing"] if per_level is None else per_level,
            max_per_image=rpn._post_nms_top_n["testing"]
            if max_per_image is None
            else max_per_image,
            nms_threshold=rpn.nms_thresh if nms_threshold is None else nms_threshold,
            min_size=min_size,
        )
        if rpn.score_thresh <= 0:
            return found
        # Torchvision drops weak boxes before NMS, which they could not have changed.
        kept = [scores >= rpn.score_thresh for scores in found.scores]
        parts = (found.boxes_xyxy, found.scores, found.origin)
        return Proposals(*([p[k] for p, k in zip(part, kept, strict=True)] for part in parts))

    def assign(self, output: DenseOutput, targets: Targets) -> TwoStageAssignment:
        """The RPN's anchors, and proposals sampled of as many as the model trains on."""
        proposals = self.propose(
            output,
            targets.sizes,
            per_level=self.model.rpn._pre_nms_top_n["training"],
            max_per_image=self.model.rpn._post_nms_top_n["training"],
        )
        return TwoStageAssignment(self.rpn.assign(output, targets), self.sample(proposals, targets))

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
        rois = self.propose(output, sizes)
        with limits(self.model.roi_heads, score_threshold, max_detections):
            return self._stage(0).detect(self.roi(output.pyramid, rois), rois, sizes)


class RPNView(RPN):
    """Stages over torchvision's region proposal network."""

    def __init__(self, rpn: Any, finest: int) -> None:
        """`finest` is the stride of the finest level."""
        nn.Module.__init__(self)
        self.own = rpn
        self.box_beta, self.crossing, self.reduce = SMOOTH, True, "local"
        self.grid = AnchorView(rpn.anchor_generator, finest)  # type: ignore[assignment]
        self.tower = tower_over(rpn.head.conv)
        self.logits, self.deltas = rpn.head.cls_logits, rpn.head.bbox_pred

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., P, 4) to boxes (..., P, 4)."""
        return decode_on(self.own.box_coder, boxes, anchors)

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment:
        """By the model's own matcher and sampler; otherwise as `RPN.assign`."""
        objects = Targets(targets.boxes, targets.labels.clamp(max=0), targets.sizes)
        matched = self.match(output, targets)
        kinds = torch.where(matched >= 0, 1.0, torch.where(matched == BACKGROUND, 0.0, -1.0))
        chosen = self.own.fg_bg_sampler(list(kinds))
        object_, background = (torch.stack(part).bool() for part in chosen)
        matched = torch.where(object_, matched, BACKGROUND)
        positive, labels, boxes = take_matches(matched, objects, 1)
        sampled = object_ | background
        return Assignment(
            labels=labels,
            weights=sampled.float(),
            positive=positive,
            boxes=boxes,
            matched=matched,
            num_positive=sampled.sum().float().clamp(min=1),
        )

    def match(self, output: DenseOutput, targets: Targets) -> Tensor:
        """As `RPN.match`, by the model's own matcher."""
        anchors = DenseDetector.flat_anchors(output.anchors)
        return match_rows(self.own.proposal_matcher, anchors, targets)


class RoIHeadView(RoIHead):
    """Stages over torchvision's RoI heads.

    Args:
        heads: the model's `roi_heads`.
        names: of the pyramid's levels, as its pooling knows them.
        labels: the model's label of each class.
    """

    def __init__(self, heads: Any, names: Sequence[str], labels: list[int]) -> None:
        """`UserError` for a head without fully connected layers of torchvision's kinds."""
        nn.Module.__init__(self)
        self.own, self.names, self.labels = heads, list(names), labels
        self.num_classes, self.class_agnostic = len(labels), False
        self.iou_threshold = heads.proposal_matcher.high_threshold
        self.box_beta, self.reduce = SMOOTH, "local"
        self.delta_scales = tuple(1 / weight for weight in heads.box_coder.weights)
        layers = [m for m in heads.box_head.modules() if isinstance(m, nn.Linear)]
        if not layers or not isinstance(heads.box_head, (TwoMLPHead, nn.Sequential)):
            raise UserError(
                f"as_detector knows torchvision's box heads, not {type(heads.box_head).__name__}"
            )
        self.shared = nn.ModuleList(layers)

    def keep_classes(self, kept: list[int]) -> None:
        """The model stays whole: the view reads fewer of its labels."""
        self.labels = [self.labels[label] for label in kept]
        self.num_classes = len(kept)

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> Proposals:
        """By the model's own rule and sampler; the ground truth comes last of each image."""
        slots = [present.nonzero()[:, 0] for present in targets.present]
        truth = [boxes[s] for boxes, s in zip(targets.boxes, slots, strict=True)]
        classes = [labels[s] for labels, s in zip(targets.labels, slots, strict=True)]
        boxes = self.own.add_gt_proposals(proposals.boxes_xyxy, truth)
        # Torchvision's background is label 0.
        matched, labels = self.own.assign_targets_to_proposals(
            boxes, truth, [label + 1 for label in classes]
        )
        rows = self.own.subsample(labels)
        sampled: tuple[list[Tensor], ...] = ([], [], [], [], [])
        for image, chosen in enumerate(rows):
            own = slots[image].new_full((len(slots[image]), 4), GROUND_TRUTH)
            own[:, 3] = slots[image]
            scores = proposals.scores[image]
            label = labels[image][chosen]
            wanted = boxes[image].new_zeros((len(chosen), 4))
            object_ = label > 0
            wanted[object_] = truth[image][matched[image][chosen[object_]]]
            parts = (
                boxes[image][chosen],
                torch.cat((scores, scores.new_ones(len(own))))[chosen],
                torch.cat((proposals.origin[image], own))[chosen],
                torch.where(object_, label - 1, self.num_classes),
                wanted,
            )
            for collected, part in zip(sampled, parts, strict=True):
                collected.append(part)
        return Proposals(*sampled)

    def roi(self, pyramid: Pyramid, proposals: Proposals) -> RoIOutput:
        """Pools each box and classifies it, background last."""
        features = self.shared_features(self.pool(pyramid, proposals))
        logits, deltas = self.own.box_predictor(features[-1])
        chosen = deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)[:, self.labels].flatten(1)
        others = [label for label in range(logits.shape[1]) if label not in self.labels]
        logits = with_others_as_background(logits, self.labels, others)
        return RoIOutput(features, logits, chosen)

    def shared_features(self, pooled: Tensor) -> list[Tensor]:
        """(R, C) after the activation of each shared fully connected layer."""
        box_head, maps = self.own.box_head, []
        if isinstance(box_head, TwoMLPHead):
            features = pooled.flatten(1)
            for layer in (box_head.fc6, box_head.fc7):
                features = F.relu(layer(features))
                maps.append(features)
            return maps
        features = pooled
        for layer in box_head.children():  # convolutions bring their activation along
            features = layer(features)
            if isinstance(layer, nn.ReLU):
                maps.append(features)
        return maps

    def pool(self, pyramid: Pyramid, proposals: Proposals) -> Tensor:
        """RoIAlign as the model does it, to (R, C, h, w) float32.

        On another detector's pyramid its finest levels stand for those that the model pools from.
        """
        maps = {name: level.float() for name, level in zip(self.names, pyramid, strict=False)}
        # It would keep the strides of the first pyramid that it met.
        self.own.box_roi_pool.scales = None
        height, width = (side * pyramid.strides[0] for side in pyramid[0].shape[-2:])
        sizes = [(height, width)] * len(proposals.boxes_xyxy)
        pooled: Tensor = self.own.box_roi_pool(maps, proposals.boxes_xyxy, sizes)
        return pooled

    @torch.no_grad()
    def detect(
        self,
        output: RoIOutput,
        proposals: Proposals,
        sizes: Sequence[tuple[int, int]],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """The model's own post-processing; None takes its own limits."""
        logits = output.logits.float().roll(1, 1)  # background first
        deltas = F.pad(output.boxes.float(), (4, 0))
        with limits(self.own, score_threshold, max_detections):
            found = self.own.postprocess_detections(
                logits, deltas, proposals.boxes_xyxy, list(sizes)
            )
        return [
            Detections(boxes, scores, labels - 1)
            for boxes, scores, labels in zip(*found, strict=True)
        ]

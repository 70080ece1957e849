"""torchvision's dense detectors as they are: the same stages over the user's own model object."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from detdistill.boxes import area, centers_xy, xyxy_to_ltrb
from detdistill.detectors.base import blank_padding
from detdistill.detectors.centerness import CenternessDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.errors import UserError
from detdistill.parts.assigners import BACKGROUND, IGNORED
from detdistill.parts.heads import Tower
from detdistill.parts.losses import mean_over_processes
from detdistill.structures import (
    Assignment,
    Batch,
    DenseOutput,
    Detections,
    FlatPredictions,
    Pyramid,
    Targets,
    flatten_maps,
)

PROBE = 256  # pixels: at least one cell at every stride up to 128
TERMS = {"classification": "cls", "bbox_regression": "box", "bbox_ctrness": "quality"}


def as_detector(model: nn.Module, *, labels: Sequence[int] | None = None) -> DenseView:
    """A view of a torchvision RetinaNet or FCOS that shows our stages.

    The view has no parameters of its own: it trains, and distils, the very object it is given,
    which the user goes on to use and to save as before. Losses, matching and post-processing are
    the model's own.

    Args:
        model: what `torchvision.models.detection.retinanet_resnet50_fpn`, its v2 or
            `fcos_resnet50_fpn` return, with any backbone.
        labels: for each of our classes 0..K-1 the model's label, e.g. `range(1, 91)` where label 0
            is the background, as torchvision's data sets have it; None takes all labels as they
            are.

    Raises:
        UserError: for any other model, or a label that the model does not have.
    """
    for kind, head, view in ((RetinaNet, RetinaNetHead, RetinaNetView), (FCOS, FCOSHead, FCOSView)):
        if isinstance(model, kind) and isinstance(model.head, head):
            return view(model, labels)
    raise UserError(
        f"as_detector takes torchvision's RetinaNet and FCOS with their own heads, not "
        f"{type(model).__module__}.{type(model).__name__}"
    )


class AnchorView:
    """torchvision's anchors of a pyramid, by the generator of a model.

    Unlike ours they are rounded to whole pixels, and their spacing is the size of the padded image
    over that of the level, rounded down, which differs from the stride where a level ends in half a
    cell.
    """

    def __init__(self, generator: AnchorGenerator, finest: int) -> None:
        """`finest` is the stride of the finest level, which divides the padded image."""
        self.generator, self.finest = generator, finest
        counts = set(generator.num_anchors_per_location())
        if len(counts) != 1:
            raise UserError(
                f"the model has {sorted(counts)} anchors per level; expected one number"
            )
        [self.per_location] = counts

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for generators that give equal anchors."""
        return "torchvision", self.generator.sizes, self.generator.aspect_ratios, self.finest

    def __call__(self, pyramid: Pyramid) -> list[Tensor]:
        """Per level (H*W*A, 4) float32, xyxy pixels; location-major, anchors fastest."""
        maps = [
            level.new_empty((1, 1, *level.shape[-2:]), dtype=torch.float32) for level in pyramid
        ]
        height, width = (side * self.finest for side in maps[0].shape[-2:])
        images = ImageList(maps[0].new_empty((1, 0, height, width)), [(height, width)])
        [anchors] = self.generator(images, maps)
        counts = [level.shape[-2] * level.shape[-1] * self.per_location for level in maps]
        return list(anchors.split(counts))


class DenseView(DenseDetector):
    """What the views share; see `as_detector`.

    Attributes:
        model: the user's.
        labels: the model's label of each class, or None.
    """

    masks_padding = False  # torchvision's cells beyond an image are background

    def __init__(self, model: Any, labels: Sequence[int] | None) -> None:
        """Reads the facts off the model, and the strides off one pass of its backbone."""
        nn.Module.__init__(self)  # the model brings what our detectors build
        self.model = model
        self.name = f"torchvision_{self.family}"
        self.options: dict[str, Any] = {}
        self.classes, self.reduce = None, "local"
        transform, known = model.transform, model.head.classification_head.num_classes
        self.labels = None if labels is None else [int(label) for label in labels]
        wrong = [label for label in self.labels or [] if not 0 <= label < known]
        if wrong or self.labels == []:
            raise UserError(
                f"labels holds {wrong or 'nothing'}; the model has labels 0..{known - 1}"
            )
        self.num_classes = known if self.labels is None else len(self.labels)
        fixed = transform.fixed_size is not None
        self.input_size = None if fixed else (transform.min_size[-1], transform.max_size)
        mean, std = (torch.tensor(v) * 255 for v in (transform.image_mean, transform.image_std))
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        self.strides = _strides(model.backbone)
        self.grid = AnchorView(model.anchor_generator, self.strides[0])  # type: ignore[assignment]
        heads = {"cls": model.head.classification_head, "box": model.head.regression_head}
        # No ModuleDict, which would register the model's layers for a second time.
        self.towers = {branch: _tower(head.conv) for branch, head in heads.items()}  # type: ignore[assignment]

    @property
    def pyramid_channels(self) -> int:
        """Channels of every pyramid level."""
        return int(self.model.backbone.out_channels)

    def normalize(self, batch: Batch) -> Tensor:
        """Images to float32 (B, 3, H, W), in the model's own arithmetic; padding is 0."""
        images: Tensor = self.model.transform.normalize(batch.images.float() / 255)
        return blank_padding(images, batch.sizes)

    def pyramid(self, images: Tensor) -> Pyramid:
        """Normalised images (B, 3, H, W) to the maps of the model's backbone."""
        return Pyramid(_maps(self.model.backbone(images)), self.strides)

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
        with _limits(self.model, score_threshold, max_detections):
            found = self.model.postprocess_detections(
                outputs, [output.anchors] * len(sizes), list(sizes)
            )
        return [Detections(one["boxes"], one["scores"], one["labels"]) for one in found]

    def head_only(self) -> Self:
        """A trainable copy without the backbone, to stand on another detector's pyramid."""
        body = self.model._modules.pop("backbone")
        assistant = copy.deepcopy(self)
        self.model._modules["backbone"] = body
        return assistant.requires_grad_(True)


class RetinaNetView(DenseView):
    """Stages over torchvision's RetinaNet, v1 and v2."""

    family = "retinanet"
    box_coding = "deltas"
    loss_weights: Mapping[str, float] = {"cls": 1.0, "box": 1.0}

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas (..., P, 4) to boxes (..., P, 4)."""
        on = anchors.expand(boxes.shape).reshape(-1, 4)
        decoded: Tensor = self.model.box_coder.decode_single(boxes.reshape(-1, 4), on)
        return decoded.reshape(boxes.shape)

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """By the model's own matcher, whose numbers for background and between are ours."""
        flat, rows = self.flat_anchors(anchors), []
        for boxes, present in zip(targets.boxes, targets.present, strict=True):
            if present.any():
                rows.append(self.model.proposal_matcher(box_iou(boxes[present], flat)))
            else:
                rows.append(torch.full((len(flat),), BACKGROUND, device=flat.device))
        return torch.stack(rows)

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


def _maps(features: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features.values())


def _strides(backbone: nn.Module) -> tuple[int, ...]:
    """Of the maps, by one pass; every module keeps its mode and its statistics."""
    modes = {module: module.training for module in backbone.modules()}
    device = next(backbone.parameters()).device
    with torch.no_grad():
        maps = _maps(backbone.eval()(torch.zeros(1, 3, PROBE, PROBE, device=device)))
    for module, mode in modes.items():
        module.training = mode
    return tuple(PROBE // level.shape[-1] for level in maps)


def _tower(convolutions: nn.Module) -> Tower:
    """The layers of a torchvision tower as the blocks of ours: each ends before its ReLU."""
    blocks: list[list[nn.Module]] = [[]]
    for layer in (m for m in convolutions.modules() if not list(m.children())):
        if isinstance(layer, nn.ReLU):
            blocks.append([])
        else:
            blocks[-1].append(layer)
    *whole, rest = blocks
    first = whole[0][0] if whole and whole[0] else None
    if rest or not isinstance(first, nn.Conv2d):
        raise UserError(
            "the model's towers are no convolutions with ReLU; as_detector knows no other"
        )
    tower = Tower(first.in_channels, first.out_channels, 0, group_norm=False)
    tower.blocks = nn.ModuleList(nn.Sequential(*block) for block in whole)
    tower.out_channels = first.out_channels
    return tower


@contextmanager
def _limits(
    model: Any, score_threshold: float | None, max_detections: int | None
) -> Iterator[None]:
    """Other limits for the model's post-processing, which reads them off the model."""
    own = model.score_thresh, model.detections_per_img
    model.score_thresh = own[0] if score_threshold is None else score_threshold
    model.detections_per_img = own[1] if max_detections is None else max_detections
    try:
        yield
    finally:
        model.score_thresh, model.detections_per_img = own

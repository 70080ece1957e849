"""What the views of torchvision's detectors share; see `views.as_detector`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.inference import eval_mode
from detdistill.errors import UserError
from detdistill.parts.assigners import BACKGROUND
from detdistill.parts.heads import Tower
from detdistill.structures import Pyramid, Targets

PROBE = 256  # pixels: at least one cell at every stride up to 128


class TorchvisionView(FPNDetector):
    """The facts and the first stages of any view; its subclasses add a head.

    Attributes:
        model: the user's.
        labels: the model's label of each class, or None as the user gave it.
    """

    def __init__(self, model: Any, labels: Sequence[int] | None, known: range) -> None:
        """Reads the facts off the model, and the strides off one pass of its backbone.

        `known` are the model's labels that a class can have.
        """
        nn.Module.__init__(self)  # the model brings what our detectors build
        self.model = model
        self.name = f"torchvision_{self.family}"
        self.options: dict[str, Any] = {}
        self.classes = None
        chosen = None if labels is None else [int(label) for label in labels]
        self.known = known
        self.labels = None if chosen == list(known) else chosen
        wrong = [label for label in self.labels or [] if label not in known]
        if wrong or self.labels == []:
            raise UserError(
                f"labels holds {wrong or 'nothing'}; the model has labels {known[0]}..{known[-1]}"
            )
        self.num_classes = len(known) if self.labels is None else len(self.labels)
        transform = model.transform
        fixed = transform.fixed_size is not None
        self.input_size = None if fixed else (transform.min_size[-1], transform.max_size)
        device = next(model.parameters()).device
        mean, std = (
            torch.tensor(values, device=device) * 255
            for values in (transform.image_mean, transform.image_std)
        )
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)
        self.strides, self.level_names = _levels(model.backbone)

    @property
    def pyramid_channels(self) -> int:
        """Channels of every pyramid level."""
        return int(self.model.backbone.out_channels)

    def own_pixels(self, images: Tensor) -> Tensor:
        """RGB, 0..255, to float32 in the model's own arithmetic."""
        return self.model.transform.normalize(images.float() / 255)  # type: ignore[no-any-return]

    def pyramid(self, images: Tensor) -> Pyramid:
        """Normalised images (B, 3, H, W) to the maps of the model's backbone."""
        return Pyramid(list(_named(self.model.backbone(images)).values()), self.strides)

    def head_only(self) -> Self:
        """A trainable copy without the backbone, to stand on another detector's pyramid."""
        body = self.model._modules.pop("backbone")
        assistant = copy.deepcopy(self)
        self.model._modules["backbone"] = body
        return assistant.requires_grad_(True)


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


def match_rows(matcher: Any, anchors: Tensor, targets: Targets) -> Tensor:
    """(B, P) int64 by a model's own matcher, whose numbers for background and between are ours."""
    rows = []
    for boxes, present in zip(targets.boxes, targets.present, strict=True):
        if present.any():
            rows.append(matcher(box_iou(boxes[present], anchors)))
        else:
            rows.append(torch.full((len(anchors),), BACKGROUND, device=anchors.device))
    return torch.stack(rows)


def decode_on(coder: Any, boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas (..., P, 4) on anchors (..., P, 4) to boxes (..., P, 4), by a model's own coder."""
    on = anchors.expand(boxes.shape).reshape(-1, 4)
    decoded: Tensor = coder.decode_single(boxes.reshape(-1, 4), on)
    return decoded.reshape(boxes.shape)


def _named(features: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"0": features} if isinstance(features, Tensor) else features


def _levels(backbone: nn.Module) -> tuple[tuple[int, ...], list[str]]:
    """Strides and names of the maps, by one pass; modes and statistics stay as they are."""
    device = next(backbone.parameters()).device
    with torch.no_grad(), eval_mode(backbone):
        maps = _named(backbone(torch.zeros(1, 3, PROBE, PROBE, device=device)))
    return tuple(PROBE // level.shape[-1] for level in maps.values()), list(maps)


def tower_over(convolutions: nn.Module) -> Tower:
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
def limits(model: Any, score_threshold: float | None, max_detections: int | None) -> Iterator[None]:
    """Other limits for the model's post-processing, which reads them off the model."""
    own = model.score_thresh, model.detections_per_img
    model.score_thresh = own[0] if score_threshold is None else score_threshold
    model.detections_per_img = own[1] if max_detections is None else max_detections
    try:
        yield
    finally:
        model.score_thresh, model.detections_per_img = own

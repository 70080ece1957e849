"""What all dense one-stage detectors share: two towers on a pyramid, run level by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.detectors.inference import detect_image, predict_image
from detdistill.errors import UserError
from detdistill.parts.anchors import AnchorGrid, PointGrid, cells_on_image
from detdistill.parts.assigners import IGNORED
from detdistill.parts.backbones import Backbone
from detdistill.parts.fpn import FPN, ExtraFrom
from detdistill.parts.heads import Tower
from detdistill.parts.losses import Reduce, mean_over_processes
from detdistill.structures import (
    Assignment,
    Batch,
    DenseOutput,
    Detections,
    Predictions,
    Pyramid,
    Targets,
)

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255, as timm and MMDetection
IMAGENET_STD = (58.395, 57.12, 57.375)


class DenseDetector(nn.Module):
    """Backbone, FPN, a classification and a box tower.

    A subclass adds its predictors (`predict_cls`, `predict_box`), `decode`, `match` and `loss`;
    with a quality branch also `quality_tower`, the tower it sits on, and `predict_quality`.

    Args:
        backbone: a timm model name.
        num_classes: K.
        pretrained: ImageNet weights for the backbone.
        base_channels: width of a ResNet's first stage; 64 is full.
        frozen_stages: backbone stages without training.
        norm_eval: BatchNorm on stored statistics while training.
        fpn_channels: channels of the pyramid.
        fpn_extra: where the two coarse levels start.
        tower_channels: channels of the towers.
        tower_depth: blocks in each tower.
        group_norm: GroupNorm in the towers.
        grid: the anchors or points.
        reduce: whether normalisers are averaged over processes ("global") or not ("local").
    """

    family: str
    box_coding: str
    loss_weights: Mapping[str, float]
    nms_threshold: float
    caffe_mean = IMAGENET_MEAN  # RGB here, although caffe-style networks take BGR
    suffixes: tuple[str, ...] = ()  # of listed names, beside none
    quality_tower: str | None = None
    masks_padding = True  # cells beyond an image learn nothing; points have no such rule
    relu_before_extra = False  # between the two coarse levels of the pyramid

    def __init__(
        self,
        *,
        backbone: str,
        num_classes: int,
        pretrained: bool,
        base_channels: int,
        frozen_stages: int,
        norm_eval: bool,
        fpn_channels: int,
        fpn_extra: ExtraFrom,
        tower_channels: int,
        tower_depth: int,
        group_norm: bool,
        grid: AnchorGrid | PointGrid,
        reduce: Reduce,
    ) -> None:
        """Builds the shared parts."""
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}; a detector needs at least one class")
        self.name = f"{self.family}_{backbone}"
        self.num_classes, self.grid, self.reduce = num_classes, grid, reduce
        self.options: dict[str, Any] = {}  # what `create_detector` was given, for model.json
        self.classes: list[str] | None = None
        self.input_size: tuple[int, int] | None = None  # (short, long) that `predict` resizes to
        self.backbone = Backbone(
            backbone,
            pretrained=pretrained,
            base_channels=base_channels,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
        )
        self.fpn = FPN(self.backbone.channels, fpn_channels, fpn_extra, self.relu_before_extra)
        self.strides = self.fpn.strides
        self.towers = nn.ModuleDict(
            {
                branch: Tower(fpn_channels, tower_channels, tower_depth, group_norm)
                for branch in ("cls", "box")
            }
        )
        self._register_normalization()

    def _register_normalization(self) -> None:
        caffe = self.backbone.caffe
        mean = self.caffe_mean if caffe else IMAGENET_MEAN
        std = (1.0, 1.0, 1.0) if caffe else IMAGENET_STD
        self.register_buffer("pixel_mean", torch.tensor(mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std), persistent=False)

    pixel_mean: Tensor
    pixel_std: Tensor

    # Stages, in the order of a forward pass.

    def normalize(self, batch: Batch) -> Tensor:
        """Images to float32 (B, 3, H, W), RGB or, caffe-style, BGR; padding is 0 afterwards."""
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        images = (batch.images.float() - mean) / std
        for image, (height, width) in zip(images, batch.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images.flip(1) if self.backbone.caffe else images

    def pyramid(self, images: Tensor) -> Pyramid:
        """Normalised images (B, 3, H, W) to P3..P7."""
        return self.fpn(self.backbone(images))  # type: ignore[no-any-return]

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """Towers, predictions and anchors of a pyramid."""
        kept: dict[str, list[list[Tensor]]] = {branch: [] for branch in self.towers}
        ends: dict[str, list[Tensor]] = {branch: [] for branch in self.towers}
        for branch, tower in self.towers.items():
            for level in pyramid:
                end, maps = tower(level, keep_pre_activation)
                ends[branch].append(end)
                kept[branch].append(maps)
        return DenseOutput(self._predict(ends), kept, self.grid(pyramid), pyramid)

    def head_from(self, tower: Mapping[str, Sequence[Tensor]], depth: int) -> Predictions:
        """Predictions from activated tower maps at `depth` (see `stages.DenseHead`)."""
        if not 0 <= depth <= self.tower_depth:
            raise ValueError(f"depth {depth}; {self.name} has tower depths 0..{self.tower_depth}")
        return self._predict(
            {
                branch: [self.towers[branch].resume(level, depth) for level in levels]  # type: ignore[operator]
                for branch, levels in tower.items()
            }
        )

    def forward(self, batch: Batch) -> DenseOutput:
        """All stages up to the predictions."""
        return self.head(self.pyramid(self.normalize(batch)))

    def _predict(self, ends: Mapping[str, Sequence[Tensor]]) -> Predictions:
        logits = [
            split_anchors(self.predict_cls(end), self.grid.per_location)
            for end in ends.get("cls", ())
        ]
        boxes = [
            split_anchors(self.predict_box(end, level), self.grid.per_location)
            for level, end in enumerate(ends.get("box", ()))
        ]
        if self.quality_tower is None or self.quality_tower not in ends:
            return Predictions(logits, boxes)
        quality = [self.predict_quality(end) for end in ends[self.quality_tower]]
        return Predictions(logits, boxes, quality)

    def predict_cls(self, end: Tensor) -> Tensor:
        """(B, C, H, W) of the tower's end to logits (B, A*K, H, W)."""
        raise NotImplementedError

    def predict_box(self, end: Tensor, level: int) -> Tensor:
        """(B, C, H, W) of the tower's end to encodings (B, A*D, H, W)."""
        raise NotImplementedError

    def predict_quality(self, end: Tensor) -> Tensor:
        """(B, C, H, W) of the end of the tower `quality_tower` to logits (B, A, H, W)."""
        raise NotImplementedError

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Flat encodings (..., P, D) on anchors (P, 4) to xyxy boxes (..., P, 4)."""
        raise NotImplementedError

    def match(self, anchors: list[Tensor], valid: Tensor, targets: Targets) -> Tensor:
        """The detector's assigner: (B, P) index of a box, or `BACKGROUND`, or `IGNORED`."""
        raise NotImplementedError

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms `task/...`; an assignment made before is reused."""
        raise NotImplementedError

    # What follows from the stages.

    @property
    def tower_depth(self) -> int:
        """Blocks in each tower."""
        return self.towers["cls"].depth  # type: ignore[return-value]

    def tower_channels_at(self, depth: int) -> int:
        """Channels of the tower maps at a depth."""
        return self.towers["cls"].channels_at(depth)  # type: ignore[operator, no-any-return]

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal for heads whose `assign` gives equal results on equal pyramids."""
        return type(self).match, self.grid.key, self.num_classes, self.reduce, self.strides

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment:
        """Who learns what, for the whole batch at once."""
        anchors = output.anchors
        valid = cells_on_image(output.pyramid, targets.sizes, self.grid.per_location)
        if not self.masks_padding:
            valid = torch.ones_like(valid)
        matched = self.match(anchors, valid, targets)
        positive = matched >= 0
        index = matched.clamp(min=0)
        labels = torch.where(positive, targets.labels.gather(1, index), self.num_classes)
        boxes = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return Assignment(
            labels=labels,
            weights=(matched != IGNORED).float(),
            positive=positive,
            boxes=boxes * positive[..., None],
            matched=matched.clamp(min=-1),
            num_positive=self.count_positive(positive),
        )

    def count_positive(self, positive: Tensor) -> Tensor:
        """The normaliser of a batch from (B, P) bool: an image without positives counts as one."""
        count = positive.sum(1).clamp(min=1).sum().float()
        return mean_over_processes(count, self.reduce)

    @torch.no_grad()
    def detect(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Best 1000 pairs of anchor and class per level, decoded, clipped, class-wise NMS.

        Published for heads with a quality branch: the class score alone passes the threshold and
        the 1000; from there on its product with the quality counts.
        """
        return [
            detect_image(self, output, i, size, score_threshold, max_detections)
            for i, size in enumerate(sizes)
        ]

    @torch.no_grad()
    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Detections of images of any sizes, in pixels of each image as given.

        Images are RGB (3, h, w), uint8 or float on the 0..255 scale, resized to the size the
        detector was trained at when it knows one. The detector is left in the mode it was in.
        """
        training = self.training
        self.eval()
        found = [predict_image(self, i, score_threshold, max_detections) for i in images]
        self.train(training)
        return found

    @staticmethod
    def flat_anchors(anchors: Sequence[Tensor]) -> Tensor:
        """All levels as (P, 4)."""
        return torch.cat(list(anchors))

    def weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multiplies each raw term by its weight and names it `task/...`."""
        return {f"task/{name}": value * self.loss_weights[name] for name, value in terms.items()}


def split_anchors(level: Tensor, per_location: int) -> Tensor:
    """(B, A*D, H, W) to (B, A, D, H, W)."""
    batch, _, height, width = level.shape
    return level.reshape(batch, per_location, -1, height, width)

"""The typed records that travel between the stages of a detector.

Letters used for shapes everywhere: B images, L levels, A anchors per location, K classes,
C channels, H x W the map of a level, P = sum over levels of H*W*A, N ground-truth boxes, R RoIs.
Boxes are `xyxy` in pixels of the padded batch unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detdistill.errors import UserError

IGNORE = -1
"""Label of a ground-truth slot that is padding, and of an anchor that nobody learns from."""
GROUND_TRUTH = -1
"""Level in `Proposals.origin` of a box that came from no level."""
PADDED_TO = 32
"""Images are padded to a multiple of this many pixels, so that the strides divide them."""


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch, padded so that assignment runs over the batch at once.

    Attributes:
        boxes: (B, N, 4) float32, xyxy in pixels of the padded batch; zeros where padded.
        labels: (B, N) int64, 0..K-1; `IGNORE` where padded.
        sizes: (h, w) of each image in pixels before padding.
    """

    boxes: Tensor
    labels: Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def present(self) -> Tensor:
        """(B, N) bool: which slots hold a box."""
        return self.labels >= 0

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on another device."""
        return Targets(
            self.boxes.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.sizes,
        )


@dataclass(frozen=True)
class Batch:
    """One prepared batch; student and teacher see the same one. `from_images` makes one.

    Attributes:
        images: (B, 3, H, W) uint8 or float, RGB, 0..255, padded at the right and the bottom; H and
            W are multiples of `PADDED_TO`. Floats outside 0..255 pass unchanged.
        sizes: (h, w) of each image in pixels before padding.
        targets: one dict per image: `boxes` (N, 4) xyxy in pixels of the batch, `labels` (N,)
            int64 in 0..K-1. Empty for prediction.
        image_ids: ids for messages; empty when unknown.
    """

    images: Tensor
    sizes: Sequence[tuple[int, int]]
    targets: Sequence[Mapping[str, Tensor]] = ()
    image_ids: Sequence[int] = ()

    @classmethod
    def from_images(
        cls,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] = (),
        image_ids: Sequence[int] = (),
    ) -> Batch:
        """Images (3, h, w) of any sizes, padded together; boxes stay where they are.

        Raises:
            UserError: no image, none that is a tensor of that shape, or images of several types.
        """
        shapes = [tuple(getattr(image, "shape", ())) for image in images]
        wrong = [
            f"an image that is a {type(image).__name__} of shape {shape}"
            for image, shape in zip(images, shapes, strict=True)
            if not isinstance(image, Tensor) or len(shape) != 3 or shape[0] != 3 or 0 in shape
        ]
        if wrong or not shapes:
            found = wrong[0] if wrong else "no image"
            raise UserError(f"a batch was given {found}; expected tensors (3, h, w), RGB, 0..255")
        kinds = list(dict.fromkeys(str(image.dtype) for image in images))
        if len(kinds) > 1:
            raise UserError(f"a batch was given images of {' and '.join(kinds)}; give one type")
        sizes = [(int(height), int(width)) for _, height, width in shapes]
        return cls(pad_images(images), sizes, targets, image_ids)

    def padded_targets(self) -> Targets:
        """The ground truth as one `Targets` record; `UserError` where its parts do not match."""
        counts = (len(self.images), len(self.sizes), len(self.targets))
        if len(set(counts)) > 1 or not counts[0]:
            raise UserError(
                "the batch has {} images, {} sizes and {} targets; give one of each per "
                "image".format(*counts)
            )
        # At least one slot, so that assignment needs no branch for batches without boxes.
        most = max((len(target["boxes"]) for target in self.targets), default=0) or 1
        boxes = self.images.new_zeros((len(self.sizes), most, 4), dtype=torch.float32)
        labels = torch.full(boxes.shape[:2], IGNORE, dtype=torch.int64, device=boxes.device)
        for i, target in enumerate(self.targets):
            _check_target(i, target)
            count = len(target["boxes"])
            boxes[i, :count] = target["boxes"].to(boxes)
            labels[i, :count] = target["labels"].to(labels)
        return Targets(boxes, labels, tuple((int(h), int(w)) for h, w in self.sizes))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; `DataLoader` calls it."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        targets = [
            {key: move(target[key]) for key in ("boxes", "labels")} for target in self.targets
        ]
        return Batch(move(self.images), self.sizes, targets, self.image_ids)


def _check_target(number: int, target: Mapping[str, Tensor]) -> None:
    """Shapes, box format and kind of labels of one image, all known without a look at values."""
    boxes, labels = target["boxes"], target["labels"]
    if boxes.shape != (len(boxes), 4) or labels.shape != (len(boxes),):
        raise UserError(
            f"target {number} of the batch has boxes {tuple(boxes.shape)} and labels "
            f"{tuple(labels.shape)}; expected (N, 4) and (N,)"
        )
    named = getattr(boxes, "format", None)  # of torchvision's tv_tensors
    if named is not None and named.name != "XYXY":
        raise UserError(
            f"target {number} of the batch has boxes of format {named.name}; expected XYXY"
        )
    if labels.is_floating_point() and len(labels):
        raise UserError(
            f"target {number} of the batch has labels of {labels.dtype}; expected whole numbers"
        )


@dataclass(frozen=True)
class Pyramid:
    """Feature maps from fine to coarse: `levels[l]` is (B, C, H_l, W_l) at `strides[l]` pixels."""

    levels: list[Tensor]
    strides: tuple[int, ...]

    def __iter__(self) -> Iterator[Tensor]:
        """Iterates over the level tensors."""
        return iter(self.levels)

    def __len__(self) -> int:
        """L, the number of levels."""
        return len(self.levels)

    def __getitem__(self, level: int) -> Tensor:
        """The map of one level."""
        return self.levels[level]


@dataclass(frozen=True)
class Predictions:
    """What a dense head predicts, as maps, a list over levels.

    Attributes:
        logits: (B, A, K, H, W) per level, before the sigmoid.
        boxes: (B, A, D, H, W) per level in the head's own encoding; D = 4, or 4*(R+1) for
            distributions over R+1 bins.
        quality: (B, A, H, W) logits per level, or None where the head has no quality branch.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    quality: list[Tensor] | None = None

    def flatten(self) -> FlatPredictions:
        """All levels as (B, P, ...), position-major, anchors fastest; float32."""
        quality = None
        if self.quality is not None:
            flat = [q.permute(0, 2, 3, 1).flatten(1) for q in self.quality]
            quality = torch.cat(flat, 1).float()
        return FlatPredictions(flatten_maps(self.logits), flatten_maps(self.boxes), quality)


@dataclass(frozen=True)
class FlatPredictions:
    """`Predictions` over all levels: logits (B, P, K), boxes (B, P, D), quality (B, P) or None."""

    logits: Tensor
    boxes: Tensor
    quality: Tensor | None


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """List of (B, A, D, H, W) to (B, P, D) float32, in the order of the anchors; [] to (0,)."""
    if not maps:
        return torch.zeros(0)
    return torch.cat([m.permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], 1).float()


def rows_of_maps(maps: Sequence[Tensor], image: Tensor, row: Tensor) -> Tensor:
    """`flatten_maps(maps)[image, row]` without flattening: few rows of large maps.

    Args:
        maps: per level (B, A, D, H, W).
        image: (M,) int64, 0..B-1.
        row: (M,) int64, 0..P-1.

    Returns:
        (M, D) float32.
    """
    found = maps[0].new_zeros((len(row), maps[0].shape[2]), dtype=torch.float32)
    start = 0
    for level in maps:
        _, anchors, _, height, width = level.shape
        count = anchors * height * width
        inside = (row >= start) & (row < start + count)
        # All rows are read at every level and the wrong ones dropped: a GPU need not wait for us.
        local = (row - start).clamp(0, count - 1)
        cell, anchor = local // anchors, local % anchors
        picked = level[image, anchor, :, cell // width, cell % width].float()
        found = torch.where(inside[:, None], picked, found)
        start += count
    return found


@dataclass(frozen=True)
class DenseOutput:
    """All that a dense detector computed for a batch.

    Attributes:
        predictions: the head's predictions.
        towers: `towers[branch][level][depth]`; depth 0 is the pyramid level, depth d the output of
            tower block d AFTER its activation, or before it when the head was asked to keep
            pre-activation maps (depth 0 has no activation).
        anchors: per level (H*W*A, 4), xyxy pixels; for points both corners are the point.
        pyramid: the pyramid that the head ran on.
        features: what only some heads have.
    """

    predictions: Predictions
    towers: dict[str, list[list[Tensor]]]
    anchors: list[Tensor]
    pyramid: Pyramid
    features: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """Who learns what: one row per anchor of every image.

    Attributes:
        labels: (B, P) int64: 0..K-1 for positives, K for background. Where `weights` is 0 it
            means nothing.
        weights: (B, P) float32: 1 where the classification learns, 0 for ignored anchors and for
            cells beyond the image.
        positive: (B, P) bool.
        boxes: (B, P, 4) the matched ground truth, xyxy pixels; zeros for the rest.
        matched: (B, P) int64 index of the ground-truth box, -1 for the rest.
        num_positive: scalar float32: positives of the batch as the detector counts them, never 0,
            of this process or the mean over processes, as the detector's `reduce` says.
        quality: (B, P) float32 target of the quality branch, 0..1 (centerness), 0 for the rest;
            None where the head has no such branch.
    """

    labels: Tensor
    weights: Tensor
    positive: Tensor
    boxes: Tensor
    matched: Tensor
    num_positive: Tensor
    quality: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """Boxes that an RoI head looks at, lists over the images of a batch; without gradient.

    Attributes:
        boxes_xyxy: (R, 4) float32, pixels of the padded batch.
        scores: (R,) float32, 0..1: how much of an object; 1 for ground truth.
        origin: (R, 4) int64: pyramid level, y, x and anchor that each box came from; the level is
            `GROUND_TRUTH` for a ground-truth box among the sampled ones.
        labels: (R,) int64, 0..K-1, K for background; None before sampling.
        matched_boxes: (R, 4) the ground truth to learn, zeros for background; None before sampling.
    """

    boxes_xyxy: list[Tensor]
    scores: list[Tensor]
    origin: list[Tensor]
    labels: list[Tensor] | None = None
    matched_boxes: list[Tensor] | None = None

    @property
    def from_truth(self) -> list[Tensor]:
        """(R,) bool per image: which boxes are the ground truth itself."""
        return [origin[:, 0] == GROUND_TRUTH for origin in self.origin]

    @property
    def image_index(self) -> Tensor:
        """(R of all images,) int64: the image of each box, in the order of `RoIOutput`."""
        return torch.cat(
            [origin.new_full((len(origin),), i) for i, origin in enumerate(self.origin)]
        )


@dataclass(frozen=True)
class RoIOutput:
    """What an RoI head computed for `Proposals`: the RoIs of all images, one after another.

    Attributes:
        features: (R, C) per shared fully connected layer, AFTER its activation.
        logits: (R, K+1) before the softmax, background last.
        boxes: (R, 4*K) deltas, class-major, or (R, 4) where all classes share them.
    """

    features: list[Tensor]
    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class TwoStageAssignment:
    """Who learns what in a two-stage detector.

    Attributes:
        dense: of the RPN's anchors; its only class is "object".
        rois: the sampled proposals with what they learn.
    """

    dense: Assignment
    rois: Proposals


@dataclass(frozen=True)
class Detections:
    """Final boxes of one image, best first.

    Attributes:
        boxes_xyxy: (M, 4) pixels.
        scores: (M,) 0..1.
        labels: (M,) int64, 0..K-1.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """M, the number of boxes."""
        return len(self.scores)

    def scaled(self, scale_x: float, scale_y: float) -> Detections:
        """The same detections with boxes multiplied per axis."""
        factor = self.boxes_xyxy.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return Detections(self.boxes_xyxy * factor, self.scores, self.labels)


def pad_images(images: Sequence[Tensor]) -> Tensor:
    """(3, h, w) each, of one type, to (B, 3, H, W), zeros at the right and the bottom."""
    height, width = (
        -(-max(image.shape[side] for image in images) // PADDED_TO) * PADDED_TO for side in (1, 2)
    )
    padded = images[0].new_zeros((len(images), 3, height, width))
    for slot, image in zip(padded, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return padded

"""What all dense heads share: two towers on a pyramid, run level by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.inference import detect_image
from detdistill.detectors.proposals import NMS_THRESHOLD, propose
from detdistill.parts.anchors import AnchorGrid, PointGrid, cells_on_image
from detdistill.parts.assigners import IGNORED, take_matches
from detdistill.parts.heads import Tower
from detdistill.parts.losses import Reduce, mean_over_processes
from detdistill.structures import (
    Assignment,
    DenseOutput,
    Detections,
    Predictions,
    Proposals,
    Pyramid,
    Targets,
)


class DenseDetector(FPNDetector):
    """Backbone, FPN, a classification and a box tower.

    A subclass adds its predictors (`predict_cls`, `predict_box`), `decode`, `match` and `loss`;
    with a quality branch also `quality_tower`, the tower it sits on, and `predict_quality`.

    Args:
        tower_channels: channels of the towers.
        tower_depth: blocks in each tower.
        group_norm: GroupNorm in the towers.
        grid: the anchors or points.
        reduce: whether normalisers are averaged over processes ("global") or not ("local").
        body: keywords of `FPNDetector`.
    """

    box_coding: str
    nms_threshold: float
    quality_tower: str | None = None
    inner_maps: tuple[str, ...] = ()  # in `DenseOutput.features`, after ReLU, as wide as the towers
    masks_padding = True  # cells beyond an image learn nothing; points have no such rule

    def __init__(
        self,
        *,
        tower_channels: int,
        tower_depth: int,
        group_norm: bool,
        grid: AnchorGrid | PointGrid,
        reduce: Reduce,
        **body: Any,
    ) -> None:
        """Builds the shared parts."""
        super().__init__(**body)
        self.grid, self.reduce = grid, reduce
        self.towers = nn.ModuleDict(
            {
                branch: Tower(self.pyramid_channels, tower_channels, tower_depth, group_norm)
                for branch in ("cls", "box")
            }
        )

    # Stages, in the order of a forward pass.

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """Towers, predictions and anchors of a pyramid."""
        ends, kept = self.run_towers(pyramid, keep_pre_activation)
        return DenseOutput(self._predict(ends), kept, self.grid(pyramid), pyramid)

    def run_towers(
        self, pyramid: Pyramid, keep_pre_activation: bool
    ) -> tuple[dict[str, list[Tensor]], dict[str, list[list[Tensor]]]]:
        """The end of each branch's tower per level, and all that `DenseOutput.towers` keeps."""
        kept: dict[str, list[list[Tensor]]] = {branch: [] for branch in self.towers}
        ends: dict[str, list[Tensor]] = {branch: [] for branch in self.towers}
        for branch, tower in self.towers.items():
            for level in pyramid:
                end, maps = tower(level, keep_pre_activation)
                ends[branch].append(end)
                kept[branch].append(maps)
        return ends, kept

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

    def towers_for(self, prediction: str) -> tuple[str, ...]:
        """The towers that "cls", "box" or "quality" predictions are computed from."""
        return (str(self.quality_tower) if prediction == "quality" else prediction,)

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

    def with_quality(self, scores: Tensor, quality: Tensor) -> Tensor:
        """Final scores (...) from class scores, 0..1, and quality logits (...)."""
        return scores * quality.sigmoid()

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
        valid = self.valid_cells(output, targets)
        return self.assignment_of(self.match(output.anchors, valid, targets), targets)

    def valid_cells(self, output: DenseOutput, targets: Targets) -> Tensor:
        """(B, P) bool: the anchors that take part in the assignment."""
        valid = cells_on_image(output.pyramid, targets.sizes, self.grid.per_location)
        return valid if self.masks_padding else torch.ones_like(valid)

    def assignment_of(self, matched: Tensor, targets: Targets) -> Assignment:
        """The record of what an assigner returned (see `match`)."""
        positive, labels, boxes = take_matches(matched, targets, self.num_classes)
        return Assignment(
            labels=labels,
            weights=(matched != IGNORED).float(),
            positive=positive,
            boxes=boxes,
            matched=matched.clamp(min=-1),
            num_positive=self.count_positive(positive),
        )

    def class_targets(self, output: DenseOutput, assignment: Assignment) -> Tensor:
        """(B, P) the score that each positive's class learns, 0 elsewhere."""
        return assignment.positive.float()

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

    def propose(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        per_level: int = 2000,
        max_per_image: int = 1000,
        nms_threshold: float = NMS_THRESHOLD,
        min_size: float = 0.0,
    ) -> Proposals:
        """The head as an RPN; keywords as `proposals.propose`."""
        return propose(
            self,
            output,
            sizes,
            per_level=per_level,
            max_per_image=max_per_image,
            nms_threshold=nms_threshold,
            min_size=min_size,
        )

    @staticmethod
    def flat_anchors(anchors: Sequence[Tensor]) -> Tensor:
        """All levels as (P, 4)."""
        return torch.cat(list(anchors))


def split_anchors(level: Tensor, per_location: int) -> Tensor:
    """(B, A*D, H, W) to (B, A, D, H, W)."""
    batch, _, height, width = level.shape
    return level.reshape(batch, per_location, -1, height, width)

r"""The contract: which stages a detector shows, and how a method may re-enter them.

A detector is a chain of pure stages, each returning a typed record of `structures`:

    Batch -normalize-> images -pyramid-> Pyramid -head-> DenseOutput -detect-> Detections
                                                    \-assign-> Assignment -> loss

A distillation method never reaches inside. It reads records, and it may call a stage of either
model again: CrossKD sends the student's tower maps through the teacher's `head_from`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from detdistill.structures import (
    Assignment,
    Batch,
    DenseOutput,
    Detections,
    Predictions,
    Pyramid,
    Targets,
)


class Detector(Protocol):
    """What every detector shows.

    Attributes:
        name: registry name, e.g. "gfl_r18".
        num_classes: K.
        strides: of the pyramid levels.
        pixel_mean, pixel_std: on the 0..255 scale, RGB; they travel with the weights.
    """

    name: str
    num_classes: int
    strides: tuple[int, ...]

    def normalize(self, batch: Batch) -> Tensor:
        """Images (B, 3, H, W) in the model's own channel order; padding is 0 afterwards."""

    def pyramid(self, images: Tensor) -> Pyramid:
        """Normalised images to feature maps."""

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """Scalar terms, each already weighted; an assignment made before is reused."""

    def detect(self, output: DenseOutput, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Final boxes per image, in pixels of the batch, clipped to (h, w) of `sizes`."""


@runtime_checkable
class DenseHead(Protocol):
    """A head that predicts at every location: RetinaNet, GFL and their kin.

    Attributes:
        family: key of published settings, e.g. "gfl".
        box_coding: "deltas" on anchors, "distances" or a "distribution" of them, or "points".
        assignment_key: equal for heads whose `assign` gives equal results on equal pyramids.
    """

    family: str
    box_coding: str

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal for heads whose `assign` gives equal results on equal pyramids."""

    @property
    def tower_depth(self) -> int:
        """Blocks in each tower."""

    def tower_channels_at(self, depth: int) -> int:
        """Channels of the tower map at a depth."""

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """Towers, predictions and anchors of a pyramid."""

    def towers_for(self, prediction: str) -> tuple[str, ...]:
        """The branches that "cls", "box" or "quality" predictions are computed from."""

    def head_from(self, tower: Mapping[str, Sequence[Tensor]], depth: int) -> Predictions:
        """Resumes after `depth` tower blocks.

        `tower` maps a branch ("cls", "box") to its level maps at that depth, activated (depth 0:
        the pyramid level). Predictions that need a branch that is left out are empty.
        """

    def decode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Flat encodings (B, P, D) on anchors (P, 4) to boxes (B, P, 4), pixels of the batch."""

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment:
        """Who learns what; call it once per batch and share it."""

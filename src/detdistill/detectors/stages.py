r"""The contract: which stages a detector shows, and how a method may re-enter them.

A detector is a chain of pure stages, each returning a typed record of `structures`:

    Batch -normalize-> images -pyramid-> Pyramid -head-> DenseOutput -detect-> Detections
                                                    \-assign-> Assignment -> loss

A two-stage detector's `head` is its RPN; `assign` and `detect` begin with

    DenseOutput -propose-> Proposals (-sample-> Proposals) -roi-> RoIOutput

A distillation method never reaches inside. It reads records, and it may call a stage of either
model again: CrossKD sends the student's tower maps through the teacher's `head_from`, HEAD the
student's proposals through the teacher's `roi`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from detdistill.structures import (
    Assignment,
    Batch,
    DenseOutput,
    Detections,
    Predictions,
    Proposals,
    Pyramid,
    RoIOutput,
    Targets,
    TwoStageAssignment,
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
        self, output: DenseOutput, targets: Targets, assignment: Any = None
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

    def propose(self, output: DenseOutput, sizes: Sequence[tuple[int, int]]) -> Proposals:
        """The head as an RPN: the boxes most likely to hold an object; without gradient."""


@runtime_checkable
class RoIStages(Protocol):
    """What a two-stage detector shows beside `head`, its RPN: Faster R-CNN, Cascade R-CNN.

    `stage` counts the RoI heads of a cascade. The boxes of a later stage are those that the one
    before it moved, so they are sampled again.
    """

    def propose(self, output: DenseOutput, sizes: Sequence[tuple[int, int]]) -> Proposals:
        """The boxes most likely to hold an object; without gradient."""

    def assign(self, output: DenseOutput, targets: Targets) -> TwoStageAssignment:
        """The RPN's anchors, and the proposals sampled for the first RoI head."""

    def sample(self, proposals: Proposals, targets: Targets, stage: int = 0) -> Proposals:
        """Which proposals learn and what; keeps `origin`, marks the ground truth."""

    def roi(self, pyramid: Pyramid, proposals: Proposals, stage: int = 0) -> RoIOutput:
        """What an RoI head says of any boxes on any pyramid of its width."""

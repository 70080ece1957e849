r"""The contract: which stages a detector shows, and how a method may re-enter them.

A detector is a chain of pure stages, each returning a typed record of `structures`:

    Batch -normalize-> images -pyramid-> Pyramid -head-> DenseOutput -detect-> Detections
                                                    \-assign-> Assignment -> loss

A two-stage detector's `head` is its RPN; `assign` and `detect` begin with

    DenseOutput -propose-> Proposals (-sample-> Proposals) -roi-> RoIOutput

A distillation method never reaches inside. It reads records, and it may call a stage of either
model again: CrossKD sends the student's tower maps through the teacher's `head_from`, HEAD the
student's proposals through the teacher's `roi`.

All that the `Distiller` and most methods read of a detector stands in `Detector` and `DenseHead`;
a class that derives from `FPNDetector` or `DenseDetector` has it. HEAD, TF-HEAD, G-DetKD and
`crosskd_roi` copy heads or read inside them: they take a `DenseDetector` or a `TwoStageDetector`
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from detdistill.parts.anchors import AnchorGrid, PointGrid
from detdistill.parts.losses import Reduce
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
        family: key of published settings, e.g. "gfl".
        options: the keywords it was built with, which are saved with it.
        num_classes: K.
        classes: their names in the order of the labels; None where they are not known.
        input_size: (short, long) in pixels that `predict` resizes to; None: as the image is.
        strides: of the pyramid levels.
        loss_weights: factor of each term of `loss`, by its name without "task/".
        pixel_mean, pixel_std: on the 0..255 scale, RGB; they travel with the weights.
    """

    name: str
    family: str
    options: dict[str, Any]
    num_classes: int
    classes: list[str] | None
    input_size: tuple[int, int] | None
    strides: tuple[int, ...]
    loss_weights: Mapping[str, float]
    pixel_mean: Tensor
    pixel_std: Tensor

    @property
    def pyramid_channels(self) -> int:
        """C of every pyramid level."""

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal for detectors whose `assign` gives equal results on equal pyramids."""

    def normalize(self, batch: Batch) -> Tensor:
        """Images (B, 3, H, W) in the model's own channel order; padding is 0 afterwards."""

    def pyramid(self, images: Tensor) -> Pyramid:
        """Normalised images to feature maps."""

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """What is predicted at every location of the pyramid."""

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment | TwoStageAssignment:
        """Who learns what; called once per batch and shared."""

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Any = None
    ) -> dict[str, Tensor]:
        """Scalar terms, each already weighted; an assignment made before is reused."""

    def detect(self, output: DenseOutput, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Final boxes per image, in pixels of the batch, clipped to (h, w) of `sizes`."""


@runtime_checkable
class DenseHead(Protocol):
    """A head that predicts at every location: RetinaNet, GFL and their kin; beside `Detector`.

    Attributes:
        box_coding: "deltas" on anchors, "distances" or a "distribution" of them, or "points"; a
            distribution has `reg_max`, its number of bins less one, too.
        quality_tower: the branch that a quality branch (centerness) sits on; None without one.
        grid: the anchors or points: `per_location` is A, `key` is equal where they are.
        reduce: whether normalisers are averaged over processes ("global") or not ("local").
    """

    box_coding: str
    quality_tower: str | None
    grid: AnchorGrid | PointGrid
    reduce: Reduce

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

    def flat_anchors(self, anchors: Sequence[Tensor]) -> Tensor:
        """The anchors of all levels as (P, 4)."""

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


def lacking(model: object, *contracts: type) -> list[str]:
    """The members of these protocols that an object does not have, in their order."""
    wanted = [
        name
        for contract in contracts
        for name in (*contract.__annotations__, *vars(contract))
        if not name.startswith("_")
    ]
    # The class first: a property of a detector may be meant to be overridden, and raise.
    return [
        name
        for name in dict.fromkeys(wanted)
        if not hasattr(type(model), name) and not hasattr(model, name)
    ]

"""Plain prediction mimicking, what CrossKD (arXiv 2306.11369) is compared with.

The student's own predictions copy the teacher's and learn from the ground truth at the same time.
No configuration of it was released: the losses, weights and normalisers are CrossKD's, which leaves
the detour through the teacher's head as the only difference between the two.
"""

from __future__ import annotations

from typing import Annotated, cast

from annotated_types import Gt
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import check_same_anchors, check_same_classes, require_dense
from detdistill.distill.crosskd import PredictionLoss
from detdistill.distill.method import METHODS, Method, Step
from detdistill.distill.published import BoxLoss


@METHODS.register("mimic")
class PredictionMimicking(Method):
    """The student's predictions towards the teacher's; the two need the same anchors or points.

    Terms: `mimic/cls`, `mimic/box` and `mimic/quality`, as those of `CrossKD`. Where one side lacks
    the distributions or the quality branch that CrossKD compares for this teacher, decoded boxes
    are compared by GIoU and the quality is left out.

    Args:
        cls: distil the classification branch.
        box: distil the box branch.
        quality: distil the quality branch; None as CrossKD does, where both sides have one.
        cls_weight: factor of `mimic/cls`; None as CrossKD's for this teacher, like all weights.
        box_weight: factor of `mimic/box`.
        quality_weight: factor of `mimic/quality`; 1 where nothing is published.
        box_loss: "kl" needs distributions on both sides, "giou" and "iou" (-log IoU) fit any.
        temperature: of the KL.
    """

    def __init__(
        self,
        *,
        cls: bool = True,
        box: bool = True,
        quality: bool | None = None,
        cls_weight: float | None = None,
        box_weight: float | None = None,
        quality_weight: float | None = None,
        box_loss: BoxLoss | None = None,
        temperature: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        """None means CrossKD's published value for the teacher's family."""
        super().__init__()
        self.loss = PredictionLoss(
            "mimic",
            {"cls": cls, "box": box, "quality": quality},
            {"cls": cls_weight, "box": box_weight, "quality": quality_weight},
            box_loss,
            temperature,
        )

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair and fills in the published settings."""
        teacher = require_dense(teacher, "mimic", "teacher")
        student = require_dense(student, "mimic", "student")
        check_same_classes(student, teacher, "mimic")
        check_same_anchors(student, teacher, "mimic")
        self.loss.settle(teacher, predictor=student)
        self.weights = self.loss.weights

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw terms `cls`, `box` and `quality` as far as wanted, summed over all levels."""
        student = cast(DenseDetector, step.student_model)  # `prepare` has made sure
        return self.loss(step.student.predictions.flatten(), step, student.decode)

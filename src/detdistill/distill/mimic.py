"""Plain prediction mimicking, what CrossKD (arXiv 2306.11369) is compared with.

The student's own predictions copy the teacher's and learn from the ground truth at the same time.
No configuration of it was released: the losses, weights and normalisers are CrossKD's, which leaves
the detour through the teacher's head as the only difference between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, cast

import torch
from annotated_types import Gt
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import check_same_anchors, check_same_classes, require_dense
from detdistill.distill.crosskd import PredictionLoss
from detdistill.distill.method import METHODS, Method, Step
from detdistill.distill.published import BoxLoss
from detdistill.errors import UserError
from detdistill.registry import check_choice


@METHODS.register("mimic")
class PredictionMimicking(Method):
    """The student's predictions towards the teacher's; both on the same anchors by default.

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
        anchors: "same" compares anchor by anchor. With "best" a student of one prediction a cell
            copies the anchor of the cell that the teacher scores highest, e.g. one of RetinaNet's
            nine; reconstructed: how the paper's severe target conflict was made is unknown.
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
        anchors: Literal["same", "best"] = "same",
    ) -> None:
        """None means CrossKD's published value for the teacher's family."""
        super().__init__()
        check_choice("mimic: anchors", anchors, ("same", "best"))
        self.anchors = anchors
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
        if self.anchors == "same":
            way_out = "anchors 'best', by which each cell of the student copies the teacher's best"
            fits = _one_per_cell(student, teacher)
            check_same_anchors(student, teacher, "mimic", way_out if fits else "")
        else:
            _check_one_per_cell(student, teacher)
        self.loss.settle(teacher, predictor=student)
        self.weights = self.loss.weights

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw terms `cls`, `box` and `quality` as far as wanted, summed over all levels."""
        student = cast(DenseDetector, step.student_model)  # `prepare` has made sure
        found = step.student.predictions.flatten()
        if self.anchors == "same":
            return self.loss(found, step, student.decode)
        anchors = student.flat_anchors(step.student.anchors)
        choose = _best_of_cell(step)
        return self.loss(found, step, lambda boxes, _: student.decode(boxes, anchors), choose)


def _one_per_cell(student: DenseDetector, teacher: DenseDetector) -> bool:
    """Whether the student can copy one of the teacher's predictions in each cell."""
    return student.grid.per_location == 1 and student.strides == teacher.strides


def _check_one_per_cell(student: DenseDetector, teacher: DenseDetector) -> None:
    if not _one_per_cell(student, teacher):
        raise UserError(
            f"mimic: anchors 'best' needs a student with one prediction a cell, on the teacher's "
            f"levels; {student.name} has {student.grid.per_location} a cell at strides "
            f"{list(student.strides)}, the teacher {teacher.name} strides {list(teacher.strides)}"
        )


def _best_of_cell(step: Step) -> Callable[[Tensor], Tensor]:
    """Takes from (B, cells * A, ...) of the teacher the A-th that it scores highest, per cell."""
    assert step.teacher is not None
    per_cell = step.dense_teacher.grid.per_location
    scores = step.teacher.predictions.flatten().logits.amax(-1)
    best = scores.reshape(len(scores), -1, per_cell).argmax(-1, keepdim=True)  # (B, cells, 1)

    def choose(of_teacher: Tensor) -> Tensor:
        split = of_teacher.reshape(*best.shape[:2], per_cell, *of_teacher.shape[2:])
        index = best.reshape(*best.shape, *(1,) * (split.dim() - 3))
        return torch.take_along_dim(split, index, 2).squeeze(2)

    return choose

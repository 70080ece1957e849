"""Soft labels: the teacher's class scores at the positives, what rank mimicking is compared with.

The paper of RM (arXiv 2112.04840) calls soft-label distillation its baseline; its formula was not
at hand. This is our choice of it: Hinton's distillation (arXiv 1503.02531) for heads that score
each class by a sigmoid.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.distill.adapters import check_same_anchors, check_same_classes, require_dense
from detdistill.distill.method import METHODS, Method, Step
from detdistill.parts.losses import bernoulli_kl
from detdistill.registry import check_positive
from detdistill.structures import rows_of_maps


@METHODS.register("soft_label")
class SoftLabel(Method):
    """KL(teacher || student) of every class score at the teacher's positives.

    Term: `soft_label/cls`, summed over classes and positives, over the number of positives. Its
    gradient is that of the BCE towards the teacher's scores. `mimic` differs by weighing with the
    gap between the scores, and by background anchors and boxes.

    Args:
        weight: factor of `soft_label/cls`.
        temperature: divides both logits.
    """

    def __init__(self, *, weight: float = 1.0, temperature: Annotated[float, Gt(0)] = 1.0) -> None:
        """Nothing is published: the defaults are the plainest."""
        super().__init__()
        check_positive("soft_label: temperature", temperature)
        self.weights, self.temperature = {"cls": weight}, temperature

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair."""
        teacher = require_dense(teacher, "soft_label", "teacher")
        student = require_dense(student, "soft_label", "student")
        check_same_classes(student, teacher, "soft_label")
        check_same_anchors(student, teacher, "soft_label")

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw term `cls`."""
        assert step.teacher is not None
        assignment = step.teacher_assignment
        image, row = assignment.positive.nonzero(as_tuple=True)
        student, teacher = (
            rows_of_maps(output.predictions.logits, image, row)
            for output in (step.student, step.teacher)
        )
        total = bernoulli_kl(student, teacher, self.temperature).sum()
        return {"cls": total / assignment.num_positive}

"""What a distillation method is and what it sees of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from detdistill.detectors.dense import DenseDetector
from detdistill.registry import Registry, checked_keywords
from detdistill.structures import Assignment, DenseOutput, Targets


@dataclass
class Step:
    """One training step, as a method sees it.

    Attributes:
        student: the student's output, with gradient.
        teacher: the teacher's output on the same batch, without; None for teacher-free methods.
        student_model: for its stages.
        teacher_model: for its stages; its parameters are frozen.
        targets: ground truth of the batch.
        student_assignment: made once and shared with the student's own loss.
        iteration: optimisation steps before this one.
    """

    student: DenseOutput
    teacher: DenseOutput | None
    student_model: DenseDetector
    teacher_model: DenseDetector | None
    targets: Targets
    student_assignment: Assignment
    iteration: int
    _teacher_assignment: Assignment | None = None

    @property
    def teacher_assignment(self) -> Assignment:
        """By the teacher's anchors and assigner; the student's own where both are equal."""
        assert self.teacher is not None and self.teacher_model is not None
        if self._teacher_assignment is None:
            if self.teacher_model.assignment_key == self.student_model.assignment_key:
                self._teacher_assignment = self.student_assignment
            else:
                self._teacher_assignment = self.teacher_model.assign(self.teacher, self.targets)
        return self._teacher_assignment


class Method(nn.Module):
    """A distillation method: settings, adapters if any, and raw loss terms of a step.

    Class attributes:
        needs_teacher: False for teacher-free methods.

    Attributes:
        weights: factor of each raw term; known after `prepare`.
        keep_pre_activation: whether tower maps are wanted before the activation.
    """

    needs_teacher = True
    keep_pre_activation = False
    weights: Mapping[str, float]

    def prepare(self, student: DenseDetector, teacher: DenseDetector | None) -> None:
        """Checks the pair and builds adapters; called once, before the first batch.

        Raises:
            UserError: one sentence when the pair does not fit.
        """
        raise NotImplementedError

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw scalar terms, the same keys in every step, exactly 0 where nothing applies."""
        raise NotImplementedError


METHODS: Registry[type[Method]] = Registry("method")


def list_methods(pattern: str = "*") -> list[str]:
    """Names that `create_method` and `--method` take."""
    return METHODS.names(pattern)


def create_method(name: str, **options: Any) -> Method:
    """A method by name with its own keywords; `UserError` for an unknown name or keyword."""
    entry = METHODS.get(name)
    return entry(**checked_keywords(f"method {name!r}", entry, options))

"""What a distillation method is and what it sees of a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.schedule import TIMING, Schedule
from detdistill.errors import UserError
from detdistill.registry import Registry, checked_keywords
from detdistill.structures import (
    Assignment,
    DenseOutput,
    Proposals,
    Targets,
    TwoStageAssignment,
)


@dataclass
class Step:
    """One training step, as a method sees it.

    Attributes:
        student: the student's output, with gradient.
        teacher: the teacher's output on the same batch, without; None for teacher-free methods.
        student_model: for its stages.
        teacher_model: for its stages; its parameters are frozen.
        targets: ground truth of the batch.
        student_assignment: made once and shared with the student's own loss: an `Assignment` of a
            dense student, a `TwoStageAssignment` of a two-stage one.
        iteration: optimisation steps before this one.
        pre_activation: whether some method had the towers' maps kept as they are before it.
    """

    student: DenseOutput
    teacher: DenseOutput | None
    student_model: FPNDetector
    teacher_model: FPNDetector | None
    targets: Targets
    student_assignment: Assignment | TwoStageAssignment
    iteration: int
    _teacher_assignment: Assignment | None = None
    pre_activation: bool = False

    @property
    def dense_teacher(self) -> DenseDetector:
        """The teacher's model, of which `prepare` has made sure that it is dense."""
        return cast(DenseDetector, self.teacher_model)

    @property
    def dense_assignment(self) -> Assignment:
        """The student's, of which `prepare` has made sure that it is dense."""
        assert isinstance(self.student_assignment, Assignment)
        return self.student_assignment

    @property
    def sampled_rois(self) -> Proposals:
        """What a two-stage student, as `prepare` has made sure, sampled for its own RoI heads."""
        assert isinstance(self.student_assignment, TwoStageAssignment)
        return self.student_assignment.rois

    @property
    def teacher_assignment(self) -> Assignment:
        """By a dense teacher's anchors and assigner; the student's own where both are equal."""
        assert self.teacher is not None
        if self._teacher_assignment is None:
            if self.dense_teacher.assignment_key == self.student_model.assignment_key:
                self._teacher_assignment = self.dense_assignment
            else:
                self._teacher_assignment = self.dense_teacher.assign(self.teacher, self.targets)
        return self._teacher_assignment


class Method(nn.Module):
    """A distillation method: settings, adapters if any, and raw loss terms of a step.

    Class attributes:
        needs_teacher: False for methods that work without a teacher.
        takes_teacher: False for methods that ignore one.
        teacher_stage: how far the teacher runs: to its "head" or only to its "pyramid".

    Attributes:
        weights: factor of each raw term; known after `prepare`.
        keep_pre_activation: whether tower maps are wanted before the activation.
        schedule: when it acts; `create_method` takes start, stop and warmup for it.
        prepared: whether a `Distiller` holds it: settings and adapters are those of a pair then.
    """

    needs_teacher = True
    takes_teacher = True
    teacher_stage: Literal["head", "pyramid"] = "head"
    keep_pre_activation = False
    weights: Mapping[str, float]
    schedule = Schedule()
    prepared = False

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """By which its terms go, by the beginning of their names; "" for all that remain."""
        return {"": self.schedule}

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair and builds adapters; called once, before the first batch.

        Raises:
            UserError: one sentence when the pair does not fit.
        """
        raise NotImplementedError

    def factor(self, term: str, iteration: int) -> float:
        """Of a term's weight after `iteration` steps; a method may exempt some of its terms."""
        return self.schedule.factor(iteration)

    def factors(self, iteration: int) -> dict[str, float]:
        """Of every term's weight after `iteration` steps."""
        return {term: self.factor(term, iteration) for term in self.weights}

    def is_taught(self, iteration: int) -> bool:
        """Whether the teacher has something to say to it after `iteration` steps."""
        return self.needs_teacher and any(self.factors(iteration).values())

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw scalar terms, the same keys in every step, exactly 0 where nothing applies."""
        raise NotImplementedError


METHODS: Registry[type[Method]] = Registry("method")


def list_methods(pattern: str = "*") -> list[str]:
    """Names that `create_method` and `--method` take."""
    return METHODS.names(pattern)


def create_method(name: str, **options: Any) -> Method:
    """A method by name with its own keywords and those of `Schedule`.

    Raises:
        UserError: for an unknown name or keyword, or a value of the wrong type.
    """
    entry = METHODS.get(name)
    timing = {key: options.pop(key) for key in TIMING if key in options}
    method = entry(**checked_keywords(f"method {name!r}", entry, options, TIMING))
    if timing:
        timing = checked_keywords(f"method {name!r}", Schedule, vars(method.schedule) | timing)
        try:
            method.schedule = Schedule(**timing)
        except UserError as error:
            raise UserError(f"method {name!r}: {error}") from None
    return method

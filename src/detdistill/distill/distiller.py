"""Student, frozen teacher and methods as one trainable module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.distill.inputs import (
    check_kinds,
    check_method,
    check_targets,
    check_trainable,
    check_weights,
)
from detdistill.distill.method import Method, Step
from detdistill.distill.schedule import silent
from detdistill.structures import (
    Assignment,
    Batch,
    DenseOutput,
    Predictions,
    Targets,
    TwoStageAssignment,
)


class Distiller(nn.Module):
    """Computes every loss term of a batch.

    The student and the methods (with their adapters) are its parameters. The teacher is no
    registered submodule: it is frozen, stays in eval mode, moves along between devices, and is in
    no state_dict. Without methods this is plain training.

    `iteration`, on which warm-ups rest, counts the forward passes in training mode. Where several
    of them make one optimisation step, set it to the number of steps before each.

    Args:
        student: what is trained.
        teacher: what it learns from, or None. One that no method learns from during training is
            let go when the methods are prepared.
        methods: by name, e.g. `{"crosskd": CrossKD()}`; the name prefixes the terms.

    Raises:
        UserError: when a method does not fit the pair, or what is given is no detector or method.
    """

    def __init__(
        self,
        student: FPNDetector,
        teacher: FPNDetector | None = None,
        methods: Mapping[str, Method] | None = None,
    ) -> None:
        """Prepares every method for the pair."""
        super().__init__()
        methods = {} if methods is None else methods
        check_kinds(student, teacher, methods)
        for name, method in methods.items():
            check_method(name, method, teacher)
            method.prepare(student, teacher)
            method.prepared = True
            check_weights(name, method.weights)
        self.student = student
        self.methods = nn.ModuleDict(methods)
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        check_trainable(student)
        needed = any(method.needs_teacher for method in methods.values())
        self._teacher = (teacher if needed else None,)  # a tuple hides it from the module tree
        self.iteration = 0
        self.raw: dict[str, Tensor] = {}
        self.resting: frozenset[str] = frozenset()
        self._keep = any(method.keep_pre_activation for method in methods.values())

    @property
    def teacher(self) -> FPNDetector | None:
        """The frozen teacher; None where no method learns from one."""
        return self._teacher[0]

    def get_extra_state(self) -> Tensor:
        """The iteration, which warm-ups depend on, is saved with the weights."""
        return torch.tensor(self.iteration)

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        """Restores the iteration; runs begun with an older version hold it in a dict."""
        self.iteration = int(state["iteration"] if isinstance(state, dict) else state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted scalar terms, whose sum is the loss.

        `raw` holds them unweighted; `resting` names those that their schedule silences now.
        """
        student, targets = self.student, batch.padded_targets()
        check_targets(targets, batch, student.num_classes)
        taught = self._run_teacher(batch)  # before the student holds maps for its backward pass
        pyramid = student.pyramid(student.normalize(batch))
        output = student.head(pyramid, keep_pre_activation=self._keep)
        assignment = student.assign(output, targets)
        terms = student.loss(output, targets, assignment)
        weights = {f"task/{name}": weight for name, weight in student.loss_weights.items()}
        self.raw = {name: value.detach() / weights[name] for name, value in terms.items()}
        terms |= self._distil(output, taught, targets, assignment)
        if self.training:
            self.iteration += 1
        return terms

    def _distil(
        self,
        output: DenseOutput,
        taught: DenseOutput | None,
        targets: Targets,
        assignment: Assignment | TwoStageAssignment,
    ) -> dict[str, Tensor]:
        """The methods' weighted terms."""
        methods = cast("dict[str, Method]", dict(self.methods.items()))
        step = Step(
            student=output,
            teacher=taught,
            student_model=self.student,
            teacher_model=self.teacher,
            targets=targets,
            student_assignment=assignment,
            iteration=self.iteration,
            pre_activation=self._keep,
        )
        terms, resting = {}, set()
        for name, method in methods.items():
            factors = method.factors(self.iteration)
            values = method(step) if any(factors.values()) else silent(factors, method, output)
            for term, value in values.items():
                self.raw[f"{name}/{term}"] = value.detach()
                terms[f"{name}/{term}"] = value * (method.weights[term] * factors[term])
                if factors[term] == 0:
                    resting.add(f"{name}/{term}")
        self.resting = frozenset(resting)
        return terms

    def _run_teacher(self, batch: Batch) -> DenseOutput | None:
        """As far as the methods that act now need it."""
        methods = cast("list[Method]", list(self.methods.values()))
        teacher, taught = self.teacher, [m for m in methods if m.is_taught(self.iteration)]
        if teacher is None or not taught:
            return None
        # Not inference_mode: its tensors cannot be saved for the cross-head backward pass.
        with torch.no_grad():
            pyramid = teacher.pyramid(teacher.normalize(batch))
            if any(method.teacher_stage == "head" for method in taught):
                return teacher.head(pyramid, keep_pre_activation=self._keep)
            return DenseOutput(Predictions([], []), {}, [], pyramid)

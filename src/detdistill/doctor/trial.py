"""The measured steps of the student alone and of each arm, on copies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from detdistill.detectors import FPNDetector
from detdistill.distill import Distiller, Method
from detdistill.doctor.finding import Finding
from detdistill.doctor.pair import Arm, build_arm, methods_of
from detdistill.doctor.step import (
    TIMED_STEPS,
    Cost,
    Gradients,
    full_strength,
    gradient_numbers,
    measure_cost,
    measure_gradients,
    take_first_steps,
)
from detdistill.doctor.terms import check_arm, check_plain
from detdistill.recipe import Recipe
from detdistill.structures import Batch

MEASURED = 3
"""On so many batches a term must be 0 to count as dead."""

KEPT = 8
"""Batches that are worth keeping: those to measure, and others for the first steps."""

ALONE = "the student alone"


class Trial:
    """A student after its first steps, which each arm tries.

    Args:
        recipe: of the run.
        device: where it runs.
        batches: of training, with boxes; at least one.
        total_steps: of the run.

    Attributes:
        ready: whether the student alone could be tried; without it there is nothing to compare.
        numbers: for the JSON file.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, batches: Sequence[Batch], total_steps: int
    ) -> None:
        """Nothing tried yet."""
        self.recipe, self.device = recipe, device
        # What the first steps learn by heart would say little.
        self.batches, self._taught = batches[:MEASURED], batches[MEASURED:] or batches
        self.total_steps = total_steps
        self.ready = False
        self.numbers: dict[str, Any] = {}
        self._student: FPNDetector
        self._plain: Cost

    def start(self, student: FPNDetector) -> list[Finding]:
        """Takes the first steps with a copy of the student, and tries it alone."""
        self._student = copy.deepcopy(student)
        alone = Distiller(self._student).to(self.device).train()
        try:
            steps = take_first_steps(alone, self._taught, self.recipe, self.device)
            if not all(p.isfinite().all() for p in alone.parameters()):
                # Without the run's own warm-up; nothing is said about the run by that.
                self._student, steps = copy.deepcopy(student), 0
            _, found, self._plain = self._measure(None, {})
        except torch.OutOfMemoryError:
            return [self._too_large(ALONE)]
        self.numbers[ALONE] = {"first_steps": steps, **_numbers(found, self._plain)}
        findings = check_plain(found, self._plain, self.total_steps, steps)
        self.ready = all(finding.level == "ok" for finding in findings)
        return findings

    def check(
        self, name: str, teacher: FPNDetector | None, arm: Arm, *, trained: bool
    ) -> list[Finding]:
        """Tries an arm that fits; `trained`: whether the teacher is."""
        try:
            methods, found, cost = self._measure(teacher, arm)
        except torch.OutOfMemoryError:
            return [self._too_large(name)]
        self.numbers[name] = _numbers(found, cost)
        return check_arm(name, methods, found, cost, self._plain, self.total_steps, trained=trained)

    def _measure(
        self, teacher: FPNDetector | None, arm: Arm
    ) -> tuple[dict[str, Method], list[Gradients], Cost]:
        """Methods, gradients on one batch or, with a dead term, several, and the cost."""
        torch.manual_seed(self.recipe.seed)
        distiller = build_arm(self._student, teacher, arm).to(self.device).train()
        methods = methods_of(distiller)
        iteration = full_strength(list(methods.values()))
        found: list[Gradients] = []
        for batch in self.batches:
            batch = batch.to(self.device)
            found.append(measure_gradients(distiller, batch, self.recipe, iteration))
            values = [term.raw for term in found[-1].terms.values()]
            if all(values) and all(found[-1].task_terms.values()):
                break
        cost = measure_cost(distiller, self.batches[0], self.recipe, self.device, iteration)
        return methods, found, cost

    def _too_large(self, name: str) -> Finding:
        torch.cuda.empty_cache()
        count, _, height, width = self.batches[0].images.shape
        text = f"{name}: the GPU's memory does not suffice for {count} images of {width}x{height}"
        twice = 2 * self.recipe.accumulate
        advice = f"--set accumulate={twice}, or --set precision=bf16, or a smaller resize_short"
        return Finding("problem", text, advice)

    def about_times(self) -> Finding:
        """What the times are."""
        on_gpu = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if on_gpu else "CPU"
        text = (
            f"times are estimates: the median of {TIMED_STEPS} steps on this {where}; loading of "
            f"images and evaluation come on top"
        )
        processes = self.recipe.devices * self.recipe.nodes
        if processes > 1:
            text += f"; of one of {processes} processes, without their waiting for each other"
        return Finding("note", text)


def _numbers(found: Sequence[Gradients], cost: Cost) -> dict[str, Any]:
    return {
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "batches": [gradient_numbers(gradients) for gradients in found],
    }

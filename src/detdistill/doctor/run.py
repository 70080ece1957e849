"""The checks in their order, from data to a measured step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from detdistill.data import DetectionDataset, TrainBatches, make_train_batches
from detdistill.detectors import FPNDetector
from detdistill.doctor.data import check_data
from detdistill.doctor.finding import Finding, Section, from_error, worst
from detdistill.doctor.pair import Arm, Fit, check_fit, check_pair, create_methods
from detdistill.doctor.schedule import check_recipe, check_schedules, check_start, recipe_numbers
from detdistill.doctor.sizes import (
    box_sides,
    check_reach,
    check_sizes,
    measure_reach,
    size_numbers,
)
from detdistill.doctor.teacher import (
    Teacher,
    check_ap,
    check_classes,
    check_input,
    measure_ap,
    open_teacher,
)
from detdistill.doctor.trial import KEPT, Trial
from detdistill.engine.build import new_student
from detdistill.engine.distributed import pick_device
from detdistill.engine.optim import run_length
from detdistill.errors import UserError
from detdistill.evaluation.run import category_ids_of
from detdistill.recipe import Recipe
from detdistill.structures import Batch

PREFERRED = ("crosskd", "crosskd_roi", "head")
"""Of several methods that fit, those to begin with."""

Progress = Callable[[str, int, int], None]


class Doctor:
    """All checks of one recipe.

    Args:
        recipe: names student, data and, perhaps, the teacher.
        arms: the methods to try, by name of the arm.
        asked: whether the user named them; of others a fault is only a warning.
        images: at most so many for the teacher's AP and for the student's assigner.
        get_teacher: the command that trains a teacher, for advice.
        progress: called with what is done, how much of it, of how much.

    Attributes:
        fitting: names of the arms that fit, those to begin with first; known at the end.
    """

    def __init__(
        self,
        recipe: Recipe,
        arms: Mapping[str, Arm],
        *,
        asked: bool,
        images: int,
        get_teacher: str,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        """Refuses a device that this machine lacks."""
        self.recipe, self.arms, self.asked = recipe, arms, asked
        self.images, self.get_teacher, self.progress = images, get_teacher, progress
        self.device = torch.device(pick_device(recipe))
        self.fitting: list[str] = []
        self._batches: list[Batch] = []

    def sections(self) -> Iterator[Section]:
        """Each section as soon as it is known; those that lack what they need are left out.

        Raises:
            UserError: when data, student or teacher are not there at all.
        """
        section, splits = check_data(self.recipe)
        yield section
        if "train" not in splits:
            return
        train = splits["train"]
        student = new_student(self.recipe, train.classes)
        source = self._train_batches(train)
        yield self._check_objects(train, student, source)
        methods = [m for arm in self.arms.values() for m in create_methods(arm).values()]
        needed = any(method.needs_teacher for method in methods)
        teacher = open_teacher(self.recipe, train.classes, self.get_teacher, needed=needed)
        fits = [check_fit(student, teacher.model, *arm) for arm in self.arms.items()]
        yield self._check_teacher(teacher, student, train, splits.get("val"), fits)
        yield self._check_methods(teacher, fits)
        steps_per_epoch = len(source)
        total_steps = run_length(self.recipe, steps_per_epoch)
        yield self._check_recipe(student, fits, len(train), steps_per_epoch, total_steps)
        if self._batches:
            yield self._check_steps(student, teacher, fits, total_steps)

    def _train_batches(self, train: DetectionDataset) -> TrainBatches:
        """One process's share of the batches, as the first process of the run would see them."""
        here = self.recipe.model_copy(update={"cache": "none", "workers": 0})
        return make_train_batches(train, here, world_size=self.recipe.devices * self.recipe.nodes)

    def _check_objects(
        self, train: DetectionDataset, student: FPNDetector, source: TrainBatches
    ) -> Section:
        """Sizes of the boxes, and what the assigner makes of them; keeps batches for the steps."""
        section = Section("objects", "Objects as the student sees them")
        sides = box_sides(train, self.recipe)
        section.findings += check_sizes(sides, student.strides, self.recipe)
        try:
            reach = measure_reach(student, self._draw(source), self.device)
        except UserError as error:
            self._batches.clear()
            section.findings.append(from_error("problem", error))
            return section
        section.findings += check_reach(reach, sides, student, self.recipe)
        section.numbers = size_numbers(sides, reach, student.strides)
        return section

    def _draw(self, source: TrainBatches) -> Iterator[Batch]:
        """Batches of about `images` images, and further ones until a batch has boxes."""
        seen = 0
        with closing(source.batches(0)) as batches:
            for batch in itertools.islice(batches, len(source)):
                has_boxes = any(len(target["boxes"]) for target in batch.targets)
                if has_boxes and len(self._batches) < KEPT:
                    self._batches.append(batch)
                yield batch
                seen += len(batch.sizes)
                self.progress("training images", min(seen, self.images), self.images)
                if seen >= self.images and self._batches:
                    return

    def _check_teacher(
        self,
        teacher: Teacher,
        student: FPNDetector,
        train: DetectionDataset,
        val: DetectionDataset | None,
        fits: Sequence[Fit],
    ) -> Section:
        section = Section("teacher", "Teacher", list(teacher.findings))
        model = teacher.model
        if model is None or not teacher.trained:
            return section
        needed = not self.asked or any(fit.reason for fit in fits)
        section.findings += check_classes(model, train.classes, needed, self.get_teacher)
        section.findings += check_input(model, student, self.recipe)
        if val is None:
            return section
        try:
            category_ids_of(model, val)
        except UserError:  # told above
            return section
        try:
            metrics, subset = measure_ap(
                model,
                val,
                self.recipe,
                self.device,
                self.images,
                lambda done, total: self.progress("val images by the teacher", done, total),
            )
        except UserError as error:
            section.findings.append(from_error("problem", error))
            return section
        section.findings += check_ap(metrics, subset, len(val), self.get_teacher)
        section.numbers = {
            "images": len(subset),
            "metrics": metrics.numbers,
            "per_class": metrics.per_class,
        }
        return section

    def _check_methods(self, teacher: Teacher, fits: Sequence[Fit]) -> Section:
        advice = f"train a teacher: {self.get_teacher}"
        if teacher.model is not None:
            advice = "choose one that fits; doctor without --method tries all methods"
        given = self.recipe.teacher is not None and teacher.model is None  # its fault is told
        section = Section("methods", "Methods", check_pair(fits, self.asked and not given, advice))
        self.fitting = sorted((f.name for f in fits if not f.reason), key=_preference)
        section.numbers = {f.name: {"fits": not f.reason, "reason": f.reason} for f in fits}
        return section

    def _check_recipe(
        self,
        student: FPNDetector,
        fits: Sequence[Fit],
        images: int,
        steps_per_epoch: int,
        total_steps: int,
    ) -> Section:
        section = Section("recipe", "Recipe")
        section.findings += check_recipe(self.recipe, images, steps_per_epoch, total_steps)
        section.findings += check_start(student, self.recipe)
        for fit in fits:
            found = check_schedules(fit.schedules, total_steps)
            section.findings += self._of_arm(fit.name, found)
        section.numbers = recipe_numbers(self.recipe, steps_per_epoch, total_steps)
        return section

    def _check_steps(
        self, student: FPNDetector, teacher: Teacher, fits: Sequence[Fit], total_steps: int
    ) -> Section:
        section = Section("step", "One training step")
        trial = Trial(self.recipe, self.device, self._batches, total_steps)
        section.findings += trial.start(student)
        names = [fit.name for fit in fits if not fit.reason] if trial.ready else []
        for done, name in enumerate(names):
            self.progress("methods", done, len(names))
            findings = trial.check(name, teacher.model, self.arms[name], trained=teacher.trained)
            section.findings += self._of_arm(name, findings)
        if trial.ready:
            section.findings.append(trial.about_times())
        section.numbers = trial.numbers
        return section

    def _of_arm(self, name: str, findings: list[Finding]) -> list[Finding]:
        """Findings about a method; where it was not asked for, a problem is its own alone.

        A method with a fault is none to begin with.
        """
        if worst([Section("", "", findings)]) in ("warning", "problem"):
            self.fitting.sort(key=lambda fitting: fitting == name)
        if self.asked:
            return findings
        return [replace(f, level="warning") if f.level == "problem" else f for f in findings]


def _preference(name: str) -> tuple[int, str]:
    return (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name)

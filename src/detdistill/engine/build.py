"""From a recipe to data and models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from detdistill.data import DetectionDataset, open_dataset, require_same_classes
from detdistill.data.fingerprint import fingerprint
from detdistill.data.transforms import eval_size
from detdistill.detectors import FPNDetector, create_detector, load_detector
from detdistill.detectors.classes import match_if_known
from detdistill.detectors.factory import split_name
from detdistill.distill import Distiller, create_method
from detdistill.engine.trackers import require_trackers
from detdistill.errors import UserError
from detdistill.recipe import Recipe, split_teacher

WEIGHTS = "model.safetensors"
"""Of a finished run, in its folder."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of; `teacher` as the recipe names it, None where no method takes one."""

    train: DetectionDataset
    val: DetectionDataset
    distiller: Distiller
    teacher: str | None

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What the run learns from, by fingerprints: another data set or teacher is another run."""
        found = {f"{d.split} data ({d.source})": fingerprint(d) for d in (self.train, self.val)}
        if self.distiller.teacher is not None:
            found["teacher"] = _fingerprint(self.distiller.teacher)
        return found


def build(recipe: Recipe) -> Parts:
    """Opens the data and puts student, teacher and methods together; refuses what cannot work."""
    split_name(recipe.student, {})
    require_trackers(recipe)
    train, val = open_dataset(recipe, "train"), open_dataset(recipe, "val")
    require_same_classes(train, val)
    # The student comes first, so that a seed gives equal students with and without a teacher.
    student = new_student(recipe, train.classes)
    methods = {name: create_method(name, **options) for name, options in recipe.methods.items()}
    taken = any(method.takes_teacher for method in methods.values())
    needed = any(method.needs_teacher for method in methods.values())
    teacher = _teacher(recipe, train.classes, needed) if taken else None
    distiller = Distiller(student, teacher, methods)
    return Parts(train, val, distiller, recipe.teacher if taken else None)


def new_student(recipe: Recipe, classes: Sequence[str]) -> FPNDetector:
    """The recipe's student as a run starts it; its weights follow from the seed."""
    torch.manual_seed(recipe.seed)
    student = create_detector(recipe.student, len(classes), **recipe.student_options)
    student.classes = list(classes)
    student.input_size = eval_size(recipe)
    return student


def _fingerprint(detector: FPNDetector) -> str:
    digest = hashlib.sha256()
    for name, tensor in detector.state_dict().items():
        bits = tensor.cpu().flatten().view(torch.uint8)  # NumPy has no bfloat16
        digest.update(name.encode() + bits.numpy().tobytes())
    if detector.cut is not None:  # not every family's tensors show it
        digest.update(str(detector.cut).encode())
    return digest.hexdigest()


def _teacher(recipe: Recipe, classes: Sequence[str], needed: bool) -> FPNDetector | None:
    """The recipe's teacher; where none is `needed` one that is only named, too, for its form."""
    if not needed and recipe.teacher is not None and teacher_file(recipe.teacher) is None:
        return new_teacher(recipe, classes)
    return load_teacher(recipe, classes)


def teacher_file(teacher: str) -> Path | None:
    """The weights of an existing teacher; None for the name of a detector to train.

    A teacher is a run folder, a weights file, or NAME=FILE for another framework's weights.
    """
    name, path = split_teacher(teacher)
    if path.is_dir():
        if not (path / WEIGHTS).exists():
            raise UserError(f"{path}: no {WEIGHTS} in this folder; is the run finished?")
        return path / WEIGHTS
    if path.exists():
        return path
    if name or len(path.parts) > 1 or path.suffix:
        raise UserError(
            f"{path}: no such teacher; give a run folder, a weights file or a detector name"
        )
    return None


def new_teacher(recipe: Recipe, classes: Sequence[str]) -> FPNDetector:
    """The recipe's teacher, untrained, of which it says only the name."""
    assert recipe.teacher is not None
    teacher = create_detector(recipe.teacher, len(classes), **recipe.teacher_options)
    teacher.classes = list(classes)
    match_if_known(teacher, classes, recipe.class_map)  # refuses a wrong map
    return teacher


def load_teacher(recipe: Recipe, classes: Sequence[str]) -> FPNDetector | None:
    """The recipe's teacher: a run folder, our weights, or `NAME=FILE` for foreign weights.

    Where it knows more than the classes of the data, it is cut to these.
    """
    if recipe.teacher is None:
        return None
    name, path = split_teacher(recipe.teacher)
    source = (path,) if name is None else (name, path)
    teacher = load_detector(*source, **recipe.teacher_options)
    match_if_known(teacher, classes, recipe.class_map)
    return teacher

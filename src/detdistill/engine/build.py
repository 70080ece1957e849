"""From a recipe to data and models."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from detdistill.data import DetectionDataset, open_dataset, require_same_classes
from detdistill.data.fingerprint import fingerprint
from detdistill.data.transforms import eval_size
from detdistill.detectors import FPNDetector, create_detector, load_detector
from detdistill.detectors.factory import split_name
from detdistill.distill import Distiller, create_method
from detdistill.recipe import Recipe, split_teacher


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    train: DetectionDataset
    val: DetectionDataset
    distiller: Distiller

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
    train, val = open_dataset(recipe, "train"), open_dataset(recipe, "val")
    require_same_classes(train, val)
    # The student comes first, so that a seed gives equal students with and without a teacher.
    torch.manual_seed(recipe.seed)
    student = create_detector(recipe.student, len(train.classes), **recipe.student_options)
    student.classes = list(train.classes)
    student.input_size = eval_size(recipe)
    teacher = load_teacher(recipe) if recipe.methods else None
    methods = {name: create_method(name, **options) for name, options in recipe.methods.items()}
    return Parts(train, val, Distiller(student, teacher, methods))


def _fingerprint(detector: FPNDetector) -> str:
    digest = hashlib.sha256()
    for name, tensor in detector.state_dict().items():
        bits = tensor.cpu().flatten().view(torch.uint8)  # NumPy has no bfloat16
        digest.update(name.encode() + bits.numpy().tobytes())
    return digest.hexdigest()


def load_teacher(recipe: Recipe) -> FPNDetector | None:
    """The recipe's teacher: a run folder, our weights, or `NAME=FILE` for foreign weights."""
    if recipe.teacher is None:
        return None
    name, path = split_teacher(recipe.teacher)
    if name is None:
        return load_detector(path, **recipe.teacher_options)
    return load_detector(name, path, **recipe.teacher_options)

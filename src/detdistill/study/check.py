"""Refuses, before anything is trained or written, a study that could only fail later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detdistill.data import open_dataset, require_same_classes
from detdistill.data.fingerprint import fingerprint
from detdistill.detectors import FPNDetector, create_detector
from detdistill.distill import Distiller, create_method
from detdistill.engine.build import load_teacher
from detdistill.errors import UserError
from detdistill.recipe import Recipe, split_teacher
from detdistill.study.runs import WEIGHTS, file_sha256


def check_study(
    recipe: Recipe, teacher: str, methods: Sequence[str], seeds: Sequence[int]
) -> dict[str, str]:
    """Data, names, options, and whether each method fits the pair.

    Returns:
        What the study rests on, by fingerprints: its data, and a teacher that is there already.

    Raises:
        UserError: in one sentence.
    """
    if not methods or not seeds:
        raise UserError(
            "nothing to compare: give a method and a seed, e.g. --methods crosskd --seeds 0"
        )
    if any(seed < 0 for seed in seeds):
        raise UserError(f"seeds {list(seeds)}: expected whole numbers from 0 on")
    if recipe.nodes > 1:
        raise UserError(f"compare runs on one machine, found nodes {recipe.nodes}: set nodes to 1")
    train, val = open_dataset(recipe, "train"), open_dataset(recipe, "val")
    test = open_dataset(recipe, "test")
    for split in (val, test):
        require_same_classes(train, split)
    if not any((~record.crowd).any() for record in test.records):
        raise UserError(f"{test.source}: no test image has a usable box; nothing can be measured")
    inputs = {f"{d.split} data ({d.source})": fingerprint(d) for d in (train, val, test)}
    model: FPNDetector | None
    weights = teacher_file(teacher)
    if weights is None:
        model = create_detector(teacher, len(train.classes), **recipe.teacher_options)
        model.classes = list(train.classes)
    else:
        model = existing_teacher(recipe.model_copy(update={"teacher": teacher}))
        inputs["teacher"] = file_sha256(weights)
    student = create_detector(recipe.student, len(train.classes), **recipe.student_options)
    student.classes = list(train.classes)
    for name in methods:
        parts = recipe.methods_of(name).items()
        Distiller(student, model, {part: create_method(part, **given) for part, given in parts})
    return inputs


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


def existing_teacher(recipe: Recipe) -> FPNDetector:
    """The teacher that a recipe names, loaded."""
    teacher = load_teacher(recipe)
    assert teacher is not None, "the recipe names a teacher"
    return teacher

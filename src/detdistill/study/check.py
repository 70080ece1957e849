"""Refuses, before anything is trained or written, a study that could only fail later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detdistill.data import (
    DetectionDataset,
    make_train_batches,
    open_dataset,
    require_same_classes,
)
from detdistill.data.fingerprint import fingerprint
from detdistill.detectors import FPNDetector, create_detector
from detdistill.detectors.classes import match_classes
from detdistill.distill import Distiller, create_method
from detdistill.engine.ahead import look_ahead
from detdistill.engine.build import load_teacher, new_teacher, teacher_file
from detdistill.engine.distributed import pick_device
from detdistill.engine.optim import run_length
from detdistill.engine.trackers import require_trackers
from detdistill.errors import UserError
from detdistill.evaluation.run import knows_classes
from detdistill.recipe import Recipe
from detdistill.study.runs import file_sha256


def check_study(
    recipe: Recipe,
    teacher: str | None,
    methods: Sequence[str],
    seeds: Sequence[int],
    jobs: int = 1,
    new: bool = True,
    tune_lr: bool = False,
) -> dict[str, str]:
    """Data, names, options, and whether each method fits the pair, or does without a teacher.

    Of a `new` study the schedule is looked at, too, and every image of val and test decoded.
    To `tune_lr`, val must hold boxes.

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
    if jobs < 1 or (jobs > 1 and recipe.devices > 1):
        raise UserError(
            f"jobs {jobs}, devices {recipe.devices}: expected 1 or more jobs, of which several run "
            f"on one device each: leave one of the two at 1"
        )
    pick_device(recipe)
    require_trackers(recipe)
    splits = _open_splits(recipe)
    if tune_lr and not _has_boxes(splits[1]):
        raise UserError(
            f"{splits[1].source}: no val image has a usable box, so no learning rate is the best "
            f"there: label val, or leave --tune-lr out"
        )
    model = None if teacher is None else _teacher(recipe, teacher, splits[-1].classes)
    _check_pairs(recipe, model, methods, splits[-1])
    if new:
        _look_ahead(recipe, *splits)
    inputs = {f"{split.split} data ({split.source})": fingerprint(split) for split in splits}
    weights = None if teacher is None else teacher_file(teacher)
    return inputs if weights is None else inputs | {"teacher": _teacher_seen(weights, model)}


def _teacher_seen(weights: Path, model: FPNDetector | None) -> str:
    """The file's checksum, and to which classes it was cut, which another file's names decide."""
    cut = None if model is None else model.cut
    return file_sha256(weights) + ("" if cut is None else f", cut to {cut}")


def check_teacher_epochs(teacher: str | None, epochs: int | None) -> None:
    """Refuses epochs for a teacher that is not trained here: they would change nothing."""
    if epochs is None:
        return
    if teacher is None:
        reason = "there is no teacher to train"
    elif teacher_file(teacher) is not None:
        reason = f"the teacher {teacher} is trained already"
    else:
        return
    raise UserError(
        f"--teacher-epochs {epochs}: {reason}; leave it out, or give a detector's name as "
        f"--teacher, which is then trained for these epochs"
    )


def _open_splits(recipe: Recipe) -> tuple[DetectionDataset, ...]:
    """Train, val and test, of the same classes; test holds boxes."""
    train, val = open_dataset(recipe, "train"), open_dataset(recipe, "val")
    test = open_dataset(recipe, "test")
    for split in (val, test):
        require_same_classes(train, split)
    if not _has_boxes(test):
        raise UserError(f"{test.source}: no test image has a usable box; nothing can be measured")
    return train, val, test


def _has_boxes(split: DetectionDataset) -> bool:
    return any((~record.crowd).any() for record in split.records)


def _check_pairs(
    recipe: Recipe, teacher: FPNDetector | None, methods: Sequence[str], test: DetectionDataset
) -> None:
    """Whether each method fits student and teacher, and the teacher the test split."""
    student = create_detector(recipe.student, len(test.classes), **recipe.student_options)
    student.classes = list(test.classes)
    for name in methods:
        parts = recipe.methods_of(name).items()
        Distiller(student, teacher, {part: create_method(part, **given) for part, given in parts})
    if teacher is not None and not knows_classes(teacher, test):
        try:
            match_classes(teacher, test.classes)
        except UserError as error:
            raise UserError(f"a study measures its teacher, too: {error}") from None


def _look_ahead(
    recipe: Recipe, train: DetectionDataset, val: DetectionDataset, test: DetectionDataset
) -> None:
    here = recipe.model_copy(update={"cache": "none"})  # nothing is decoded for the count
    batches = make_train_batches(train, here, world_size=recipe.devices)
    look_ahead(recipe, len(batches), run_length(recipe, len(batches)), train, val, test)


def _teacher(recipe: Recipe, teacher: str, classes: Sequence[str]) -> FPNDetector:
    """The teacher, untrained where it is yet to be trained."""
    named = recipe.model_copy(update={"teacher": teacher})
    if teacher_file(teacher) is None:
        return new_teacher(named, classes)
    return existing_teacher(named, classes)


def existing_teacher(recipe: Recipe, classes: Sequence[str]) -> FPNDetector:
    """The teacher that a recipe names, loaded, with the classes of the data if it knows them."""
    teacher = load_teacher(recipe, classes)
    assert teacher is not None, "the recipe names a teacher"
    return teacher

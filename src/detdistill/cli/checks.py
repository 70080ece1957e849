"""What the command line refuses, before anything is written."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.doctor.commands import Request
    from detdistill.recipe import Recipe


def recipe_values(recipe: str | None) -> dict[str, Any]:
    """The plain values of a recipe file or of a bundled recipe; empty without one."""
    from detdistill.recipe import read_yaml, validate_recipe
    from detdistill.recipes import recipe_path

    if recipe is None:
        return {}
    path = Path(recipe)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        path = recipe_path(recipe)
    values = read_yaml(path)
    # Commands look into these groups before they know the other settings.
    groups = ("student_options", "teacher_options", "methods", "arms")
    validate_recipe({key: values[key] for key in groups if key in values}, recipe)
    return values


def training_recipe(
    values: dict[str, Any],
    recipe: str | None,
    given: Mapping[str, Any],
    assignments: list[str] | None,
) -> Recipe:
    """`resolve_recipe` for commands that train: there must be data."""
    from detdistill.recipe import resolve_recipe

    settings = resolve_recipe(values, recipe or "command line", given, assignments or [])
    if settings.data is None and settings.train_annotations is None:
        raise UserError(
            "no data was given: add --data FOLDER with COCO, YOLO or Pascal VOC data "
            "(`detdistill data builtin --out FOLDER` makes one)"
        )
    return settings


def is_first_process() -> bool:
    """Whether this is the process that speaks: further ones are started with their rank set."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    return all(os.environ.get(name, "0") in ("", "0") for name in names)


def check_folder(out: Path, option: str = "--out") -> None:
    """Refuses a folder that cannot be made or written; nothing is made here.

    `option` is what the user gave it by.
    """
    place = out
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        writable = os.access(place, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"{option} {out}: {error.strerror}; choose another {option}") from None
    if not place.is_dir():
        raise UserError(f"{option} {out}: {place} is a file, not a folder; choose another {option}")
    if not writable:
        raise UserError(f"{option} {out}: {place} cannot be written; choose another {option}")


def make_folder(folder: Path) -> None:
    """Makes an output folder with its parents."""
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; choose another --out") from None


def check_detector(name: str) -> None:
    """Refuses an unknown detector with the nearest name."""
    from detdistill.detectors.factory import split_name

    split_name(name, {})


def is_detector(name: str) -> bool:
    """Whether `create_detector` knows the name."""
    try:
        check_detector(name)
    except UserError:
        return False
    return True


def is_only_named(teacher: str) -> bool:
    """Whether it is the name of a detector, and no run folder or file is called so."""
    return not Path(teacher).exists() and is_detector(teacher)


def check_student(settings: Recipe) -> None:
    """Refuses a recipe without a student of its own."""
    if "student" not in settings.model_fields_set:
        raise UserError("no student was given: add --student NAME, e.g. --student gfl_r18")


def check_weights(teacher: str, student: str, request: Request) -> Path:
    """Where a teacher's weights are; refuses missing ones, and the same as the student's.

    `teacher` is a run folder, a weights file, or `NAME=FILE` for weights of other frameworks; the
    user gave it, or the recipe did.
    """
    from detdistill.recipe import split_teacher

    path = split_teacher(teacher)[1]
    if not path.exists():
        raise UserError(_missing_teacher(teacher, request))
    if Path(student).exists() and not is_detector(student):
        both = same_weights(path, Path(student))
        found = f"--teacher and --student are both {teacher}" if both else f"--student {student}"
        raise UserError(
            f"{found}: the student is a detector's name, e.g. gfl_r18, which starts from scratch"
        )
    return path


def check_teacher(teacher: str, student: str, out: Path, request: Request) -> None:
    """Refuses what `check_weights` does, and a run in the teacher's own folder."""
    path = check_weights(teacher, student, request)
    if out.exists() and (out.samefile(path) or out.samefile(path.parent)):
        raise UserError(f"--out {out} is the teacher's own folder: choose another --out")


def same_weights(one: Path, two: Path) -> bool:
    """Whether two run folders or weights files hold the same weights, perhaps as a copy."""
    one, two = (path / "model.safetensors" if path.is_dir() else path for path in (one, two))
    return one.is_file() and two.is_file() and filecmp.cmp(one, two, shallow=False)


def _missing_teacher(teacher: str, request: Request) -> str:
    from detdistill.detectors import list_detectors
    from detdistill.doctor.commands import train_command
    from detdistill.registry import nearest

    named = f"the recipe's teacher {teacher}"
    if f"teacher={teacher}" in request.assignments:
        named = f"--set teacher={teacher}"
    elif teacher == request.teacher:
        named = f"--teacher {teacher}"
    if is_detector(teacher):
        return (
            f"{named}: a detector's name, but trained weights are needed; train it first, then "
            f"give --teacher runs/teacher: {train_command(request, teacher)}"
        )
    if Path(teacher).name != teacher or Path(teacher).suffix or "=" in teacher:
        return f"{named}: no such run folder or weights file; give --teacher RUN_OR_FILE"
    hint = nearest(teacher, list_detectors())
    return f"{named}: no such run folder, weights file or detector; {hint}"


def need_teacher(methods: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any of the methods, with its options, learns from a teacher."""
    from detdistill.distill import create_method

    return any(create_method(name, **options).needs_teacher for name, options in methods.items())


def take_teacher(methods: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any of the methods, with its options, makes use of a teacher where there is one."""
    from detdistill.distill import create_method

    return any(create_method(name, **options).takes_teacher for name, options in methods.items())


def parse_methods(text: str, configured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`crosskd+pkd` to methods with the options that a recipe has for them."""
    from detdistill.distill import METHODS
    from detdistill.recipe import named_once

    names = [name.strip() for name in text.split("+")]
    for name in names:
        METHODS.get(name)  # answers an unknown name with the nearest
    return {name: dict(configured.get(name) or {}) for name in named_once(names)}

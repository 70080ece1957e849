"""`analyze`: what a trained teacher and a trained student disagree on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detdistill.cli import checks
from detdistill.cli.options import (
    Assignments,
    Data,
    RecipeFile,
    Split,
    Strict,
    Teacher,
    TrainedStudent,
)
from detdistill.cli.using import at_input_size, load, show_faults
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.analysis.pair import Pair
    from detdistill.detectors import FPNDetector
    from detdistill.recipe import Recipe

Images = Annotated[
    int,
    typer.Option("--images", metavar="N", min=1, help="At most so many, spread over the split."),
]
Folder = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")]


def analyze(
    out: Folder,
    teacher: Teacher = None,
    student: TrainedStudent = None,
    data: Data = None,
    split: Split = "val",
    images: Images = 500,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    strict: Strict = False,
) -> None:
    """Show what a teacher and a student disagree on."""
    from detdistill.recipe import resolve_recipe

    checks.check_folder(out)
    if (out / "analysis.json").exists():
        raise UserError(f"{out}: already holds analysis.json; choose another --out")
    teacher, student = _check_models(teacher, student)
    given = {"data": data, "strict": strict or None}
    values = checks.recipe_values(recipe)
    settings = resolve_recipe(values, recipe or "command line", given, assignments or [])
    if settings.data is None and getattr(settings, f"{split}_annotations") is None:
        raise UserError("no data was given: add --data FOLDER with COCO, YOLO or Pascal VOC data")
    sentences = _analyze(teacher, student, settings, split, images, out)
    for sentence in sentences:
        typer.echo(sentence)
    typer.echo(f"Next: open {shlex.quote(str(out / 'report.html'))} in a browser")


def _check_models(teacher: str | None, student: str | None) -> tuple[str, str]:
    """Both must be there, and they must not be the same file."""
    from detdistill.recipe import split_teacher

    if teacher is None or student is None:
        role = "teacher" if teacher is None else "student"
        raise UserError(f"no {role} was given: add --{role} RUN_OR_FILE, e.g. runs/{role}")
    for role, given in (("teacher", teacher), ("student", student)):
        if not split_teacher(given)[1].exists():
            raise UserError(f"--{role} {given}: no such run folder or weights file")
    if checks.same_weights(*(split_teacher(given)[1] for given in (teacher, student))):
        raise UserError(
            f"--teacher and --student are both {teacher}: a model agrees with itself; give the "
            f"student that was, or would be, taught by the teacher"
        )
    return teacher, student


def _analyze(
    teacher: str, student: str, settings: Recipe, split: Split, images: int, out: Path
) -> list[str]:
    """Measures and writes; returns what was found."""
    from detdistill.analysis.pair import Pair
    from detdistill.analysis.report import write_analysis
    from detdistill.analysis.run import analyze as measure
    from detdistill.data import open_dataset
    from detdistill.detectors.classes import match_if_known
    from detdistill.progress import Counts

    taught, model = _load(teacher), _load(student)
    match_if_known(taught, model.classes or (), _class_map(settings, teacher, Path(student)))
    pair = Pair(taught, model)
    assistant, missed = _find_assistant(Path(student), pair)
    dataset = open_dataset(settings, split)
    show_faults(f"{dataset.source}", dataset.faults)
    settings = at_input_size(settings, pair.student)
    count = min(images, len(dataset))
    with Counts() as counts:
        findings = measure(
            pair,
            dataset,
            settings,
            images=images,
            assistant=assistant,
            progress=counts.counter(f"{split} images", count),
        )
    findings.left_out.update(missed)
    facts = {
        "teacher": f"{pair.teacher.name}, {teacher}",
        "student": f"{pair.student.name}, {student}",
        "data": f"{dataset.source}, {split}: {count} of {len(dataset)} images",
        "image size": f"short side {max(settings.resize_short)}, long {settings.resize_long}",
    }
    checks.make_folder(out)
    return write_analysis(out, findings, dataset, facts)


def _class_map(settings: Recipe, teacher: str, student: Path) -> dict[str, str | int]:
    """The map that was given, else that of the student's run, unless it is another teacher's."""
    from detdistill.recipe import read_yaml, resolve_recipe, split_teacher

    stored = student / "recipe.yaml"
    if "class_map" in settings.model_fields_set or not stored.is_file():
        return settings.class_map
    values = read_yaml(stored)
    values = {key: values[key] for key in ("teacher", "class_map") if key in values}
    run = resolve_recipe(values, str(stored))
    if not run.class_map or run.teacher is None:
        return {}
    own, given = (split_teacher(name)[1] for name in (run.teacher, teacher))
    if own.exists() and not checks.same_weights(own, given):
        return {}
    typer.echo(f"class_map is that of {stored} (another by --set class_map.NAME=NAME)", err=True)
    return run.class_map


def _find_assistant(student: Path, pair: Pair) -> tuple[Any, dict[str, str]]:
    """HEAD's assistant in the student's run folder, or why it cannot be compared."""
    from detdistill.analysis.heads import load_assistant

    try:
        return load_assistant(student, pair), {}
    except UserError as error:
        return None, {"assistant": str(error)}


def _load(given: str) -> FPNDetector:
    from detdistill.recipe import split_teacher

    name, path = split_teacher(given)
    return load(path, name)

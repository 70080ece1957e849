"""`compare` and `demo`: the same student with and without distillation, over seeds."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detdistill.cli import checks
from detdistill.cli.datasets import write_builtin_data
from detdistill.cli.options import (
    Assignments,
    Data,
    Devices,
    Jobs,
    Methods,
    Out,
    RecipeFile,
    Seeds,
    Strict,
    Student,
    TeacherEpochs,
    TeacherToTrain,
    TuneLr,
)
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.doctor.commands import Request
    from detdistill.recipe import Recipe


@dataclass(frozen=True)
class BuiltinStudy:
    """A study on built-in data: recipe, images per split, seeds, the teacher's own epochs."""

    recipe: str
    images: dict[str, int]
    seeds: list[int]
    teacher_epochs: int | None = None


QUICK = BuiltinStudy("demo_quick", {"train": 24, "val": 8, "test": 8, "size": 96}, [0])
DEMO = BuiltinStudy("demo", {"train": 2000, "val": 200, "test": 500, "size": 128}, [0], 6)
FULL = BuiltinStudy(
    "builtin", {"train": 2000, "val": 300, "test": 1000, "size": 128}, [0, 1, 2], 10
)


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Data, runs and report go here.")
    ] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One minute, to see that all works; no real numbers.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The study of docs/results.md: three seeds, hours.")
    ] = False,
    assignments: Assignments = None,
) -> None:
    """Compare a student with and without distillation on built-in data."""
    from detdistill.doctor.commands import Request

    checks.check_folder(out)
    plan = QUICK if quick else FULL if full else DEMO
    data, study = out / "data", out / "study"
    values = checks.recipe_values(plan.recipe)
    settings = checks.training_recipe(values, plan.recipe, {"data": str(data)}, assignments)
    names = ["+".join(settings.methods)]
    _check_study(settings, out, names, Request())
    if checks.is_first_process():
        typer.echo(f"built-in data: {data}")
        write_builtin_data(data, plan.images, seed=0)
    # Beside the data, not around it: the folder of a study holds nothing else.
    trained_here = settings.teacher == values["teacher"]  # another may come from --set
    _compare(settings, study, names, plan.seeds, plan.teacher_epochs if trained_here else None)
    _say_next(
        "for your own data: detdistill train --detector gfl_r50 --data FOLDER --out runs/teacher"
    )


def compare(
    out: Out,
    teacher: TeacherToTrain = None,
    student: Student = None,
    methods: Methods = None,
    seeds: Seeds = "0,1,2",
    teacher_epochs: TeacherEpochs = None,
    tune_lr: TuneLr = False,
    data: Data = None,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    strict: Strict = False,
    devices: Devices = None,
    jobs: Jobs = 1,
) -> None:
    """Measure what distillation gains; methods like tf_head need no --teacher.

    The same command, given again, goes on where it stopped.
    """
    from detdistill.doctor.commands import Request

    checks.check_folder(out)
    values = checks.recipe_values(recipe)
    if teacher is not None and not checks.is_only_named(teacher):
        values["teacher_options"] = {}  # those of a teacher that the recipe would train
    given = {"teacher": teacher, "student": student, "data": data, "devices": devices}
    given["strict"] = strict or None
    settings = checks.training_recipe(values, recipe, given, assignments)
    checks.check_student(settings)
    names = _split(methods) if methods else list(settings.arms) or ["+".join(settings.methods)]
    if not all(names):
        raise UserError("no method was given: add --methods NAMES, e.g. --methods crosskd")
    request = Request(teacher, student, data, methods, recipe, tuple(assignments or ()))
    _check_study(settings, out, names, request)
    _compare(settings, out, names, _parse_seeds(seeds), teacher_epochs, jobs, tune_lr)
    _say_next(f"open {shlex.quote(str(out / 'report.html'))} in a browser")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _parse_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in _split(text)]
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers, e.g. --seeds 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UserError(
            f"--seeds {text}: expected different numbers from 0 to 2^63 - 1, e.g. --seeds 0,1,2"
        )
    return seeds


def _check_study(settings: Recipe, out: Path, names: list[str], request: Request) -> None:
    for name in names:
        if checks.need_teacher(settings.methods_of(name)) and settings.teacher is None:
            raise UserError(
                f"no teacher was given, and {name} needs one: add --teacher RUN_OR_FILE, or a "
                f"detector's name"
            )
    teacher = settings.teacher
    if teacher is not None and not checks.is_only_named(teacher):
        checks.check_teacher(teacher, settings.student, out, request)
    checks.check_detector(settings.student)


def _compare(
    settings: Recipe,
    out: Path,
    methods: list[str],
    seeds: list[int],
    teacher_epochs: int | None,
    jobs: int = 1,
    tune_lr: bool = False,
) -> None:
    from detdistill.study.compare import compare as run_study

    run_study(
        settings,
        out,
        teacher=settings.teacher,
        methods=methods,
        seeds=seeds,
        teacher_epochs=teacher_epochs,
        tune_lr=tune_lr,
        jobs=jobs,
    )


def _say_next(command: str) -> None:
    if checks.is_first_process():
        typer.echo(f"Next: {command}")

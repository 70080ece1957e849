"""`train` and `distill`: one run each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from detdistill.cli import checks
from detdistill.cli.options import (
    Assignments,
    Data,
    Detector,
    Devices,
    Method,
    Nodes,
    Out,
    RecipeFile,
    Resume,
    Seed,
    Strict,
    Student,
    Teacher,
)
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.doctor.commands import Request
    from detdistill.recipe import Recipe


def train(
    out: Out,
    detector: Detector = None,
    data: Data = None,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    strict: Strict = False,
    resume: Resume = False,
    devices: Devices = None,
    nodes: Nodes = None,
    seed: Seed = None,
) -> None:
    """Train one detector, a teacher for instance."""
    checks.check_folder(out)
    values = checks.recipe_values(recipe)
    name = detector or values.get("student")
    if name is None:
        raise UserError("no detector was given: add --detector NAME, e.g. --detector gfl_r18")
    given = {"data": data, "devices": devices, "nodes": nodes, "seed": seed}
    given["strict"] = strict or None
    of_teacher = detector is not None and detector == values.get("teacher")
    options = values.get("teacher_options" if of_teacher else "student_options", {})
    alone = _alone(values, name, options)
    settings = checks.training_recipe(alone, recipe, given, assignments)
    if settings.methods or settings.teacher:
        raise UserError("`train` has no teacher; use `detdistill distill` for methods")
    _run(settings, out, resume)
    _say_next(_distill_command(settings, out, values, recipe, assignments or []))


def _alone(values: dict[str, Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of a recipe that describes a pair what is needed to train one of the two."""
    changes = {"student": name, "student_options": options, "teacher": None}
    return values | changes | {"teacher_options": {}, "methods": {}, "arms": {}}


def _distill_command(
    settings: Recipe,
    out: Path,
    values: dict[str, Any],
    recipe: str | None,
    assignments: list[str],
) -> str:
    """How the detector that was trained teaches: the recipe's student, if there is one."""
    from detdistill.doctor.commands import Request, distill_command, fitting_method

    # What was set holds for the student too, but for what this detector is.
    kept = tuple(a for a in assignments if not a.startswith(("student", "teacher", "class_map")))
    if values.get("class_map"):  # for a teacher of other classes
        kept += ("class_map={}",)
    student = None if "student" in values else "gfl_r18"
    method: str | None = fitting_method(settings.student, student or values["student"])
    if settings.student == values.get("teacher"):
        own = {None: values.get("methods") or {}, **(values.get("arms") or {})}
        method = next((arm for arm in own if checks.need_teacher(own[arm])), method)
    request = Request(str(out), student, settings.data, method, recipe, kept)
    return distill_command(request, method, with_teacher=True)


def distill(
    out: Out,
    teacher: Teacher = None,
    student: Student = None,
    method: Method = None,
    data: Data = None,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    strict: Strict = False,
    resume: Resume = False,
    devices: Devices = None,
    nodes: Nodes = None,
    seed: Seed = None,
) -> None:
    """Train a student with a trained teacher."""
    from detdistill.doctor.commands import Request

    checks.check_folder(out)
    values = checks.recipe_values(recipe)
    if teacher is not None and not checks.is_only_named(teacher):
        values["teacher_options"] = {}  # those of a teacher that has only a name
    given: dict[str, Any] = {"teacher": teacher, "student": student, "data": data, "seed": seed}
    given |= {"strict": strict or None, "devices": devices, "nodes": nodes}
    given["methods"] = _methods(method, values)
    values["arms"] = {}
    settings = checks.training_recipe(values, recipe, given, assignments)
    if settings.teacher is None and (not settings.methods or checks.need_teacher(settings.methods)):
        raise UserError("no teacher was given: add --teacher RUN_OR_FILE, e.g. runs/teacher")
    if not settings.methods:
        raise UserError("no method was given: add --method NAME, e.g. --method crosskd")
    checks.check_student(settings)
    if not checks.take_teacher(settings.methods):
        settings = _without_teacher(settings, teacher)
    request = Request(teacher, student, data, method, recipe, tuple(assignments or ()))
    _check_teacher(settings, out, request)
    _run(settings, out, resume)
    weights = shlex.quote(str(out / "model.safetensors"))
    _say_next(f"detdistill eval --weights {weights}{_data_of(settings)} --split test")


def _without_teacher(settings: Recipe, given: str | None) -> Recipe:
    """For methods that ignore a teacher: the recipe's own is dropped, one asked for is refused."""
    if given is not None:
        names = "+".join(settings.methods)
        raise UserError(f"--teacher {given}: {names} learns without a teacher; leave --teacher out")
    return settings.model_copy(update={"teacher": None, "teacher_options": {}})


def _check_teacher(settings: Recipe, out: Path, request: Request) -> None:
    """One of which only the name is known serves methods that need none: it says its form."""
    teacher = settings.teacher
    if teacher is None:
        return
    if checks.need_teacher(settings.methods) or not checks.is_only_named(teacher):
        checks.check_teacher(teacher, settings.student, out, request)


def _methods(method: str | None, values: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Those of `--method`: an arm of the recipe, or names with the recipe's options for them."""
    if method is None:
        return None
    arms = values.get("arms") or {}
    return arms.get(method) or checks.parse_methods(method, values.get("methods", {}))


def _run(settings: Recipe, out: Path, resume: bool) -> None:
    """Trains, and says what came of it."""
    from detdistill.engine.train import train as train_run

    if resume and checks.is_first_process() and not (out / "recipe.yaml").exists():
        typer.echo(f"{out}: nothing to go on with in this folder; it starts anew", err=True)
    result = train_run(settings, out, resume=resume)
    if not checks.is_first_process():
        return
    best = "" if result.best_ap is None else f", best AP on val {100 * result.best_ap:.1f}"
    typer.echo(f"{out}: {result.steps} steps in {result.seconds:.0f} s{best}")


def _data_of(settings: Recipe) -> str:
    return "" if settings.data is None else f" --data {shlex.quote(settings.data)}"


def _say_next(command: str) -> None:
    if checks.is_first_process():
        typer.echo(f"Next: {command}")

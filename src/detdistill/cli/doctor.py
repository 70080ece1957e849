"""`doctor`: what is wrong, before hours are spent."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detdistill.cli import checks
from detdistill.cli.options import Assignments, Data, Method, RecipeFile, Student
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.doctor.commands import Request
    from detdistill.doctor.finding import Finding, Section
    from detdistill.doctor.run import Doctor
    from detdistill.recipe import Recipe

COLORS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
INDENT = " " * 11

Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="RUN_OR_FILE",
        help="Trained teacher, or the name of a detector that is yet to be trained.",
    ),
]
Images = Annotated[
    int,
    typer.Option("--images", metavar="N", min=1, help="At most so many for each check of images."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers; a new file.")
]


def doctor(
    context: typer.Context,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    method: Method = None,
    images: Images = 100,
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    json_file: JsonFile = None,
) -> None:
    """Check installation, data, teacher and methods before training.

    Exit code 1 when a check finds a problem. Without any option the installation alone is checked.
    """
    from detdistill.doctor.installation import check_installation

    _check_json(json_file)
    sections = [check_installation()]
    given = (teacher, student, data, method, recipe, assignments)
    broken = any(finding.level == "problem" for finding in sections[0].findings)
    if broken or not any(given):
        _show(sections[0])
        following = _after_installation(broken, context.obj)
    else:
        from detdistill.doctor.commands import Request

        request = Request(teacher, student, data, method, recipe, tuple(assignments or ()))
        settings = _settings(request)
        patient = _doctor(request, settings, images)
        _show(sections[0])
        for section in _sections(patient):
            _show(section)
            sections.append(section)
        following = _next(request, settings, patient, sections, context.obj)
    _finish(sections, following, json_file)


def _check_json(path: Path | None) -> None:
    if path is None:
        return
    if path.exists():
        raise UserError(f"--json {path}: already exists; choose another file")
    checks.check_folder(path.parent, "--json")


def _settings(request: Request) -> Recipe:
    """The recipe as `distill` and `compare` would see it."""
    values = checks.recipe_values(request.recipe)
    teacher = request.teacher
    if teacher is not None and not checks.is_only_named(teacher):
        values["teacher_options"] = {}  # those of a teacher that the recipe would train
    given = {"teacher": teacher, "student": request.student, "data": request.data}
    settings = checks.training_recipe(values, request.recipe, given, list(request.assignments))
    checks.check_student(settings)
    checks.check_detector(settings.student)
    teacher = settings.teacher
    if teacher is not None and not checks.is_only_named(teacher):
        checks.check_weights(teacher, settings.student, request)
    return settings


def _doctor(request: Request, settings: Recipe, images: int) -> Doctor:
    from detdistill.doctor.commands import larger_detector, train_command
    from detdistill.doctor.run import Doctor

    arms, asked = _arms(settings, request.method)
    detector = settings.teacher
    if detector is None or not checks.is_detector(detector):
        detector = larger_detector(settings.student)
    command = train_command(request, detector)
    return Doctor(settings, arms, asked=asked, images=images, get_teacher=command)


def _arms(settings: Recipe, method: str | None) -> tuple[dict[str, Any], bool]:
    """What to try, and whether the user named it: `--method`, the recipe's arms, or all methods."""
    from detdistill.distill import create_method, list_methods

    if method is not None:
        arms = {method: settings.methods_of(method)}
    else:
        arms = dict(settings.arms)
        if settings.methods:
            arms["+".join(settings.methods)] = settings.methods
    for methods in arms.values():
        for name, options in methods.items():
            create_method(name, **options)  # answers a wrong name or option
    return arms or {name: {name: {}} for name in list_methods()}, bool(arms)


def _sections(patient: Doctor) -> Iterator[Section]:
    """The sections as they come, with their progress while one waits for them."""
    from detdistill.progress import Counts

    sections = patient.sections()
    while True:
        with Counts() as counts:
            patient.progress = counts.update
            section = next(sections, None)
        if section is None:
            return
        yield section


def _show(section: Section) -> None:
    typer.secho(f"\n{section.title}", bold=True)
    for finding in section.findings:
        _show_finding(finding)


def _show_finding(finding: Finding) -> None:
    mark = typer.style(f"{finding.level:<7}", fg=COLORS[finding.level])
    typer.echo(f"  {mark}  {finding.text}")
    for line in finding.details:
        typer.echo(f"{INDENT}{line}")
    if finding.advice:
        typer.echo(f"{INDENT}-> {finding.advice}")


def _after_installation(broken: bool, arguments: list[str]) -> str:
    again = shlex.join(["detdistill", *arguments])
    if broken:
        return f"repair the installation, then again: {again}"
    return "detdistill doctor --student gfl_r18 --data FOLDER"


def _next(
    request: Request,
    settings: Recipe,
    patient: Doctor,
    sections: list[Section],
    arguments: list[str],
) -> str:
    """What to do after all checks."""
    from detdistill.doctor.commands import compare_command, distill_command
    from detdistill.doctor.finding import worst

    if worst(sections) == "problem":
        again = shlex.join(["detdistill", *arguments])
        return f"correct what is marked as a problem, then again: {again}"
    teacher = settings.teacher
    if teacher is None and not patient.asked:
        return patient.get_teacher
    method = patient.fitting[0]
    arm = patient.arms[method]
    if teacher is not None and checks.is_only_named(teacher) and checks.need_teacher(arm):
        return compare_command(request, method)
    return distill_command(request, method, with_teacher=checks.take_teacher(arm))


def _finish(sections: list[Section], following: str, json_file: Path | None) -> None:
    """The last lines, the file, and the exit code."""
    from detdistill.doctor.finding import counted, worst

    levels = [finding.level for section in sections for finding in section.findings]
    counts = [counted(levels.count(level), level) for level in ("problem", "warning")]
    typer.echo(f"\nFound: {', '.join(counts)}")
    result = worst(sections)
    if json_file is not None:
        content = {
            "format": 1,
            "result": result,
            "sections": {section.name: section.to_json() for section in sections},
            "next": following,
        }
        _write(json_file, json.dumps(content, indent=1, allow_nan=False))
        typer.echo(f"wrote {json_file}")
    typer.echo(f"Next: {following}")
    if result == "problem":
        raise typer.Exit(1)


def _write(path: Path, text: str) -> None:
    """The file whole or not at all; with a broken torch, too, so without `engine.checkpoint`."""
    checks.make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

"""Commands that a user can paste: what to do after the checks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from detdistill.detectors.factory import split_name
from detdistill.detectors.registry import FAMILIES
from detdistill.detectors.two_stage import TwoStageDetector

OF_THE_PAIR = ("student", "teacher=", "class_map", "methods", "arms")
"""Beginnings of settings that mean nothing when a teacher is trained."""


@dataclass(frozen=True)
class Request:
    """What the user gave, as typed; None for what was left out.

    Attributes:
        assignments: of `--set`.
    """

    teacher: str | None = None
    student: str | None = None
    data: str | None = None
    method: str | None = None
    recipe: str | None = None
    assignments: tuple[str, ...] = ()


def train_command(request: Request, detector: str) -> str:
    """Trains a teacher with the recipe's settings."""
    assignments = [
        a.replace("teacher_options", "student_options", 1) if a.startswith("teacher_options") else a
        for a in request.assignments
        if not a.startswith(OF_THE_PAIR)
    ]
    options = [("detector", detector), ("recipe", request.recipe), ("data", request.data)]
    return _command("train", options, assignments, "runs/teacher")


def distill_command(request: Request, method: str | None, *, with_teacher: bool) -> str:
    """Distils with what was checked; without `method` by those of the recipe."""
    options = [
        ("teacher", request.teacher if with_teacher else None),
        ("student", request.student),
        ("method", method),
        ("recipe", request.recipe),
        ("data", request.data),
    ]
    return _command("distill", options, request.assignments, "runs/distilled")


def compare_command(request: Request, method: str) -> str:
    """Trains the teacher that is only named, and compares."""
    options = [
        ("teacher", request.teacher),
        ("student", request.student),
        ("methods", method),
        ("seeds", "0,1,2"),
        ("recipe", request.recipe),
        ("data", request.data),
    ]
    return _command("compare", options, request.assignments, "runs/study")


def _command(
    name: str,
    options: list[tuple[str, str | None]],
    assignments: Iterable[str],
    out: str,
) -> str:
    words = ["detdistill", name]
    for option, value in [*options, *(("set", a) for a in assignments), ("out", out)]:
        if value is not None:
            words += [f"--{option}", value]
    return shlex.join(words)


def fitting_method(teacher: str, student: str) -> str:
    """One to begin with for a pair of detectors: their heads decide."""
    families = [split_name(name, {})[0] for name in (teacher, student)]
    if not any(issubclass(FAMILIES.get(family), TwoStageDetector) for family in families):
        return "crosskd"
    if families[0] != families[1]:
        return "head"
    return "crosskd_roi" if families[0] == "faster_rcnn" else "pkd"


def larger_detector(student: str) -> str:
    """A teacher of the student's family with a larger backbone."""
    family, options = split_name(student, {})
    large = any(part in str(options.get("backbone", "")) for part in ("50", "101", "152", "swin"))
    return f"{family}_{'r101' if large else 'r50'}"

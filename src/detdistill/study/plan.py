"""The state of a study in its folder: what it compares, and how far it is."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detdistill import __version__
from detdistill.data import open_dataset
from detdistill.engine.checkpoint import FREE as RUN_FREE
from detdistill.engine.checkpoint import write_json
from detdistill.errors import UserError
from detdistill.recipe import Recipe, completed
from detdistill.study.runs import read_json, study_device
from detdistill.study.tuning import tuning_of

STUDY = "study.json"
FREE = RUN_FREE | {"seed", "methods", "arms", "teacher"}
"""Recipe keys that may change between two calls: they change no result, or are set per run."""


def open_study(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Starts a study in a new or empty folder, or continues the one that is there.

    Seeds and methods may be added or left out; all else must be as it was.

    Args:
        out: the study's folder.
        settings: recipe (plain values), teacher (or None), teacher_epochs, tune_lr, methods, seeds,
            jobs, and `inputs`, fingerprints of what the study rests on.

    Returns:
        The content of `study.json`, already written.
    """
    path = out / STUDY
    state: dict[str, Any] = {"runs": {}, "latency_ms": {}}
    if not is_new_study(out):
        state = read_json(path)
        _refuse_difference(path, state, settings)
        both = {
            key: {**state["recipe"][key], **settings["recipe"][key]} for key in ("methods", "arms")
        }
        settings = {**settings, "recipe": {**settings["recipe"], **both}}
    out.mkdir(parents=True, exist_ok=True)
    state = {"format": 1, **state, **settings, "command": command_line()}
    write_json(path, state)
    return state


def is_new_study(out: Path) -> bool:
    """Whether none was begun here; a folder that holds something else is refused."""
    if (out / STUDY).exists():
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: holds something else than a study (no {STUDY}): give another --out folder"
        )
    return True


def record(out: Path, state: dict[str, Any], run: str, progress: str) -> None:
    """Notes a run as "training", "testing", "done" or "outgrown" in `study.json`."""
    state["runs"][run] = progress
    write_json(out / STUDY, state)


def command_line() -> str:
    """What was typed, with the program's plain name."""
    return shlex.join(["detdistill", *sys.argv[1:]])


def study_facts(recipe: Recipe, state: dict[str, Any]) -> dict[str, str]:
    """What one needs to know to repeat a study: command, device, versions."""
    test = open_dataset(recipe, "test")
    boxes = sum(len(record.labels) for record in test.records)
    device = study_device(recipe)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = (
            f"CPU ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"
        )
    packages = ("torch", "torchvision", "timm", "hotcoco", "numpy")
    tuning = tuning_of(state)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return {
        "command": state["command"],
        "device": name,
        "data": str(recipe.data or recipe.test_annotations),
        "test split": f"{len(test)} images, {boxes} boxes, {len(test.classes)} classes",
        "student": recipe.student,
        "teacher": state["teacher"] or "none",
        "seeds": ", ".join(str(seed) for seed in state["seeds"]),
        "runs at once": str(state["jobs"]),
        "python": platform.python_version(),
        "versions": f"detdistill {__version__}, {versions}",
        **source_commit(),
        **({} if tuning is None else {"learning rate": tuning.text}),
    }


def source_commit() -> dict[str, str]:
    """The commit of a package that runs from its own checkout; nothing for an installed one."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed package may lie below somebody else's checkout, which does not track it.
        _output([*git, "ls-files", "--error-unmatch", here.name])
        changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "."])
        commit = _output([*git, "rev-parse", "HEAD"])
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit + (" with local changes" if changed else "")}


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def scaled_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The same schedule stretched to another number of epochs."""
    factor = epochs / recipe.epochs
    steps = None if recipe.max_steps is None else max(1, round(recipe.max_steps * factor))
    milestones = [max(1, round(epoch * factor)) for epoch in recipe.milestones]
    changes = {"epochs": epochs, "max_steps": steps, "milestones": milestones}
    return recipe.model_copy(update=changes)


def _refuse_difference(path: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """`UserError` that names the first setting in which the stored study differs."""
    old, new = completed(state["recipe"]), dict(settings["recipe"])
    pairs = [(key, old.get(key), new.get(key)) for key in new if key not in FREE]
    pairs += [(key, state[key], settings[key]) for key in ("teacher", "teacher_epochs")]
    pairs += [("tune_lr", state.get("tune_lr", False), settings["tune_lr"])]
    pairs += [
        (f"arm {arm}", _methods_of(arm, old), _methods_of(arm, new))
        for arm in _arms_begun(state, settings)
    ]
    for key, before, now in pairs:
        if before != now:
            raise UserError(
                f"{path}: this folder holds a study with {key} {before!r}, asked for is {now!r}: "
                "give another --out folder, or the same settings to continue it"
            )
    for what, seen in state.get("inputs", {}).items():
        if settings["inputs"].get(what) != seen:
            raise UserError(
                f"{path}: the {what} changed since this study began: put it back as it was, or "
                f"give another --out folder"
            )


def _arms_begun(state: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Arms that are asked for and have runs already."""
    return [arm for arm in settings["methods"] if any(f"/{arm}/" in run for run in state["runs"])]


def _methods_of(arm: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """What an arm trains with, by a recipe's plain values."""
    return Recipe.model_construct(**recipe).methods_of(arm)

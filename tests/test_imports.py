"""Imports point one way, the command line starts without torch, one step is short to follow."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import detdistill
from detdistill import create_detector, save_detector
from detdistill.data import generate_dataset
from detdistill.engine import train
from detdistill.recipe import Recipe

PACKAGE = Path(detdistill.__file__).parent

BASE = {"errors", "registry", "recipe", "recipes", "structures", "boxes", "writing", "progress"}
MAY_IMPORT = {
    "parts": BASE,
    "detectors": BASE | {"parts"},
    "distill": BASE | {"parts", "detectors"},
    "data": BASE,
    "evaluation": BASE | {"detectors", "data"},
    "engine": BASE | {"parts", "detectors", "distill", "data", "evaluation"},
    "export": BASE | {"parts", "detectors", "data"},
    "drawing": BASE,
    "study": BASE | {"detectors", "distill", "data", "evaluation", "engine", "drawing"},
    "analysis": BASE | {"detectors", "distill", "data", "evaluation", "engine", "drawing"},
    "doctor": BASE | {"detectors", "distill", "data", "evaluation", "engine", "study"},
    "cli": BASE
    | {"detectors", "distill", "data", "evaluation", "engine", "drawing", "study", "analysis"}
    | {"export", "doctor"},
}
BASE_MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "recipe": {"errors", "registry"},
    "recipes": {"errors", "registry"},
    "structures": {"errors"},
    "boxes": {"errors", "structures"},
    "writing": {"errors"},
    "progress": set(),
}
# What a distillation step of GFL by CrossKD runs through, from the loop to the loss and back.
STEP = [
    "engine/train.py",
    "data/loader.py",
    "data/transforms.py",
    "detectors/base.py",
    "detectors/dense.py",
    "detectors/gfl.py",
    "distill/distiller.py",
    "distill/method.py",
    "distill/crosskd.py",
]
# What such a step uses beside `parts`, and a reader opens on demand as one opens a library;
# docs/design.md says so of each. Not run by a step at all: the way there (cli, recipe).
LIBRARY = [
    "boxes.py",
    "structures.py",
    "distill/adapters.py",
    "distill/inputs.py",
    "distill/schedule.py",
    "engine/distributed.py",
    "engine/log.py",
    "engine/optim.py",
    "engine/run.py",
]


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Top-level parts of detdistill that a file imports, anywhere in it."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("detdistill.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    allowed = BASE_MAY_IMPORT[own] if own in BASE else MAY_IMPORT[own] | {own}
    assert imported_rooms(path) - allowed == set()


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["export"]]
    declared = {plain(re.split(r"[\[<>=~!; ]", requirement)[0]) for requirement in wanted}
    provided_by = packages_distributions()
    undeclared = {
        f"{path.relative_to(PACKAGE)}: {module}"
        for path in PACKAGE.rglob("*.py")
        for module in top_modules(path) - sys.stdlib_module_names - {"detdistill"}
        if not declared & {plain(name) for name in provided_by.get(module, [])}
    }
    assert undeclared == set()


def plain(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def top_modules(path: Path) -> set[str]:
    """First parts of the names of all modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


HELP = """
import sys
from detdistill.cli import main

heavy = {"torch", "torchvision", "timm", "numpy", "lightning_fabric", "matplotlib", "hotcoco"}
heavy |= {"rich", "yaml", "PIL", "safetensors", "pydantic"}
for command in ([], ["train"], ["compare"]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0
    print(command, sorted(heavy & set(sys.modules)), file=sys.stderr)
    heavy.discard("pydantic")  # typer itself imports it for the options of a command
"""


def test_help_loads_nothing_heavy() -> None:
    found = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stderr.splitlines() == ["[] []", "['train'] []", "['compare'] []"]
    assert found.stdout.count("Usage: detdistill ") == 3


def test_one_step_is_nine_files_and_1500_lines() -> None:
    """Counts the non-blank lines, comments and docstrings included, of the whole files."""
    texts = [(PACKAGE / name).read_text(encoding="utf-8") for name in STEP]
    read = sum(1 for text in texts for line in text.splitlines() if line.strip())
    assert len(STEP) <= 9
    assert read <= 1500


class Stopped(Exception):  # noqa: N818 - no error
    """Ends a run after its first step."""


def test_one_step_runs_through_these_files_and_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}{os.sep}"):
            path = Path(frame.f_code.co_filename).relative_to(PACKAGE)
            executed.add(path.as_posix())

    def traced(*arguments: Any) -> None:
        sys.setprofile(note)
        try:
            optimize(*arguments)
        finally:
            sys.setprofile(None)
        raise Stopped

    narrow = {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16}
    save_detector(create_detector("gfl_r18", 10, **narrow), tmp_path / "teacher.safetensors")
    data = generate_dataset(tmp_path / "data", train=2, val=1, test=1, size=64)
    small = {"resize_short": [64], "resize_long": 64, "batch_size": 2, "workers": 0}
    pair = {"student": "gfl_r18", "student_options": narrow, "methods": {"crosskd": {}}}
    given = {"data": str(data), "teacher": str(tmp_path / "teacher.safetensors")}
    optimize = train._optimize
    monkeypatch.setattr(train, "_optimize", traced)
    with pytest.raises(Stopped):
        train.train(
            Recipe.model_validate({**small, **pair, **given, "accelerator": "cpu"}),
            tmp_path / "run",
        )
    counted = {path for path in executed if not path.startswith("parts/")}
    assert counted == {*STEP, *LIBRARY}
    design = (Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    assert [name for name in LIBRARY if f"`{name.removesuffix('.py')}`" not in design] == []

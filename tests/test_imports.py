"""Imports point one way, the command line starts without torch, one step is short to follow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "detdistill"

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
# What a distillation step of GFL by CrossKD runs through, from the loop to the loss and back. Not
# counted: the way there (cli, recipe), and what a reader opens on demand as one opens a library:
# `parts` (FPN, towers, assigners, losses), `boxes`, `structures`, the learning rate in `optim`.
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


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys, detdistill.cli\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'lightning_fabric', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"


def test_one_step_is_nine_files_and_1500_lines() -> None:
    """Counts the non-blank lines, comments and docstrings included, of the whole files."""
    texts = [(PACKAGE / name).read_text(encoding="utf-8") for name in STEP]
    read = sum(1 for text in texts for line in text.splitlines() if line.strip())
    assert len(STEP) <= 9
    assert read <= 1500

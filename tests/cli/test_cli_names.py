"""Commands that only name things: --help, list, recipe copy; and the bundled recipes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml

from detdistill.cli import main
from detdistill.recipe import read_yaml, resolve_recipe, validate_recipe
from detdistill.recipes import list_recipes, recipe_path
from tests.cli.conftest import Run

COMMANDS = [
    ("demo",),
    ("doctor",),
    ("train",),
    ("distill",),
    ("compare",),
    ("eval",),
    ("predict",),
    ("export",),
    ("analyze",),
    ("list",),
    ("fetch",),
    ("convert",),
    ("recipe",),
    ("recipe", "copy"),
    ("data", "builtin"),
    ("data", "convert"),
]


def test_a_stream_that_knows_no_delta_shows_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit):
        main(["list", "methods"])
    print("ΔAP")
    assert out.buffer.getvalue().endswith(b"\\u0394AP\n")  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_has_help(command: tuple[str, ...], run: Run) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"Usage: detdistill {' '.join(command)}" in out


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    shown = {line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line}
    assert shown == {command[0] for command in COMMANDS}


@pytest.mark.parametrize(
    ("kind", "pattern", "expected", "left_out"),
    [
        ("detectors", "gfl*", "gfl_r18", "retinanet_r18"),
        ("methods", "*", "crosskd", ""),
        ("recipes", "crosskd/*", "crosskd/gfl_r50_r101_1x", "deeppcb"),
    ],
)
def test_list(kind: str, pattern: str, expected: str, left_out: str, run: Run) -> None:
    code, out, err = run("list", kind, pattern)
    assert code == 0
    assert expected in out.splitlines()
    assert left_out not in out.splitlines()
    assert "Next: detdistill" in err


def test_list_without_a_match(run: Run) -> None:
    code, out, err = run("list", "detectors", "yolo*")
    assert (code, out) == (2, "")
    assert "'yolo*'" in err


def test_recipe_copy_tells_how_to_run_the_copy(run: Run) -> None:
    code, out, _ = run("recipe", "copy", "crosskd/gfl_r50_r101_1x", "--out", "mine/own.yaml")
    assert code == 0
    assert Path("mine/own.yaml").read_text() == recipe_path("crosskd/gfl_r50_r101_1x").read_text()
    assert "Next: detdistill distill --recipe mine/own.yaml" in out


def test_recipe_copy_keeps_what_is_there(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bccd.yaml").write_text("mine")
    code, _, err = run("recipe", "copy", "bccd")
    assert code == 2
    assert "bccd.yaml: already exists" in err
    assert (tmp_path / "bccd.yaml").read_text() == "mine"


def test_recipe_copy_through_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run("recipe", "copy", "bccd", "--out", "file/bccd.yaml")
    assert code == 2
    assert "file is a file, not a folder" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", list_recipes())
def test_bundled_recipes(name: str) -> None:
    path = recipe_path(name)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith("# detdistill ")
    assert name in lines[0] or lines[0].startswith("# detdistill demo")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe = validate_recipe(values, name)
    changed = resolve_recipe(read_yaml(path), name, assignments=["epochs=1"])
    assert changed == recipe.model_copy(update={"epochs": 1})


@pytest.mark.parametrize("name", list_recipes())
def test_bundled_recipes_build_their_models(name: str) -> None:
    from detdistill.detectors import create_detector
    from detdistill.distill import create_method

    recipe = validate_recipe(read_yaml(recipe_path(name)), name)
    # Weights of the net are not there to be had in a test.
    offline = {"pretrained": False}
    create_detector(recipe.student, 3, **{**recipe.student_options, **offline})
    if recipe.teacher is not None:
        create_detector(recipe.teacher, 3, **{**recipe.teacher_options, **offline})
    for methods in (recipe.methods, *recipe.arms.values()):
        for method, options in methods.items():
            create_method(method, **options)

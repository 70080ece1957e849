from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from detdistill.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `detdistill` in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    # On a slow machine a command that others find quick would tell how far it is.
    monkeypatch.setattr("detdistill.progress.LINE_SECONDS", math.inf)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_code:
            main(list(arguments))
        captured = capsys.readouterr()
        return int(exit_code.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from detdistill.data import generate_dataset

    folder = tmp_path_factory.mktemp("data") / "my_coco"
    generate_dataset(folder, train=8, val=4, test=4, size=96)
    return folder


@pytest.fixture
def my_coco(tiny_data: Path, tmp_path: Path) -> Path:
    """A tiny data set of this test alone, which it may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "my_coco"))

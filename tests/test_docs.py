"""Every fenced code block of README.md and docs/ works as it stands.

A page's blocks run in their order, in one folder that holds a tiny data set in three formats,
`my_coco`, `my_yolo` and `my_voc`, another in one piece, `pictures` and `labels.json`, two years of
VOC in `VOCdevkit`, and a trained `runs/teacher` and `runs/distilled`. The only
change to a command is that training commands and `doctor` get the settings of `SMALL` appended,
which make them short. All must succeed, but `doctor` may find problems: that teacher was trained
for two steps.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from detdistill.cli import main
from detdistill.detectors.registry import FAMILIES
from detdistill.distill.method import METHODS
from detdistill.recipe import validate_recipe
from tests.data.other_formats import write_devkit, write_voc, write_yolo

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NARROW = "{base_channels: 8, fpn_channels: 32, tower_channels: 64}"
SMALL = [
    *("--set", "max_steps=2", "--set", "epochs=1", "--set", "batch_size=2", "--set", "workers=0"),
    *("--set", "resize_short=[64]", "--set", "resize_long=64", "--set", "log_every=1"),
    *("--set", f"student_options={NARROW}", "--set", f"teacher_options={NARROW}"),
]
TRAINING = ("train", "distill", "compare")
GIVEN = ("runs/teacher", "runs/distilled")  # trained before the page begins


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def command(line: str) -> None:
    """Runs one `detdistill` line; shell patterns are expanded as a shell does."""
    arguments = []
    for word in shlex.split(line)[1:]:
        arguments += sorted(str(path) for path in Path().glob(word)) if "*" in word else [word]
    if arguments[0] in TRAINING:
        if arguments[arguments.index("--out") + 1] in GIVEN:
            return
        arguments += SMALL
    if arguments[0] == "doctor" and "--data" in arguments:
        arguments += SMALL
    if arguments[:2] == ["data", "builtin"]:
        arguments[2:] = ["--out", "generated", "--train", "2", "--val", "1", "--test", "1"]
    with pytest.raises(SystemExit) as finished:
        main(arguments)
    assert finished.value.code in ((0, 1) if arguments[0] == "doctor" else (0,)), line


def bash(text: str) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in filter(None, text.splitlines()):
        if line.startswith("detdistill "):
            command(line)
        else:
            assert line.startswith("make ") and line.split()[1] in targets, line


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets and the trained models that the pages speak of."""
    from detdistill.data import generate_dataset

    folder = tmp_path_factory.mktemp("docs")
    generate_dataset(folder / "my_coco", train=4, val=2, test=2, size=96)
    generate_dataset(folder / "whole", train=20, val=1, test=1, size=64)
    (folder / "whole/images").rename(folder / "pictures")
    (folder / "whole/annotations/train.json").rename(folder / "labels.json")
    write_yolo(folder / "my_coco", folder / "my_yolo")
    write_voc(folder / "my_coco", folder / "my_voc")
    write_devkit(folder / "VOCdevkit")
    data = ["--data", str(folder / "my_coco"), *SMALL]
    teacher, distilled = (str(folder / name) for name in GIVEN)
    pair = ["--teacher", teacher, "--student", "gfl_r18", "--method", "crosskd"]
    for arguments in (
        ["train", "--detector", "gfl_r18", "--out", teacher, *data],
        ["distill", *pair, "--out", distilled, *data],
    ):
        with pytest.raises(SystemExit) as finished:
            main(arguments)
        assert finished.value.code == 0
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry in (METHODS, FAMILIES):  # what a page registers is gone with it
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "here"))
    names: dict[str, object] = {}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "bash":
            bash(text)
        elif language == "yaml":
            validate_recipe(yaml.safe_load(text), page.name)
        else:
            assert language == "", f"{page.name}: a block of {language} is not tested"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (page.parent / link).exists()] == []

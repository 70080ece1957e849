"""`data split` on images of 96 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_cli_bad_input import refused
from tests.data.other_formats import write_yolo


def images_of(folder: Path, split: str) -> set[str]:
    data = json.loads((folder / f"annotations/{split}.json").read_text())
    assert all((folder / "images" / image["file_name"]).is_file() for image in data["images"])
    return {Path(image["file_name"]).name for image in data["images"]}


def without(folder: Path, split: str) -> Path:
    (folder / f"annotations/{split}.json").unlink()
    return folder


def test_one_file(run: Run, my_coco: Path) -> None:
    source = my_coco / "annotations/train.json"
    given = ["--images", str(my_coco / "images"), "--annotations", str(source)]
    code, out, err = run("data", "split", *given, "--val", "0.25", "--test", "0.25", "--out", "new")
    assert code == 0 and err == ""
    parts = [images_of(Path("new"), split) for split in ("train", "val", "test")]
    whole = {Path(image["file_name"]).name for image in json.loads(source.read_text())["images"]}
    assert set.union(*parts) == whole and sum(map(len, parts)) == len(whole) == 8
    assert all(parts)
    lines = out.splitlines()
    assert lines[0].split() == ["train", "val", "test"]
    assert lines[1].split() == ["images", *(str(len(part)) for part in parts)]
    counts = [sum(map(int, line.split()[-3:])) for line in lines[2:-1]]
    assert sum(counts) == len(json.loads(source.read_text())["annotations"])
    assert lines[-1].startswith("Next: detdistill train --detector gfl_r18 --data new")


def test_splits_that_are_there_are_kept(run: Run, my_coco: Path) -> None:
    val = images_of(my_coco, "val")
    without(my_coco, "test")
    code, _, err = run("data", "split", "--data", "my_coco", "--test", "0.25", "--out", "new")
    assert code == 0 and err == ""
    assert images_of(Path("new"), "val") == val
    assert len(images_of(Path("new"), "train")) == 6 and len(images_of(Path("new"), "test")) == 2


def test_yolo(run: Run, my_coco: Path) -> None:
    data = write_yolo(my_coco, Path("mine")) / "data.yaml"
    lines = data.read_text().splitlines()
    data.write_text("\n".join(line for line in lines if not line.startswith("test")))
    code, _, err = run("data", "split", "--data", "mine", "--test", "0.25", "--out", "new")
    assert code == 0 and err == ""
    assert {len(images_of(Path("new"), split)) for split in ("train", "test")} == {6, 2}


def test_val_is_cut_anew_from_train_and_val(run: Run, my_coco: Path) -> None:
    before = {split: images_of(my_coco, split) for split in ("train", "val", "test")}
    share = ["--trainval", "--val", "0.25", "--out", "new"]
    code, _, err = run("data", "split", "--data", "my_coco", *share)
    assert code == 0 and err == ""
    train, val, test = (images_of(Path("new"), split) for split in before)
    assert len(train) == 9 and len(val) == 3 and test == before["test"]
    assert train | val == before["train"] | before["val"] and val != before["val"]


FAULTS = {
    "nothing given": ([], "give either --data FOLDER, or --images FOLDER with --annotations FILE"),
    "no images": (["--annotations", "x.json"], "give either --data FOLDER"),
    "both": (["--data", "my_coco", "--images", "a", "--annotations", "b"], "give either --data"),
    "nothing missing": (["--data", "my_coco"], "has all three splits already"),
    "val is there": (
        ["--data", "my_coco", "--val", "0.2"],
        ("--val 0.2: the data has a val split", "add --trainval to cut it from train and val"),
    ),
    "test is there": (
        ["--data", "my_coco", "--trainval", "--test", "0.2"],
        "--test 0.2: the data has a test split",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused(fault: str, run: Run, my_coco: Path) -> None:
    arguments, expected = FAULTS[fault]
    fragments = (expected,) if isinstance(expected, str) else expected
    refused(run, ["data", "split", *arguments, "--out", "run"], *fragments)


@pytest.mark.parametrize("share", ["0", "-0.1", "1", "nan"])
def test_impossible_shares(share: str, run: Run, my_coco: Path) -> None:
    without(my_coco, "test")
    given = ["--data", "my_coco", "--test", share, "--out", "run"]
    refused(run, ["data", "split", *given], "--test", "leave some images to train on")


def test_without_train(run: Run, my_coco: Path) -> None:
    without(my_coco, "train")
    given = ["--data", "my_coco", "--out", "run"]
    refused(run, ["data", "split", *given], "there is no train split to cut others from")

"""YOLO, Pascal VOC and Roboflow's COCO data on the command line, on images of 64 pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from detdistill.evaluation.coco import NUMBERS
from tests.cli.conftest import Run
from tests.cli.test_cli_bad_input import refused
from tests.cli.test_cli_runs import SMALL
from tests.data.other_formats import text, voc_object, write_roboflow, write_voc, write_yolo, xml

Write = Callable[[Path, Path], Path]
FORMATS = pytest.mark.parametrize("write", [write_yolo, write_voc, write_roboflow])


@FORMATS
def test_train_and_measure(write: Write, run: Run, tiny_data: Path) -> None:
    write(tiny_data, Path("mine"))
    short = [*SMALL, "--set", "max_steps=1"]
    code, _, err = run(
        "train", "--detector", "gfl_r18", "--data", "mine", "--out", "teacher", *short
    )
    assert code == 0, err
    code, out, err = run("eval", "--weights", "teacher", "--data", "mine", "--split", "val")
    assert code == 0 and err == ""
    header, numbers = out.splitlines()[1:3]
    assert header.split() == list(NUMBERS) and len(numbers.split()) == 12


@FORMATS
def test_convert(write: Write, run: Run, tiny_data: Path) -> None:
    write(tiny_data, Path("mine"))
    code, out, err = run("data", "convert", "--data", "mine", "--out", "as_coco")
    assert code == 0 and err == ""
    assert "as_coco: 8 train, 4 val, 4 test images of 10 classes" in out
    assert "Next: detdistill train --detector gfl_r18 --data as_coco" in out
    for split in ("train", "val", "test"):
        data = json.loads(Path(f"as_coco/annotations/{split}.json").read_text())
        assert all((Path("as_coco/images") / i["file_name"]).exists() for i in data["images"])
        source = json.loads((tiny_data / f"annotations/{split}.json").read_text())
        assert len(data["annotations"]) == len(source["annotations"])
    code, _, err = run("data", "convert", "--data", "mine", "--out", "as_coco")
    assert code == 2 and "as_coco: exists and holds something else" in err


def test_convert_into_this_folder(
    run: Run, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, _, err = run("data", "convert", "--data", str(tiny_data), "--out", ".")
    assert code == 0, err
    assert (tmp_path / "here/annotations/train.json").exists()


def test_convert_takes_the_splits_that_are_there(run: Run, tiny_data: Path) -> None:
    folder = write_yolo(tiny_data, Path("mine"))
    lines = (folder / "data.yaml").read_text().splitlines()
    text(folder / "data.yaml", [line for line in lines if not line.startswith("test")])
    text(folder / "labels/val/z.txt", ["0 0.5 0.5 0.1 0.1"])
    code, out, err = run("data", "convert", "--data", "mine/data.yaml", "--out", "as_coco")
    assert code == 0 and "8 train, 4 val images" in out
    assert err.splitlines() == [
        "mine/data.yaml: mine/labels/val/z.txt: there is no image of this name (left out)"
    ]
    strict = ["data", "convert", "--data", "mine", "--out", "run", "--strict"]
    refused(run, strict, "mine/labels/val/z.txt")
    text(folder / "data.yaml", ["names: [cat]"])
    refused(run, [*strict[:-1]], "mine/data.yaml: no train split")


YOLO_FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no names": (lambda f: text(f / "data.yaml", ["train: images/train"]), ["data.yaml", "names"]),
    "not YAML": (lambda f: text(f / "data.yaml", ["names: ["]), ["data.yaml", "not YAML"]),
    "no data.yaml": (lambda f: (f / "data.yaml").unlink(), ["mine", "data.yaml", "(VOC)"]),
    "no labels": (lambda f: (f / "labels").rename(f / "label"), ["labels/train/train_000000.txt"]),
    "empty image": (
        lambda f: (f / "images/val/val_000000.jpg").write_text(""),
        ["images/val/val_000000.jpg", "0 bytes"],
    ),
}


@pytest.mark.parametrize("fault", YOLO_FAULTS)
def test_yolo_faults(fault: str, run: Run, tiny_data: Path) -> None:
    damage, fragments = YOLO_FAULTS[fault]
    folder = write_yolo(tiny_data, Path("mine"))
    damage(folder)
    refused(
        run,
        ["train", "--detector", "gfl_r18", "--data", "mine", "--out", "run", *SMALL],
        *fragments,
    )


VOC_FAULTS: dict[str, tuple[str, str]] = {
    "cut off": (xml()[:-3], "cut off"),
    "entities": ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "DOCTYPE"),
    "a fault of one object": (xml(voc_object("circle", 1, 1, "nan", 5), (96, 96)), "object 1"),
}


@pytest.mark.parametrize("fault", VOC_FAULTS)
def test_voc_faults(fault: str, run: Run, tiny_data: Path) -> None:
    content, words = VOC_FAULTS[fault]
    folder = write_voc(tiny_data, Path("mine"))
    file = text(folder / "VOC2007/Annotations/train_000000.xml", [content])
    arguments = ["train", "--detector", "gfl_r18", "--data", "mine", "--out", "run", "--strict"]
    refused(run, [*arguments, *SMALL], str(file), words)

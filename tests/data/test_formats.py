"""The same data in every format, told apart by what lies in the folder."""

import json
from pathlib import Path

import pytest
import torch

from detdistill.data import export, generate_dataset, open_dataset, write_coco_folder
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from tests.data.other_formats import (
    SPLITS,
    opened,
    picture,
    text,
    voc_object,
    write_roboflow,
    write_voc,
    write_yolo,
)
from tests.data.other_formats import xml as voc_xml


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built_in") / "coco"
    return generate_dataset(folder, train=5, val=2, test=3, size=64)


def same(one, other):
    """Equal images, boxes to a thousandth of a pixel, equal labels."""
    assert one.classes == other.classes and len(one) == len(other)
    for index, (a, b) in enumerate(zip(one.records, other.records, strict=True)):
        torch.testing.assert_close(a.boxes_xyxy, b.boxes_xyxy, atol=1e-3, rtol=0)
        assert a.labels.tolist() == b.labels.tolist() and a.crowd.tolist() == b.crowd.tolist()
        torch.testing.assert_close(a.areas, b.areas, atol=0.1, rtol=1e-3)
        assert torch.equal(one.read(index), other.read(index))


@pytest.mark.parametrize("write", [write_yolo, write_voc, write_roboflow])
def test_round_trip(coco, tmp_path, write):
    other = write(coco, tmp_path / "other")
    datasets = [opened(other, split, strict=True) for split in SPLITS]
    back = write_coco_folder(tmp_path / "back", datasets)
    for split in SPLITS:
        same(opened(coco, split), opened(other, split))
        same(opened(other, split), opened(back, split, strict=True))


def test_the_written_folder_is_plain_coco(coco, tmp_path):
    seen = []
    out = write_coco_folder(
        tmp_path / "deep/out",
        [opened(coco, "val")],
        progress=lambda *done: seen.append(done),
    )
    assert seen == [(1, 2), (2, 2)]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    data = json.loads((out / "annotations/val.json").read_text())
    source = json.loads((coco / "annotations/val.json").read_text())
    assert [image["file_name"] for image in data["images"]] == [
        f"val/{image['file_name']}" for image in source["images"]
    ]
    assert [entry["bbox"] for entry in data["annotations"]] == [
        entry["bbox"] for entry in source["annotations"]
    ]
    image = out / "images" / data["images"][0]["file_name"]
    original = coco / "images" / source["images"][0]["file_name"]
    assert image.samefile(original)
    with pytest.raises(UserError, match="out: exists and holds something else"):
        write_coco_folder(out, [opened(coco, "val")])


def test_images_are_copied_where_links_are_not_possible(coco, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(export.os, "link", refuse)
    out = write_coco_folder(tmp_path / "out", [opened(coco, "val")])
    same(opened(coco, "val"), opened(out, "val"))
    original = next((coco / "images").glob("val*"))
    copied = out / "images" / "val" / original.name
    assert copied.read_bytes() == original.read_bytes() and not copied.samefile(original)


def test_equal_names_in_two_folders(tmp_path):
    sizes = {"day/a.png": 40, "night/A.png": 48, "night/2_A.png": 56}
    for name, width in sizes.items():
        picture(tmp_path / "set/images" / name, width)
    text(tmp_path / "set/labels/day/a.txt", ["0 0.5 0.5 0.5 0.5"])
    text(tmp_path / "set/data.yaml", ["train: images", "names: [cat]"])
    dataset = opened(tmp_path / "set")
    out = write_coco_folder(tmp_path / "out", [dataset])
    assert len(list((out / "images/train").iterdir())) == 3
    same(dataset, opened(out))


def test_turned_images_stay_upright(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 8
    picture(tmp_path / "set/images/a.jpg", exif=exif)
    text(tmp_path / "set/labels/a.txt", ["0 0.5 0.5 0.5 0.2"])
    text(tmp_path / "set/data.yaml", ["train: images", "names: [cat]"])
    dataset = opened(tmp_path / "set")
    same(dataset, opened(write_coco_folder(tmp_path / "out", [dataset])))
    assert dataset.read(0).shape == (3, 40, 30)


def test_the_first_of_coco_yolo_voc_is_taken(coco, tmp_path):
    root = write_voc(coco, tmp_path / "all")
    assert opened(root).source.name == "train.txt"
    write_yolo(coco, root)
    assert opened(root).source.name == "data.yaml"
    write_coco_folder(tmp_path / "out", [opened(coco)])
    (tmp_path / "out/annotations").rename(root / "annotations")
    with pytest.raises(UserError, match=r"no val split, looked for annotations/val\.json"):
        opened(root, "val")


def test_what_is_none_of_the_three(tmp_path):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "pictures/a.png")
    text(tmp_path / "labelled/labels/a.txt", ["0 0.5 0.5 0.5 0.5"])
    for name, found in [
        ("empty", "the data folder is empty"),
        ("pictures", "neither COCO nor YOLO nor Pascal VOC data"),
        ("labelled", "neither COCO nor YOLO nor Pascal VOC data"),
    ]:
        with pytest.raises(UserError) as caught:
            opened(tmp_path / name, "val")
        for words in (
            f"{name}: {found}",
            "annotations/val.json or annotations/instances_val2017.json or "
            "valid/_annotations.coco.json (COCO)",
            "data.yaml",
            "Annotations/*.xml with ImageSets/Main/val.txt",
            "val/*.xml",
        ):
            assert words in str(caught.value)


@pytest.mark.parametrize("given", ["images", "images/train", ""])
def test_the_folder_that_was_meant_is_named(tmp_path, given):
    picture(tmp_path / "outer/mine/images/train/a.png")
    text(tmp_path / "outer/mine/data.yaml", ["names: [cat]"])
    with pytest.raises(UserError, match=r"mine holds data\.yaml: was that meant\?"):
        opened(tmp_path / "outer" / ("mine" if given else "") / given, "val")


def test_explicit_files_win_over_the_folder(coco, tmp_path):
    text(tmp_path / "VOC/Annotations/a.xml", [voc_xml(voc_object("cat", 1, 1, 2, 2))])
    recipe = Recipe(
        data=str(tmp_path / "VOC"),
        val_images=str(coco / "images"),
        val_annotations=str(coco / "annotations/val.json"),
    )
    assert len(open_dataset(recipe, "val")) == 2

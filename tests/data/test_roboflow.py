"""COCO as Roboflow exports it: where the files lie, and what becomes of its extra category."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detdistill.data.splits import has_split
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from tests.data.other_formats import SPLITS, opened, picture

FOLDERS = dict(zip(SPLITS, ("train", "valid", "test"), strict=True))
Json = dict[str, Any]
Write = Callable[..., Path]


def category(number: int, name: str, parent: str) -> Json:
    return {"id": number, "name": name, "supercategory": parent}


ANIMALS = [
    category(0, "animals", "none"),
    category(1, "cat", "animals"),
    category(2, "dog", "animals"),
]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """An export with one image a split and a box of each of the given category ids in it."""

    def write(categories: list[Json], **boxes: list[int]) -> Path:
        for split, numbers in boxes.items():
            folder = tmp_path / "export" / FOLDERS[split]
            picture(folder / "a_jpg.rf.1f.jpg")
            data = {
                "images": [{"id": 0, "file_name": "a_jpg.rf.1f.jpg", "width": 40, "height": 30}],
                "annotations": [
                    {"id": i, "image_id": 0, "category_id": number, "bbox": [i, 1, 9, 9]}
                    for i, number in enumerate(numbers)
                ],
                "categories": categories,
            }
            (folder / "_annotations.coco.json").write_text(json.dumps(data))
        return tmp_path / "export"

    return write


def test_the_category_that_groups_the_others_is_no_class(write: Write) -> None:
    folder = write(ANIMALS, train=[1, 2, 2], val=[2], test=[1])
    for split, labels in (("train", [0, 1, 1]), ("val", [1]), ("test", [0])):
        dataset = opened(folder, split, strict=True)
        assert dataset.classes == ["cat", "dog"] and dataset.category_ids == [1, 2]
        assert dataset.records[0].labels.tolist() == labels
        assert dataset.source == folder / FOLDERS[split] / "_annotations.coco.json"
    named = {"test_images": str(folder / "test"), "test_annotations": str(dataset.source)}
    assert opened(folder, "test", **named).classes == ["cat", "dog"]


@pytest.mark.parametrize("split", SPLITS)
def test_it_is_a_class_of_all_splits_where_one_has_a_box_of_it(write: Write, split: str) -> None:
    boxes = {name: [1] for name in SPLITS}
    boxes[split] = [1, 0]
    folder = write(ANIMALS, **boxes)
    for name in SPLITS:
        assert opened(folder, name).classes == ["animals", "cat", "dog"]


def test_it_may_be_called_as_the_class_in_it(write: Write) -> None:
    folder = write([category(0, "car", "none"), category(1, "car", "car")], train=[1])
    assert opened(folder).category_ids == [1]
    write([category(0, "car", "none"), category(1, "car", "car")], train=[0, 1])
    with pytest.raises(UserError, match="two categories are called 'car'"):
        opened(folder)


@pytest.mark.parametrize(
    "categories",
    [
        [category(0, "cat", "none"), category(1, "dog", "none")],
        [category(0, "animals", "none"), category(1, "cat", "animals"), category(2, "van", "cars")],
        [category(0, "cat", "none")],
        [category(0, "cat", "cat"), category(1, "dog", "animals")],
    ],
)
def test_other_categories_without_boxes_are_classes(write: Write, categories: list[Json]) -> None:
    folder = write(categories, train=[len(categories) - 1])
    assert opened(folder).classes == [entry["name"] for entry in categories]


def test_other_files_of_coco_keep_all_their_categories(write: Write) -> None:
    folder = write(ANIMALS, train=[1])
    (folder / "train").rename(folder / "images")
    (folder / "annotations").mkdir()
    (folder / "images/_annotations.coco.json").rename(folder / "annotations/train.json")
    assert opened(folder).classes == ["animals", "cat", "dog"]


def test_a_broken_split_is_told_when_it_is_opened(write: Write) -> None:
    folder = write(ANIMALS, train=[1], val=[1])
    (folder / "valid/_annotations.coco.json").write_text("{")
    assert opened(folder).classes == ["cat", "dog"]
    with pytest.raises(UserError, match=r"valid/_annotations\.coco\.json: not JSON"):
        opened(folder, "val")


def test_a_split_that_is_not_there(write: Write) -> None:
    folder = write(ANIMALS, train=[1], val=[1])
    assert not has_split(Recipe(data=str(folder)), "test")
    with pytest.raises(UserError, match=r"no test split, looked for .*test/_annotations\.coco"):
        opened(folder, "test")

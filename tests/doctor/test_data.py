"""Each check of the data on splits made by hand, and on a folder."""

import json
import shutil

import pytest

from detdistill.doctor.data import (
    check_classes,
    check_data,
    check_split,
    shared_images,
    split_numbers,
)
from detdistill.errors import UserError
from tests.doctor.conftest import dataset_of, levels

BOX = [10.0, 10.0, 50.0, 60.0]


def test_a_good_split():
    split = dataset_of([[BOX, BOX], [BOX], []], [[0, 1], [1], []])
    [found] = check_split(split)
    assert found.level == "ok"
    assert found.text == "train: 3 images, 3 boxes, 2 classes, 1 image without boxes"
    assert split_numbers(split)["boxes_per_class"] == {"cat": 1, "dog": 2}


def test_most_images_without_boxes():
    _, found = check_split(dataset_of([[BOX], [], []]))
    assert found.level == "warning" and "2 of 3 images" in found.text


def test_no_box_at_all():
    _, found = check_split(dataset_of([[], []], split="val"))
    assert found.level == "warning" and "no box at all" in found.text


def test_few_faults_are_a_warning_many_a_problem():
    faults = [f"image {i}: odd" for i in range(5)]
    _, few = check_split(dataset_of([[BOX] * 100], faults=faults))
    assert few.level == "warning"
    assert "5 faults: image 0: odd; image 1: odd; image 2: odd; and 2 more" in few.text
    _, many = check_split(dataset_of([[BOX] * 40], faults=faults))
    assert many.level == "problem" and "[x, y, width, height]" in many.advice


def test_coordinates_that_are_shares():
    _, found = check_split(dataset_of([[[0.1, 0.1, 0.5, 0.6]] * 3]))
    assert found.level == "problem" and "shares of the image" in found.advice


def test_classes_that_are_learnt():
    train = dataset_of([[BOX] * 20], [[0] * 10 + [1] * 10])
    test = dataset_of([[BOX] * 2], [[0, 1]], split="test")
    assert check_classes({"train": train, "test": test}) == []


def test_absent_and_rare_classes():
    train = dataset_of([[BOX] * 3], [[1, 1, 1]])
    val = dataset_of([[BOX] * 5], [[0, 0, 0, 0, 1]], split="val")
    absent, rare = check_classes({"train": train, "val": val})
    assert absent.level == "problem" and "cat (4 boxes)" in absent.text
    assert rare.level == "warning" and "dog (3)" in rare.text
    # What is not measured is not told.
    other = dataset_of([[BOX]], [[1]], split="val")
    assert levels(check_classes({"train": train, "val": other})) == ["warning"]


def test_other_classes_in_another_split():
    train = dataset_of([[BOX]])
    val = dataset_of([[BOX]], split="val", classes=("cat", "bird"))
    [found] = check_classes({"train": train, "val": val})
    assert found.level == "problem" and "bird" in found.text


@pytest.fixture
def folder(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "data")


def settings_for(recipe, folder):
    return recipe.model_copy(update={"data": str(folder)})


def test_a_good_folder(recipe, shapes):
    section, splits = check_data(recipe)
    assert list(splits) == ["train", "val", "test"]
    assert section.numbers["splits"]["train"]["images"] == 8
    assert section.numbers["shared_images"] == {}
    json.dumps(section.to_json(), allow_nan=False)
    texts = [finding.text for finding in section.findings if finding.level == "ok"]
    assert [text.partition(":")[0] for text in texts] == ["train", "val", "test"]


def test_images_in_two_splits(recipe, folder):
    images = folder / "images"
    names = {
        split: sorted(path for path in images.glob(f"{split}_*")) for split in ("train", "val")
    }
    shutil.copyfile(names["train"][1], names["val"][0])
    section, splits = check_data(settings_for(recipe, folder))
    [found] = [f for f in section.findings if f.level == "problem" and "too" in f.text]
    assert "1 image of val is in train" in found.text and names["val"][0].name in found.text
    assert section.numbers["shared_images"] == {"train+val": 1}
    shared = shared_images(splits)
    assert shared == {("train", "val"): [names["val"][0]]}


def test_only_equal_contents_are_the_same(recipe, folder):
    images = folder / "images"
    train, val = sorted(images.glob("train_*"))[0], sorted(images.glob("val_*"))[0]
    data = train.read_bytes()
    # Of equal size, and equal up to the last byte, which decoders pass over.
    train.write_bytes(data + b"\x00" * 20000 + b"\xff\xd9\x01")
    val.write_bytes(data + b"\x00" * 20000 + b"\xff\xd9\x02")
    _, splits = check_data(settings_for(recipe, folder))
    assert shared_images(splits) == {}


@pytest.mark.parametrize(("split", "level"), [("val", "problem"), ("test", "warning")])
def test_a_split_that_is_not_there(recipe, folder, split, level):
    (folder / "annotations" / f"{split}.json").unlink()
    section, splits = check_data(settings_for(recipe, folder))
    assert split not in splits
    [found] = [f for f in section.findings if f"no {split} split" in f.text]
    assert found.level == level


def test_without_a_training_split_there_is_nothing_to_check(recipe, folder):
    (folder / "annotations" / "train.json").unlink()
    with pytest.raises(UserError, match="no train split"):
        check_data(settings_for(recipe, folder))


def test_a_broken_image_is_a_problem_that_hides_no_other(recipe, folder):
    broken = sorted((folder / "images").glob("train_*"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    (folder / "annotations" / "test.json").unlink()
    section, splits = check_data(settings_for(recipe, folder))
    assert list(splits) == ["val"]
    assert {"problem", "warning"} <= set(levels(section.findings))
    assert any(broken.name in f.text and f.level == "problem" for f in section.findings)

import copy
import json
import math
import shutil

import pytest
import torch

from detdistill.data import open_dataset
from detdistill.data.dataset import DetectionDataset
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from tests.data.coco_samples import coco_dict, rewrite


def opened(folder, data, **options) -> DetectionDataset:
    recipe = rewrite(folder, data)
    return open_dataset(recipe.model_copy(update=options), "train")


def test_reads_images_boxes_and_sparse_categories(write_folder):
    dataset = open_dataset(Recipe(data=str(write_folder())), "train")
    assert dataset.classes == ["cat", "dog"]
    assert dataset.category_ids == [7, 90]
    assert [record.image_id for record in dataset.records] == [11, 5, 20]
    first, second, third = dataset.records
    assert first.labels.tolist() == [1, 0]
    assert first.boxes_xyxy.tolist() == [[2, 3, 12, 11], [20.25, 5.5, 32.25, 25.5]]
    assert first.areas.tolist() == [70.5, 240.0]
    assert second.crowd.tolist() == [True, False]
    assert third.boxes_xyxy.shape == (0, 4)
    assert dataset.faults == [] and dataset.fault_summary() == ""
    assert dataset.read(0).shape == (3, 30, 40)


def test_ground_truth_is_the_file(write_folder):
    truth = open_dataset(Recipe(data=str(write_folder())), "train").ground_truth()
    assert [a["bbox"] for a in truth["annotations"]] == [
        a["bbox"] for a in coco_dict()["annotations"]
    ]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1, 0]
    assert [a["category_id"] for a in truth["annotations"]] == [90, 7, 7, 7]
    assert [a["image_id"] for a in truth["annotations"]] == [11, 11, 5, 5]
    assert truth["categories"] == [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]
    assert len(truth["images"]) == 3
    json.dumps(truth)


def test_a_clipped_box_is_no_larger_than_what_is_left(write_folder):
    data = coco_dict()
    data["annotations"][0].update(bbox=[35, 3, 10, 8], area=80)
    dataset = opened(write_folder(), data)
    assert dataset.records[0].areas[0].item() == 40


@pytest.mark.parametrize(
    ("change", "word", "boxes_left"),
    [
        ({"bbox": [math.nan, 1, 5, 5]}, "finite", 1),
        ({"bbox": [1, 1, math.inf, 5]}, "finite", 1),
        ({"bbox": [1, 1, -5, 5]}, "positive", 1),
        ({"bbox": [1, 1, 5, 0]}, "positive", 1),
        ({"bbox": [1, 1, 5]}, "four", 1),
        ({"bbox": [1, "1", 5, 5]}, "four", 1),
        ({"bbox": None}, "four", 1),
        ({"bbox": [10**400, 1, 5, 5]}, "four", 1),
        ({"bbox": [41, 3, 10, 8]}, "no area inside", 1),
        ({"bbox": [2, -20, 10, 8]}, "no area inside", 1),
        ({"bbox": [35, 3, 10, 8]}, "pokes out", 2),
        ({"category_id": 8}, "category id 8", 1),
        ({"category_id": None}, "category id None", 1),
        ({"image_id": 12}, "no such image", 1),
        ({"iscrowd": "0"}, "iscrowd is '0', not 0 or 1", 1),
        ({"iscrowd": math.nan}, "iscrowd is nan, not 0 or 1", 1),
    ],
)
def test_faulty_annotations_are_named_and_strict_stops(write_folder, change, word, boxes_left):
    data = coco_dict()
    data["annotations"][0].update(change)
    folder = write_folder()
    dataset = opened(folder, data)
    assert len(dataset.faults) == 1
    assert word in dataset.faults[0] and f"image {change.get('image_id', 11)}" in dataset.faults[0]
    assert dataset.faults[0] in dataset.fault_summary()
    assert len(dataset.records[0].boxes_xyxy) == boxes_left
    assert len(dataset.ground_truth()["annotations"]) == boxes_left + 2
    with pytest.raises(UserError, match=r"train\.json.*image 1"):
        opened(folder, data, strict=True)


@pytest.mark.parametrize("area", [10**400, math.nan, math.inf, -1, 0, "big", None, True])
def test_an_unusable_area_is_that_of_the_box(write_folder, area):
    data = coco_dict()
    data["annotations"][0]["area"] = area
    assert opened(write_folder(), data).records[0].areas.tolist() == [80, 240]


def test_boxes_are_clipped_and_a_pixel_is_forgiven(write_folder):
    data = coco_dict()
    data["annotations"][0]["bbox"] = [-0.75, 3, 10, 8]
    data["annotations"][1]["bbox"] = [30, 20, 12, 14]
    dataset = opened(write_folder(), data)
    assert dataset.records[0].boxes_xyxy.tolist() == [[0, 3, 9.25, 11], [30, 20, 40, 30]]
    assert len(dataset.faults) == 1 and "annotation 2" in dataset.faults[0]
    # The evaluator sees the forgiven box as the file states it.
    stated = [a["bbox"] for a in dataset.ground_truth()["annotations"][:2]]
    assert stated == [[-0.75, 3, 10, 8], [30, 20, 10, 10]]


def _without(key):
    def change(data):
        del data[key]

    return change


def _set(kind, place, key, value):
    def change(data):
        data[kind][place][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("images"), "no list 'images'"),
        (_without("annotations"), "no list 'annotations'"),
        (lambda data: data.update(categories={}), "no list 'categories'"),
        (lambda data: data.update(images=[]), "'images' is empty"),
        (lambda data: data.update(categories=[]), "'categories' is empty"),
        (lambda data: data["annotations"].append(3), "annotation 3; expected an object"),
        (lambda data: data["images"].append("x"), "image number 3 has the id None"),
        (_set("images", 1, "id", "5"), "image number 1 has the id '5'"),
        (_set("images", 1, "id", 11), "image id 11 occurs twice"),
        (_set("categories", 1, "id", 90), "category id 90 occurs twice"),
        (_set("annotations", 1, "id", 1), "annotation id 1 occurs twice"),
        (_set("categories", 1, "name", "dog"), "two categories are called 'dog'"),
        (_set("categories", 1, "name", None), "category 7 has the name None"),
        (
            _set("categories", 1, "name", "a\nb"),
            r"category 7 has the name 'a\\nb'; expected a line",
        ),
        (_set("images", 0, "file_name", None), "image 11 has the file_name None"),
        (_set("images", 0, "file_name", "../x.png"), "image 11 .* leaves"),
        (_set("images", 0, "file_name", "sub/../../x.png"), "image 11 .* leaves"),
        (_set("images", 0, "file_name", "/etc/passwd"), "image 11 .* leaves"),
        (_set("images", 0, "file_name", "no.png"), "no.png: image file not found"),
        (_set("images", 0, "file_name", "a\0.png"), "image file not found"),
        (_set("images", 0, "file_name", "."), "a folder; an image file was expected"),
        (lambda data: data.update(annotations=[]), "no training image has a usable box"),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(write_folder, change, words):
    data = coco_dict()
    change(data)
    with pytest.raises(UserError, match=words) as caught:
        opened(write_folder(), data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "nothing", '{"images": [{"id": 1', "[" * 100_000])
def test_what_is_no_coco_file(write_folder, text):
    folder = write_folder()
    (folder / "annotations" / "train.json").write_text(text)
    with pytest.raises(UserError, match=r"train.json: not (JSON|a COCO)"):
        open_dataset(Recipe(data=str(folder)), "train")


def test_binary_annotation_file(write_folder):
    folder = write_folder()
    (folder / "annotations" / "train.json").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(UserError, match="not JSON"):
        open_dataset(Recipe(data=str(folder)), "train")


def test_only_crowds_are_nothing_to_learn_from(write_folder):
    data = coco_dict()
    data["annotations"] = data["annotations"][2:3]
    with pytest.raises(UserError, match="no training image"):
        opened(write_folder(), data)
    recipe = rewrite(write_folder(), data, "val")
    assert len(open_dataset(recipe, "val")) == 3


def test_sizes_missing_or_wrong(write_folder):
    data = coco_dict()
    folder = write_folder()
    changed = copy.deepcopy(data)
    del changed["images"][0]["width"]
    assert opened(folder, changed).faults == []
    changed["images"][0].update(width=80, height=60)
    changed["annotations"][0]["bbox"] = [50, 3, 10, 8]
    dataset = opened(folder, changed)
    assert (dataset.records[0].height, dataset.records[0].width) == (30, 40)
    assert len(dataset.faults) == 2
    assert "80x60" in dataset.faults[0] and "40x30" in dataset.faults[0]


def test_layouts(write_folder, tmp_path):
    folder = write_folder()
    official = tmp_path / "official"
    (official / "annotations").mkdir(parents=True)
    source = folder / "annotations" / "train.json"
    shutil.copytree(folder / "images", official / "train2017")
    shutil.copy(source, official / "annotations" / "instances_train2017.json")
    explicit = Recipe(train_images=str(folder / "images"), train_annotations=str(source))
    boxes = [
        torch.cat([record.boxes_xyxy for record in open_dataset(recipe, "train").records])
        for recipe in (Recipe(data=str(folder)), Recipe(data=str(official)), explicit)
    ]
    assert boxes[0].shape == (4, 4)
    assert torch.equal(boxes[0], boxes[1]) and torch.equal(boxes[0], boxes[2])


def test_missing_places_are_told(write_folder, tmp_path):
    folder = write_folder()
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (Recipe(), "train", "--data"),
        (Recipe(data=str(tmp_path / "none")), "train", "none: data folder not found"),
        (Recipe(data=str(empty)), "train", "empty: the data folder is empty"),
        (Recipe(data=str(folder / "images" / "a.png")), "train", "must be a folder"),
        (Recipe(data=str(folder)), "val", "no val split.*data split"),
        (Recipe(data=str(folder)), "test", "no test split.*--split val"),
        (Recipe(train_images=str(folder)), "train", "train_annotations is not"),
        (
            Recipe(train_images=str(folder), train_annotations=str(folder / "x.json")),
            "train",
            "x.json: train_annotations is no file",
        ),
    ]
    for recipe, split, words in cases:
        with pytest.raises(UserError, match=words):
            open_dataset(recipe, split)
    shutil.rmtree(folder / "images")
    with pytest.raises(UserError, match=r"images: image folder of train\.json not found"):
        open_dataset(Recipe(data=str(folder)), "train")


def test_an_image_that_changes_during_the_run(write_folder):
    folder = write_folder()
    dataset = open_dataset(Recipe(data=str(folder)), "train")
    data = coco_dict()
    data["images"][0].update(width=20)
    write_folder(data)
    with pytest.raises(UserError, match=r"a\.png: the image is 20x30 now"):
        dataset.read(0)

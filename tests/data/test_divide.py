"""Dividing a split, on made-up records; no image is read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detdistill.data import DetectionDataset, ImageRecord
from detdistill.data.divide import divide, join
from detdistill.errors import UserError

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def dataset(labels_of_images, names=None):
    """Images with boxes of the given labels; box i of image n is stated as (n, i, 1, 1)."""
    records = [
        ImageRecord(
            image_id=10 + n,
            path=Path(names[n] if names else f"{n:04}.jpg"),
            height=64,
            width=64,
            boxes_xyxy=torch.zeros(len(labels), 4),
            labels=torch.tensor(labels, dtype=torch.int64),
            crowd=torch.zeros(len(labels), dtype=torch.bool),
            areas=torch.ones(len(labels), dtype=torch.float64),
        )
        for n, labels in enumerate(labels_of_images)
    ]
    stated = [[n, i, 1, 1] for n, labels in enumerate(labels_of_images) for i in range(len(labels))]
    boxes = torch.tensor(stated, dtype=torch.float64).reshape(-1, 4)
    return DetectionDataset(
        records, ["a", "b", "c"], [1, 2, 3], "train", Path("one.json"), ["image 10: odd"], boxes
    )


def images(part):
    return [record.image_id for record in part.records]


def test_every_image_is_in_one_part_and_boxes_stay_with_it():
    whole = dataset([[0] * (n % 4) for n in range(100)])
    parts = divide(whole, SHARES)
    assert [part.split for part in parts] == ["train", "val", "test"]
    assert [len(part) for part in parts] == [70, 15, 15]
    assert sorted(i for part in parts for i in images(part)) == images(whole)
    for part in parts:
        assert images(part) == sorted(images(part))
        data = part.ground_truth()
        assert [a["bbox"][0] + 10 for a in data["annotations"]] == [
            a["image_id"] for a in data["annotations"]
        ]
    assert [part.faults for part in parts] == [["image 10: odd"], [], []]


def test_the_seed_decides():
    whole = dataset([[0]] * 60)
    first, again, other = (divide(whole, SHARES, seed=seed) for seed in (0, 0, 1))
    assert [images(part) for part in first] == [images(part) for part in again]
    assert [images(part) for part in first] != [images(part) for part in other]


@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_is_in_every_part(seed):
    """20 of 400 images show class b, 8 class c; a random division often leaves a part without c."""
    labels = [[0]] * 372 + [[0, 1]] * 20 + [[0, 2]] * 8
    _, val, test = divide(dataset(labels), SHARES, seed=seed)
    for held_out in (val, test):
        shown = [set(record.labels.tolist()) for record in held_out.records]
        assert len(held_out) == 60
        assert sum(1 in one for one in shown) == 3
        assert sum(2 in one for one in shown) in (1, 2)


def test_groups_stay_together():
    names = [f"film{n // 5}/frame{n % 5}.jpg" for n in range(50)]
    parts = divide(dataset([[n % 3] for n in range(50)], names), SHARES, group=r"film(\d+)/")
    films = [{record.path.parent for record in part.records} for part in parts]
    assert not films[0] & films[1] and not films[0] & films[2] and not films[1] & films[2]
    assert [len(one) for one in films] == [7, 2, 1] or [len(one) for one in films] == [7, 1, 2]


def test_each_alternative_of_an_expression_names_its_groups():
    names = [f"clip{n // 2}_{n}.jpg" for n in range(20)]
    shares = {"train": 0.5, "val": 0.5}
    parts = divide(dataset([[0]] * 20, names), shares, group=r"scene(\d+)_|clip(\d+)_")
    assert [len(part) for part in parts] == [10, 10]


def test_what_the_expression_does_not_find_stands_alone():
    names = ["a_1.jpg", "a_2.jpg", *(f"{n}.jpg" for n in range(18))]
    parts = divide(dataset([[0]] * 20, names), SHARES, group="^a_")
    assert sorted(len(part) for part in parts) == [3, 3, 14]
    assert any({10, 11} <= set(images(part)) for part in parts)


def test_joined_splits_keep_their_boxes_and_faults():
    train, val = dataset([[0], [1, 2]], ["a", "b"]), dataset([[], [2]], ["c", "d"])
    whole = join(train, val)
    assert whole.split == "train" and whole.faults == ["image 10: odd"] * 2
    assert [record.path.name for record in whole.records] == ["a", "b", "c", "d"]
    assert images(whole) == [1, 2, 3, 4]  # both begin with 10
    stated = [entry["bbox"][:2] for entry in whole.ground_truth()["annotations"]]
    assert stated == [[0, 0], [1, 0], [1, 1], [1, 0]]
    *_, last = dataset([[0]] * 4, ["a", "b", "c", "d"]).records
    assert images(join(train, replace(val, records=[last]))) == [10, 11, 13]


def test_an_image_in_both_splits_is_refused():
    train = dataset([[0], [1]], ["a", "b"])
    val = replace(dataset([[0]], ["b"]), split="val", source=Path("two.json"))
    with pytest.raises(UserError, match=r"b: is an image of both train \(one.json\) and val"):
        join(train, val)


@pytest.mark.parametrize(
    ("labels", "group", "expected"),
    [
        ([[0]] * 3, None, "3 images do not suffice for a share of 0.15 for"),
        ([[0]] * 9, r"(0)", "1 groups of images do not suffice"),
        ([[0]] * 9, "(", "is no regular expression"),
        ([[0]] * 9, r"\d+\.jpg", "puts no two images of one.json together"),
    ],
)
def test_refused(labels, group, expected):
    with pytest.raises(UserError, match=expected):
        divide(dataset(labels), SHARES, group=group)

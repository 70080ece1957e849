from pathlib import Path

import pytest
import torch
from PIL import Image

from detdistill.data import DetectionDataset, open_dataset
from detdistill.data.splits import find_split
from detdistill.data.yolo import label_path
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from tests.data.other_formats import opened, picture, text

CONFIG = ["path: .", "train: images/train", "val: images/val", "nc: 3", "names: [cat, dog, cow]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three training images, the last one without labels, and an image to validate."""
    for name in ("a", "b", "c"):
        picture(tmp_path / f"images/train/{name}.png")
    picture(tmp_path / "images/val/v.png")
    text(tmp_path / "labels/train/a.txt", ["0 0.5 0.5 0.5 0.2", "2 0.25 0.5 0.1 1"])
    text(tmp_path / "labels/train/b.txt", ["1 0.1 0.1 0.1 0.1"])
    text(tmp_path / "labels/val/v.txt", [])
    text(tmp_path / "data.yaml", CONFIG)
    return tmp_path


def with_line(folder: Path, line: str) -> DetectionDataset:
    """The training split after one more line of labels."""
    text(folder / "labels/train/b.txt", ["1 0.1 0.1 0.1 0.1", line])
    return opened(folder)


def test_reads_images_boxes_and_names(folder):
    dataset = opened(folder)
    assert dataset.classes == ["cat", "dog", "cow"] and dataset.category_ids == [1, 2, 3]
    assert [record.path.name for record in dataset.records] == ["a.png", "b.png", "c.png"]
    assert [record.image_id for record in dataset.records] == [1, 2, 3]
    first, second, third = dataset.records
    torch.testing.assert_close(first.boxes_xyxy, torch.tensor([[10.0, 12, 30, 18], [8, 0, 12, 30]]))
    assert first.labels.tolist() == [0, 2] and second.labels.tolist() == [1]
    assert (first.height, first.width) == (30, 40) and not first.crowd.any()
    assert first.areas.tolist() == pytest.approx([120, 120])
    assert len(third.labels) == 0
    assert dataset.faults == [] and dataset.source == folder / "data.yaml"
    assert dataset.read(0).shape == (3, 30, 40)
    assert len(opened(folder, "val").records[0].labels) == 0  # an empty label file


def test_ids_that_count_from_one_are_refused(folder):
    text(folder / "labels/train/a.txt", ["1 0.5 0.5 0.5 0.2", "3 0.25 0.5 0.1 1"])
    text(folder / "labels/train/b.txt", ["2 0.1 0.1 0.1 0.1"])
    with pytest.raises(
        UserError, match=r"data\.yaml: the class ids in the train labels run from 1"
    ):
        opened(folder)


def test_an_outline_becomes_its_box(folder):
    dataset = with_line(folder, "2 0.5 0.1 0.9 0.4 0.25 0.3")
    assert dataset.faults == []
    torch.testing.assert_close(
        dataset.records[1].boxes_xyxy[1], torch.tensor([10.0, 3.0, 36.0, 12.0])
    )


def test_key_points_are_passed_over(folder):
    text(folder / "data.yaml", [*CONFIG, "kpt_shape: [2, 3]"])
    dataset = with_line(folder, "0 0.5 0.5 0.5 0.2 0.9 0.9 2 0.1 0.1 2")
    torch.testing.assert_close(
        dataset.records[1].boxes_xyxy[1], torch.tensor([10.0, 12.0, 30.0, 18.0])
    )


@pytest.mark.parametrize(
    ("line", "words", "boxes"),
    [
        ("3 0.5 0.5 0.1 0.1", "has the class 3; expected 0 to 2, as names has 3", 1),
        ("-1 0.5 0.5 0.1 0.1", "has the class -1", 1),
        ("1.5 0.5 0.5 0.1 0.1", "has the class 1.5", 1),
        ("cat 0.5 0.5 0.1 0.1", "has 'cat', which is no finite number", 1),
        ("0 0.5 x 0.1 0.1", "has 'x', which is no finite number", 1),
        ("0 nan 0.5 0.1 0.1", "has 'nan', which is no finite number", 1),
        ("0 0.5 0.5 inf 0.1", "has 'inf', which is no finite number", 1),
        ("0 0.5 0.5 0.1", "has 4 fields", 1),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 6 fields", 1),
        ("0 0.5 0.5 0 0.1", "without a positive width and height", 1),
        ("0 0.5 0.5 0.1 -0.1", "without a positive width and height", 1),
        ("0 0.5 0.5 0.1 0.5 0.9 0.5", "without a positive width and height", 1),
        ("0 20 15 10 10", "has the coordinate 20; expected shares of the image", 1),
        ("0 1.5 0.5 0.1 0.1", "has no area inside", 1),
        ("0 0.95 0.5 0.2 0.1", "pokes out of its 40x30 image (clipped)", 2),
        ("1 0.1 0.1 0.1 0.1", "says the same as line 1", 1),
    ],
)
def test_faulty_lines_are_named_and_strict_stops(folder, line, words, boxes):
    dataset = with_line(folder, line)
    [fault] = dataset.faults
    assert fault.startswith(f"{folder / 'labels/train/b.txt'} line 2: ") and words in fault
    assert len(dataset.records[1].labels) == boxes
    assert (dataset.records[1].boxes_xyxy[:, 2] <= 40).all()
    with pytest.raises(UserError, match=r"b\.txt line 2"):
        opened(folder, strict=True)


def test_what_rounding_pokes_out_is_forgiven(folder):
    dataset = with_line(folder, "0 0.99 0.5 0.04 0.1")
    assert dataset.faults == []
    assert dataset.records[1].boxes_xyxy[1, 2] == 40
    assert dataset.ground_truth()["annotations"][-1]["bbox"][2] == pytest.approx(1.6)


def test_a_label_file_without_its_image(folder):
    text(folder / "labels/train/z.txt", ["0 0.5 0.5 0.1 0.1"])
    text(folder / "labels/train/classes.txt", ["cat"])
    [fault] = opened(folder).faults
    assert "labels/train/z.txt: there is no image of this name" in fault
    # A list may leave images out.
    text(folder / "train.txt", ["./images/train/a.png"])
    text(folder / "data.yaml", ["train: train.txt", *CONFIG[2:]])
    dataset = opened(folder)
    assert dataset.faults == [] and len(dataset) == 1


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("set/images/train/a.b.JPG", "set/labels/train/a.b.txt"),
        ("/images/set/images/a.jpg", "/images/set/labels/a.txt"),
        ("train/a.jpg", "train/a.txt"),
        ("my_images/images.jpg", "my_images/images.txt"),
    ],
)
def test_where_labels_are(image, label):
    assert label_path(Path(image)) == Path(label)


@pytest.mark.parametrize(
    "lines",
    [
        ["path: /somewhere/else", "train: images/train"],
        ["path: ../gone", "train: ../images/train"],
        ["train: ../images/train"],
        ["path: images", "train: train"],
        ["train: [images/train, images/train]"],
        ["train: list.txt"],
    ],
)
def test_paths_that_downloads_have(folder, lines):
    names = [f"images/train/{name}.png" for name in ("a", "b", "c", "a")]
    text(folder / "list.txt", ["\ufeff" + names[0], "", *names[1:]])
    text(folder / "data.yaml", [*lines, "names: {0: cat, 2: cow, 1: dog}"])
    dataset = opened(folder)
    assert [record.path.name for record in dataset.records] == ["a.png", "b.png", "c.png"]
    assert sum(len(record.labels) for record in dataset.records) == 3


def test_the_file_itself_may_be_given(folder):
    (folder / "data.yaml").rename(folder / "birds.yaml")
    assert len(opened(folder / "birds.yaml")) == 3
    with pytest.raises(UserError, match=r"gone\.yaml: no such file"):
        opened(folder / "gone.yaml")


def test_folders_in_folders_and_circles(folder):
    picture(folder / "images/train/more/d.png")
    picture(folder / "images/train/.hidden/e.png")
    picture(folder / "images/train/._f.png")
    (folder / "images/train/circle").symlink_to(folder / "images/train")
    text(folder / "labels/train/more/d.txt", ["0 0.5 0.5 0.5 0.5"])
    names = [record.path.name for record in opened(folder).records]
    assert names == ["a.png", "b.png", "c.png", "d.png"]


def test_boxes_belong_to_the_upright_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "images/train/a.png", exif=exif)
    dataset = opened(folder)
    record = dataset.records[0]
    assert (record.height, record.width) == (40, 30)
    assert dataset.read(0).shape == (3, 40, 30)
    torch.testing.assert_close(record.boxes_xyxy[0], torch.tensor([7.5, 16.0, 22.5, 24.0]))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["names: ["], "data.yaml: not YAML"),
        ([], "data.yaml: expected lines .* found nothing"),
        (["- a"], "data.yaml: expected lines .* found a list"),
        (["train: images/train"], "data.yaml: names is None"),
        (["names: 3"], "data.yaml: names is 3"),
        (["names: []"], r"data.yaml: names is \[\]"),
        (["names: [cat, yes]"], "class 1 has the name True"),
        (["names: [cat, '']"], "class 1 has the name ''"),
        (["names: [cat, cat]"], "two classes are called 'cat'"),
        (["names: {1: cat}"], r"names has the keys \[1\]"),
        (["names: [cat, dog]", "nc: 3"], "nc is 3, but names has 2 classes"),
        (["names: [cat]", "train: 3"], "train has the value 3"),
        (["names: [cat]", "train: images/train", "path: [a]"], r"path has the value \['a'\]"),
        (
            ["names: [cat]", "train: ../pictures", "path: /gone"],
            "train is '../pictures', looked for /gone/../pictures, /gone/pictures, .*/pictures; ",
        ),
        (["names: [cat]", "train: images/none"], "train split is empty: no image in .*none"),
        (["names: [cat]", "train: none.txt"], "train split is empty: no image in .*none.txt"),
        (["names: [cat]", "train: images/bare"], "none of the 1 train images .*labels/bare/x.txt"),
        (["names: [cat]", "train: gone.txt"], "gone.png: image file not found"),
        (["names: [cat]", "train: images/train/a.png"], "a.png: not a text file"),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(folder, lines, words):
    (folder / "images/none").mkdir()
    picture(folder / "images/bare/x.png")
    text(folder / "none.txt", [""])
    text(folder / "gone.txt", ["images/train/gone.png"])
    text(folder / "data.yaml", lines)
    with pytest.raises(UserError, match=words) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_damaged_files(folder):
    (folder / "labels/train/b.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match=r"b\.txt: not a text file in UTF-8"):
        opened(folder)
    image = folder / "images/train/b.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"b\.png: the image is damaged or cut off"):
        opened(folder)


def test_missing_splits_are_told(folder):
    text(folder / "data.yaml", ["train: images/train", "names: [cat, dog, cow]"])
    with pytest.raises(UserError, match=r"no val split, it has no 'val'; .detdistill data split"):
        opened(folder, "val")
    with pytest.raises(UserError, match=r"no test split.*--split val.*`test: FOLDER`"):
        opened(folder, "test")
    with pytest.raises(UserError, match="no split is called 'tets'; choose one of train, val"):
        open_dataset(Recipe(data=str(folder)), "tets")


def test_only_backgrounds_are_nothing_to_learn_from(folder):
    for name in "ab":
        text(folder / f"labels/train/{name}.txt", [])
    with pytest.raises(UserError, match="no training image has a usable box"):
        opened(folder)


def test_label_files_are_read_once(folder, monkeypatch):
    from detdistill.data import yolo

    read = []
    original = yolo.read_text
    monkeypatch.setattr(yolo, "read_text", lambda path: read.append(path) or original(path))
    find_split(Recipe(data=str(folder)), "train")()
    labels = [path.name for path in read if path.parent.name == "train"]
    assert sorted(labels) == ["a.txt", "b.txt", "c.txt"]

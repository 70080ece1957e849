import shutil
from pathlib import Path

import pytest

from detdistill.data import require_same_classes
from detdistill.data.voc import VOC_CLASSES
from detdistill.errors import UserError
from tests.data.other_formats import SPLITS, opened, picture, text, voc_object, write_devkit, xml

BOMB = '<!DOCTYPE a [<!ENTITY b "lol"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'


@pytest.fixture
def year(tmp_path: Path) -> Path:
    """Three training images, the last one without XML, and an image to validate."""
    root = tmp_path / "devkit" / "mine"
    for name in ("a", "b", "c", "v", "unlisted"):
        picture(root / f"JPEGImages/{name}.png")
    objects = voc_object("dog", 1, 1, 10, 20) + voc_object("cat", 5, 6, 7.5, 8, difficult=1)
    text(root / "Annotations/a.xml", [xml(objects)])
    text(root / "Annotations/b.xml", [xml(voc_object("cow", 3, 3, 3, 3))])
    text(root / "Annotations/v.xml", [xml(voc_object("ant", 2, 2, 9, 9))])
    text(root / "Annotations/unlisted.xml", ["<annotation>"])
    text(root / "ImageSets/Main/train.txt", ["b", "a.png", "", "c"])
    text(root / "ImageSets/Main/val.txt", ["v"])
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Images and XML files side by side."""
    root = tmp_path / "plain"
    for place in ("train/a", "train/b", "valid/v"):
        picture(root / f"{place}.png")
    text(root / "train/a.xml", [xml(voc_object("dog", 1, 1, 10, 20))])
    text(root / "valid/v.xml", [xml(voc_object("cat", 2, 2, 9, 9))])
    return root


def test_reads_images_boxes_and_names(year):
    dataset = opened(year)
    assert dataset.classes == ["ant", "cat", "cow", "dog"]
    assert dataset.category_ids == [1, 2, 3, 4]
    assert [record.path.name for record in dataset.records] == ["b.png", "a.png", "c.png"]
    one, two, three = dataset.records
    assert one.boxes_xyxy.tolist() == [[2, 2, 3, 3]]  # a box of one pixel
    assert two.boxes_xyxy.tolist() == [[0, 0, 10, 20], [4, 5, 7.5, 8]]
    assert two.labels.tolist() == [3, 1] and two.areas.tolist() == [200, 10.5]
    assert two.crowd.tolist() == [False, True]
    assert len(three.labels) == 0
    assert dataset.faults == []
    assert dataset.source == year / "ImageSets/Main/train.txt"
    truth = dataset.ground_truth()["annotations"]
    assert [entry["iscrowd"] for entry in truth] == [0, 0, 1]


def test_an_image_listed_twice_is_read_once(year):
    text(year / "ImageSets/Main/train.txt", ["b", "a", "b.png", "a"])
    assert stems(opened(year)) == ["b", "a"]


def test_splits_number_their_classes_alike(year, folders):
    for root in (year, folders):
        train, val = opened(root), opened(root, "val")
        require_same_classes(train, val)
        assert [val.classes[i] for i in val.records[0].labels] == ["ant" if root == year else "cat"]


def test_class_files_decide(year):
    text(year / "labels.txt", ["dog", "cow"])
    dataset = opened(year)
    assert dataset.classes == ["dog", "cow"]
    [fault] = dataset.faults
    assert "a.xml, object 2: unknown class 'cat' (dropped)" in fault
    text(year / "classes.txt", ["cat", "dog", "cow"])
    assert opened(year).classes == ["cat", "dog", "cow"]
    text(year / "classes.txt", [])
    with pytest.raises(UserError, match=r"classes\.txt: is empty"):
        opened(year)


def test_a_year_of_voc_has_its_twenty_classes(year):
    root = year.rename(year.with_name("VOC2012"))
    assert opened(root).classes == ["ant", "cat", "cow", "dog"]
    text(root / "Annotations/v.xml", [xml(voc_object("tvmonitor", 2, 2, 9, 9))])
    dataset = opened(root)
    assert dataset.classes == list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert [dataset.classes[i] for i in dataset.records[1].labels] == ["dog", "cat"]


def test_the_devkit_finds_its_year(year):
    root = year.rename(year.with_name("VOC2012"))
    assert len(opened(root.parent)) == 3
    above = root.parent.rename(root.parent.with_name("VOCdevkit")).parent
    assert len(opened(above)) == 3


def stems(dataset):
    return [record.path.stem for record in dataset.records]


@pytest.mark.parametrize("above", [False, True])
def test_several_years_are_one_data_set(tmp_path, above):
    root = write_devkit(tmp_path / "VOCdevkit")
    train, val, test = (opened(tmp_path if above else root, split) for split in SPLITS)
    assert stems(train) == [
        *(f"train{i}" for i in range(5)),
        *(f"2008_train{i}" for i in range(6)),
    ]
    assert len(val) == 11 and stems(test) == ["test0", "test1", "test2", "test3"]
    assert train.records[5].path == root / "VOC2012/JPEGImages/2008_train0.jpg"
    assert train.records[5].boxes_xyxy.tolist() == [[0, 0, 20, 20], [10, 5, 40, 30]]
    assert [record.image_id for record in train.records] == list(range(1, 12))
    assert train.source == val.source == root
    assert test.source == root / "VOC2007/ImageSets/Main/test.txt"
    for dataset in (train, val, test):
        assert dataset.classes == list(VOC_CLASSES) and dataset.faults == []


def test_one_year_of_several_reads_as_before(tmp_path):
    root = write_devkit(tmp_path / "VOCdevkit")
    assert len(opened(root / "VOC2012")) == 6
    with pytest.raises(UserError, match=r"VOC2012: no test split, looked for .*Main/test\.txt;"):
        opened(root / "VOC2012", "test")


def test_what_several_years_lack_is_told(tmp_path):
    root = write_devkit(tmp_path / "VOCdevkit")
    (root / "VOC2007/ImageSets/Main/test.txt").unlink()
    looked_for = (
        r"VOCdevkit: no test split, looked for .*VOC2007.*test\.txt or .*VOC2012.*test\.txt;"
    )
    with pytest.raises(UserError, match=looked_for):
        opened(root, "test")
    (root / "VOC2007/JPEGImages/val0.jpg").unlink()
    with pytest.raises(UserError, match=r"VOC2007/\S+val\.txt: names 'val0', but .*holds no image"):
        opened(root, "val")


def test_two_years_with_an_image_of_one_name_are_refused(tmp_path):
    root = write_devkit(tmp_path / "VOCdevkit")
    shutil.copytree(root / "VOC2007", root / "VOC2007_copy")
    with pytest.raises(UserError, match=r"VOC2007_copy.*: names 'test0', as .*another year"):
        opened(root, "test")


@pytest.mark.parametrize("annotated", [0, 2])
def test_a_test_list_without_its_annotations_is_refused_beside_another_year(tmp_path, annotated):
    """As of VOC's later tests; by itself such a year is read, with a part annotated."""
    root = write_devkit(tmp_path / "VOCdevkit")
    names = [f"2008_test{i}" for i in range(5)]
    text(root / "VOC2012/ImageSets/Main/test.txt", names)
    for i, name in enumerate(names):
        picture(root / f"VOC2012/JPEGImages/{name}.jpg")
        if i < annotated:
            text(root / f"VOC2012/Annotations/{name}.xml", [xml(voc_object("dog", 1, 1, 9, 9))])
    found = "only 2 of the 5 images have" if annotated else "none of the 5 images has"
    with pytest.raises(UserError, match=rf"{found} an XML.*2008_test\d\.xml.*remove test\.txt"):
        opened(root, "test")
    if annotated:
        assert len(opened(root / "VOC2012", "test")) == 5


def test_class_files_of_several_years_are_alike(tmp_path):
    root = write_devkit(tmp_path / "VOCdevkit")
    text(root / "VOC2012/classes.txt", ["dog", "cat"])
    assert opened(root).classes == ["dog", "cat"]
    text(root / "VOC2007/labels.txt", ["cat", "dog"])
    with pytest.raises(UserError, match=r"VOC2012/classes\.txt: lists other classes than .*2007"):
        opened(root)


def test_trainval_alone_is_learnt_from(year):
    lists = year / "ImageSets/Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    with pytest.raises(UserError, match=r"no train split.*divide trainval\.txt into train\.txt"):
        opened(year)
    (lists / "val.txt").unlink()
    dataset = opened(year)
    assert stems(dataset) == ["b", "a", "c"] and dataset.source == lists / "trainval.txt"
    with pytest.raises(UserError, match=r"no val split.*data split. cuts it from the training"):
        opened(year, "val")


def test_images_and_xml_side_by_side(folders):
    dataset = opened(folders)
    assert dataset.classes == ["cat", "dog"]
    assert [len(record.labels) for record in dataset.records] == [1, 0]
    assert dataset.records[0].boxes_xyxy.tolist() == [[0, 0, 10, 20]]
    text(folders / "train/z.xml", [xml()])
    [fault] = opened(folders).faults
    assert "train/z.xml: there is no image of this name" in fault
    with pytest.raises(UserError, match=r"z\.xml"):
        opened(folders, strict=True)


@pytest.mark.parametrize(
    ("found", "words", "boxes"),
    [
        (voc_object("dog", 1, 1, "nan", 9), "bndbox [1, 1, nan, 9] is not four finite", 0),
        (voc_object("dog", 1, "x", 9, 9), "bndbox [1, x, 9, 9] is not four finite", 0),
        (voc_object("dog", 9, 1, 1, 9), "bndbox [9, 1, 1, 9] is not four finite", 0),
        ("<object><name>dog</name></object>", "bndbox [none, none, none, none] is not", 0),
        (voc_object("", 1, 1, 9, 9), "unknown class ''", 0),
        (voc_object("dog", 50, 1, 60, 9), "has no area inside its 40x30", 0),
        (voc_object("dog", 30, 1, 60, 9), "pokes out of its 40x30 image (clipped)", 1),
    ],
)
def test_faulty_objects_are_named_and_strict_stops(year, found, words, boxes):
    text(year / "Annotations/b.xml", [xml(found)])
    dataset = opened(year)
    [fault] = dataset.faults
    assert fault.startswith(f"{year / 'Annotations/b.xml'}, object 1: ") and words in fault
    assert len(dataset.records[0].labels) == boxes
    with pytest.raises(UserError, match=r"b\.xml, object 1"):
        opened(year, strict=True)


def test_corners_that_count_from_0_are_forgiven(year):
    text(year / "Annotations/b.xml", [xml(voc_object("dog", 0, 0, 40, 30))])
    dataset = opened(year)
    assert dataset.faults == []
    assert dataset.records[0].boxes_xyxy.tolist() == [[0, 0, 40, 30]]


@pytest.mark.parametrize("size", [None, (0, 0), ("x", 30)])
def test_without_a_size_the_image_has_its_own(year, size):
    text(year / "Annotations/b.xml", [xml(voc_object("dog", 1, 1, 9, 9), size)])
    dataset = opened(year)
    assert dataset.faults == []
    assert (dataset.records[0].height, dataset.records[0].width) == (30, 40)


def test_a_wrong_size_is_a_fault(year):
    text(year / "Annotations/b.xml", [xml(voc_object("dog", 1, 1, 9, 9), (80, 60))])
    [fault] = opened(year).faults
    assert "b.xml: the file says 80x60, b.png is 40x30" in fault


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (xml()[:-5], "b.xml: not XML, or cut off"),
        ("", "b.xml: not XML, or cut off"),
        ("<a/>", "b.xml: not a Pascal VOC annotation: found <a>"),
        (BOMB, "b.xml: has a DOCTYPE"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "b.xml: not XML, or cut off"),
    ],
)
def test_unusable_xml_is_refused_in_one_sentence(year, content, words):
    (year / "Annotations/b.xml").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        opened(year)
    assert "\n" not in str(caught.value)


def test_a_document_type_in_utf_16_is_found(year):
    (year / "Annotations/b.xml").write_bytes(BOMB.encode("utf-16"))
    with pytest.raises(UserError, match=r"b\.xml: has a DOCTYPE"):
        opened(year)


def test_what_is_missing_is_told(year, folders):
    lists = year / "ImageSets/Main"
    cases = [
        (year, "test", r"no test split, looked for .*Main/test\.txt; .*--split val"),
        (folders, "test", r"no test split, looked for test/; .*--split val"),
    ]
    for root, split, words in cases:
        with pytest.raises(UserError, match=words):
            opened(root, split)
    text(lists / "test.txt", ["v", "gone"])
    with pytest.raises(UserError, match=r"test\.txt: names 'gone', but .*JPEGImages holds no"):
        opened(year, "test")
    text(lists / "test.txt", ["c"])
    with pytest.raises(UserError, match=r"test\.txt: none of the 1 images has an XML.*c\.xml"):
        opened(year, "test")
    text(lists / "test.txt", [])
    with pytest.raises(UserError, match=r"test\.txt: the test split is empty"):
        opened(year, "test")
    (lists / "val.txt").rename(lists / "trainval.txt")
    with pytest.raises(UserError, match=r"no val split.*divide trainval\.txt into train\.txt"):
        opened(year, "val")
    (folders / "valid/v.xml").unlink()
    (folders / "valid/v.png").unlink()
    with pytest.raises(UserError, match="valid: the val split is empty"):
        opened(folders, "val")


def test_no_object_at_all(folders):
    text(folders / "train/a.xml", [xml()])
    text(folders / "valid/v.xml", [xml()])
    with pytest.raises(UserError, match=r"no XML file names an object.*classes\.txt"):
        opened(folders)


def test_damaged_images(year):
    image = year / "JPEGImages/b.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError, match=r"b\.png: the image is damaged or cut off"):
        opened(year)

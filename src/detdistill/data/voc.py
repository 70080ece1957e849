"""Reading and checking Pascal VOC data: an XML file an image.

Two layouts: a year of VOC (`Annotations`, `JPEGImages`, `ImageSets/Main`), and what labelling tools
export, a folder per split that holds images and XML files side by side.

VOC counts pixels from 1 and means the last one to be inside, so a box from pixel 1 to pixel 10 is
0..10 here (as detectron2 reads it; torchvision and MMDetection differ by up to a pixel). Objects
marked `difficult` are treated as COCO's crowds: not learnt, and ignored in the evaluation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from detdistill.data.collector import BoxCollector, ImageFile
from detdistill.data.dataset import WITHOUT, DetectionDataset, MissingSplitError, SplitReader
from detdistill.data.files import in_threads, is_image, read_lines
from detdistill.data.voc_xml import VocAnnotation, VocObject, read_annotation
from detdistill.errors import UserError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
"""In VOC's order, which is the alphabet's."""

CLASS_FILES = ("classes.txt", "labels.txt")

_YEAR = re.compile(r"VOC20\d\d")
_FOLDERS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


def find_voc(root: Path, split: str) -> SplitReader | None:
    """What reads a split of Pascal VOC data; None when the folder holds none.

    Args:
        root: `VOCdevkit`, a year in it, or a folder with a folder for each split.
        split: train, val or test.
    """
    data = _find_year(root) or _find_folders(root)
    if data is None:
        return None
    if not data.source(split).exists():
        raise MissingSplitError(f"{data.root}: no {split} split, {data.advice(split)}")
    return partial(_read_voc, data, split)


class _Year:
    """`Annotations`, `JPEGImages` and `ImageSets/Main`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def source(self, split: str) -> Path:
        """The list of a split."""
        return self.root / "ImageSets" / "Main" / f"{split}.txt"

    def advice(self, split: str) -> str:
        """What was looked for, and what to do."""
        advice = {
            "train": "list its images there",
            "val": f"{WITHOUT['val']}; or list them there",
            "test": f"{WITHOUT['test']}; or list its images there",
        }[split]
        if split != "test" and self.source("trainval").is_file():
            advice = "divide trainval.txt into train.txt and val.txt"
        return f"looked for {self.source(split)}; {advice}"

    def annotations(self, split: str) -> list[Path]:
        """The XML files of a split, which need not exist."""
        return [self.root / "Annotations" / f"{stem}.xml" for stem in self._stems(split)]

    def images(self, split: str) -> list[Path]:
        """The images, in the order of `annotations`."""
        folder = self.root / "JPEGImages"
        names = _image_names(folder) if folder.is_dir() else []
        by_stem = {_stem(name): name for name in names}
        stems = self._stems(split)
        for stem in stems:
            if stem not in by_stem:
                raise UserError(
                    f"{self.source(split)}: names {stem!r}, but {folder} holds no image of this "
                    "name; remove the line, or copy the image there"
                )
        return [folder / by_stem[stem] for stem in stems]

    def faults(self, split: str) -> list[str]:
        """None: the list decides what belongs to a split."""
        return []

    def _stems(self, split: str) -> list[str]:
        lines = read_lines(self.source(split))
        return [_stem(line) if is_image(line) else line for line in lines]


class _Folders:
    """A folder per split, with XML files beside the images."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def source(self, split: str) -> Path:
        """The folder of a split."""
        folders = [self.root / name for name in _FOLDERS[split]]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def advice(self, split: str) -> str:
        """What was looked for, and what to do."""
        advice = {
            "train": "put the training images there, with their XML files",
            "val": f"{WITHOUT['val']}; or move some there, with their XML files",
            "test": f"{WITHOUT['test']}; or put images and XML files there",
        }[split]
        return f"looked for {' or '.join(f'{name}/' for name in _FOLDERS[split])}; {advice}"

    def annotations(self, split: str) -> list[Path]:
        """The XML files of a split, which need not exist."""
        return [image.with_suffix(".xml") for image in self.images(split)]

    def images(self, split: str) -> list[Path]:
        """The images, in the order of `annotations`."""
        folder = self.source(split)
        return [folder / name for name in _image_names(folder)]

    def faults(self, split: str) -> list[str]:
        """One for each XML file that belongs to no image."""
        expected = set(self.annotations(split))
        return [
            f"{path}: there is no image of this name (left out)"
            for path in sorted(self.source(split).glob("*.xml"))
            if path not in expected
        ]


def _find_year(root: Path) -> _Year | None:
    for pattern in ("Annotations", "VOC*/Annotations", "VOCdevkit/VOC*/Annotations"):
        found = [path.parent for path in sorted(root.glob(pattern)) if any(path.glob("*.xml"))]
        if len(found) > 1:
            names = ", ".join(str(path) for path in found)
            raise UserError(f"{root}: holds several years of VOC data; give one of {names}")
        if found:
            return _Year(found[0])
    return None


def _find_folders(root: Path) -> _Folders | None:
    folders = [root / name for names in _FOLDERS.values() for name in names]
    return _Folders(root) if any(any(folder.glob("*.xml")) for folder in folders) else None


def _image_names(folder: Path) -> list[str]:
    return sorted(filter(is_image, os.listdir(folder)))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _read_voc(data: _Year | _Folders, split: str) -> DetectionDataset:
    source = data.source(split)
    images, files = data.images(split), data.annotations(split)
    if not images:
        raise UserError(f"{source}: the {split} split is empty: no image; at least one is needed")
    annotations = in_threads(read_annotation, files)
    if not any(annotations):
        raise UserError(
            f"{source}: none of the {len(images)} images has an XML file, looked for {files[0]} "
            "and so on; images without objects may lack one, but not all"
        )
    labels = {name: label for label, name in enumerate(_classes(data, split, annotations))}
    stated = [None if annotation is None else annotation.size for annotation in annotations]
    named = zip(images, files, stated, strict=True)
    boxes = BoxCollector({i: ImageFile(a, str(b), size) for i, (a, b, size) in enumerate(named, 1)})
    for number, (file, annotation) in enumerate(zip(files, annotations, strict=True), 1):
        for place, found in enumerate(annotation.objects if annotation else [], 1):
            _add(boxes, number, f"{file}, object {place}", found, labels)
    boxes.faults += data.faults(split)
    return boxes.dataset(list(labels), range(1, len(labels) + 1), split, source)


def _add(
    boxes: BoxCollector, number: int, where: str, found: VocObject, labels: dict[str, int]
) -> None:
    """Files one object under its image, or notes why not."""
    label = labels.get(found.name)
    if label is None:
        boxes.faults.append(f"{where}: unknown class {found.name!r} (dropped)")
        return
    if found.corners is None:
        boxes.faults.append(
            f"{where}: bndbox {found.shown} is not four finite numbers xmin <= xmax, "
            "ymin <= ymax (dropped)"
        )
        return
    left, top, right, bottom = found.corners
    xywh = (left - 1, top - 1, right - left + 1, bottom - top + 1)
    boxes.add(number, where, xywh, label, crowd=found.difficult)


def _classes(data: _Year | _Folders, split: str, own: Sequence[VocAnnotation | None]) -> list[str]:
    """The names in a class file, else those in the annotations of all splits.

    A class may be missing in one split, and all splits must number their classes alike.
    """
    for name in CLASS_FILES:
        if (data.root / name).is_file():
            names = read_lines(data.root / name)
            if names:
                return names
            raise UserError(f"{data.root / name}: is empty; expected a line for each class")
    others = [other for other in _FOLDERS if other != split and data.source(other).exists()]
    files = [file for other in others for file in data.annotations(other)]
    annotations = [*own, *in_threads(read_annotation, files)]
    objects = (entry for annotation in annotations if annotation for entry in annotation.objects)
    found = {entry.name for entry in objects if entry.name}
    if not found:
        raise UserError(
            f"{data.source(split)}: no XML file names an object, so there are no classes; list "
            f"them in {data.root / CLASS_FILES[0]}, a line each"
        )
    if _YEAR.fullmatch(data.root.name) and found <= set(VOC_CLASSES):
        return list(VOC_CLASSES)
    return sorted(found)

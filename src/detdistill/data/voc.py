"""Reading and checking Pascal VOC data: an XML file an image.

Two layouts: a year of VOC (`Annotations`, `JPEGImages`, `ImageSets/Main`) or several in one folder,
and what labelling tools export, a folder per split that holds images and XML files side by side.

VOC counts pixels from 1 and means the last one to be inside, so a box from pixel 1 to pixel 10 is
0..10 here (as detectron2 reads it; torchvision and MMDetection differ by up to a pixel). Objects
marked `difficult` are treated as COCO's crowds: not learnt, and ignored in the evaluation.
"""

from __future__ import annotations

import os
import re
from collections import Counter
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

_LISTS = Path("ImageSets") / "Main"
_YEAR = re.compile(r"VOC20\d\d")
_FOLDERS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


def find_voc(root: Path, split: str) -> SplitReader | None:
    """What reads a split of Pascal VOC data; None when the folder holds none.

    Args:
        root: `VOCdevkit` with a year or several, a year, or a folder with a folder for each split.
        split: train, val or test.
    """
    data = _find_years(root) or _find_folders(root)
    if data is None:
        return None
    if not data.source(split).exists():
        raise MissingSplitError(f"{data.root}: no {split} split, {data.advice(split)}")
    return partial(_read_voc, data, split)


class _Years:
    """`Annotations`, `JPEGImages` and `ImageSets/Main`, of one year or of several.

    A split of several years is that of every year which lists it, year after year.
    """

    def __init__(self, root: Path, years: Sequence[Path]) -> None:
        self.root = root
        self.places = years

    def source(self, split: str) -> Path:
        """The list of a split; of several lists the folder that holds their years."""
        lists = [_list(year, split) for year in self.places]
        found = [path for path in lists if path.is_file()] or lists[:1]
        return found[0] if len(found) == 1 else self.root

    def advice(self, split: str) -> str:
        """What was looked for, and what to do."""
        advice = {
            "train": "list its images there",
            "val": f"{WITHOUT['val']}; or list them there",
            "test": f"{WITHOUT['test']}; or list its images there",
        }[split]
        both = [year / _LISTS / "trainval.txt" for year in self.places]
        read = [_list(year, "train") for year in self.places]
        if split != "test" and any(path.is_file() for path in both if path not in read):
            advice = "divide trainval.txt into train.txt and val.txt"
        looked_for = " or ".join(str(year / _LISTS / f"{split}.txt") for year in self.places)
        return f"looked for {looked_for}; {advice}"

    def annotations(self, split: str) -> list[Path]:
        """The XML files of a split, which need not exist."""
        return [
            year / "Annotations" / f"{stem}.xml"
            for year in self.places
            for stem in _stems(_list(year, split))
        ]

    def images(self, split: str) -> list[Path]:
        """The images, in the order of `annotations`."""
        images: dict[str, Path] = {}
        for year in self.places:
            own = _listed_images(year, _list(year, split))
            taken = next((stem for stem in own if stem in images), None)
            if taken is not None:
                raise UserError(
                    f"{_list(year, split)}: names {taken!r}, as the list of another year names "
                    f"{images[taken]}; the images of several years need different names: rename "
                    "them, or give --data one year"
                )
            images |= own
        return list(images.values())

    def faults(self, split: str) -> list[str]:
        """None: the lists decide what belongs to a split."""
        return []


class _Folders:
    """A folder per split, with XML files beside the images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.places: Sequence[Path] = [root]

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


def _find_years(root: Path) -> _Years | None:
    for pattern in ("Annotations", "VOC*/Annotations", "VOCdevkit/VOC*/Annotations"):
        found = [path.parent for path in sorted(root.glob(pattern)) if any(path.glob("*.xml"))]
        if found:
            return _Years(found[0] if len(found) == 1 else found[0].parent, found)
    return None


def _find_folders(root: Path) -> _Folders | None:
    folders = [root / name for names in _FOLDERS.values() for name in names]
    return _Folders(root) if any(any(folder.glob("*.xml")) for folder in folders) else None


def _list(year: Path, split: str) -> Path:
    """The list of a split, which need not exist; trainval.txt where it is the only one to learn."""
    train, val, both = (year / _LISTS / f"{name}.txt" for name in ("train", "val", "trainval"))
    if split == "train" and both.is_file() and not train.is_file() and not val.is_file():
        return both
    return year / _LISTS / f"{split}.txt"


def _stems(path: Path) -> list[str]:
    """The names in a list without their endings, each once; none where there is no such list."""
    names = (_stem(line) if is_image(line) else line for line in read_lines(path))
    return list(dict.fromkeys(names))


def _listed_images(year: Path, path: Path) -> dict[str, Path]:
    """The images that a list names, by their names in it."""
    folder = year / "JPEGImages"
    names = _image_names(folder) if folder.is_dir() else []
    by_stem = {_stem(name): folder / name for name in names}
    stems = _stems(path)
    for stem in stems:
        if stem not in by_stem:
            raise UserError(
                f"{path}: names {stem!r}, but {folder} holds no image of this "
                "name; remove the line, or copy the image there"
            )
    return {stem: by_stem[stem] for stem in stems}


def _image_names(folder: Path) -> list[str]:
    return sorted(filter(is_image, os.listdir(folder)))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _read_voc(data: _Years | _Folders, split: str) -> DetectionDataset:
    source = data.source(split)
    images, files = data.images(split), data.annotations(split)
    if not images:
        raise UserError(f"{source}: the {split} split is empty: no image; at least one is needed")
    annotations = in_threads(read_annotation, files)
    _require_xml(data, split, files, annotations)
    labels = {name: label for label, name in enumerate(_classes(data, split, annotations))}
    stated = [None if annotation is None else annotation.size for annotation in annotations]
    named = zip(images, files, stated, strict=True)
    boxes = BoxCollector({i: ImageFile(a, str(b), size) for i, (a, b, size) in enumerate(named, 1)})
    for number, (file, annotation) in enumerate(zip(files, annotations, strict=True), 1):
        for place, found in enumerate(annotation.objects if annotation else [], 1):
            _add(boxes, number, f"{file}, object {place}", found, labels)
    boxes.faults += data.faults(split)
    return boxes.dataset(list(labels), range(1, len(labels) + 1), split, source)


def _require_xml(
    data: _Years | _Folders,
    split: str,
    files: Sequence[Path],
    annotations: Sequence[VocAnnotation | None],
) -> None:
    """`UserError` when all images lack an XML file, or most of those of one of several years.

    The lists of VOC's later tests are public, their annotations are not: beside a year that has
    them these images would pass for background.
    """
    count = Counter(file.parent for file in files)
    missing: dict[Path, list[Path]] = {}
    for file, annotation in zip(files, annotations, strict=True):
        if annotation is None:
            missing.setdefault(file.parent, []).append(file)
    several = len(data.places) > 1
    for folder, lacking in missing.items():
        there = count[folder] - len(lacking)
        if there and not (several and there < len(lacking)):
            continue
        found = f"only {there}" if there else "none"
        verb = "have" if there > 1 else "has"
        advice = f", remove {split}.txt of this year to do without it" if several else ""
        raise UserError(
            f"{data.source(split)}: {found} of the {count[folder]} images {verb} an XML file, "
            f"looked for {lacking[0]} and so on; images without objects may lack one, but not "
            f"{'most' if several else 'all'}{advice}"
        )


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


def _classes(data: _Years | _Folders, split: str, own: Sequence[VocAnnotation | None]) -> list[str]:
    """The names in a class file, else those in the annotations of all splits.

    A class may be missing in one split, and all splits must number their classes alike.
    """
    stated = _stated_classes(data)
    if stated:
        return stated
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
    if all(_YEAR.fullmatch(place.name) for place in data.places) and found <= set(VOC_CLASSES):
        return list(VOC_CLASSES)
    return sorted(found)


def _stated_classes(data: _Years | _Folders) -> list[str] | None:
    """The names in a class file of the data, or of each of its years, which must be alike."""
    first: tuple[Path, list[str]] | None = None
    for place in dict.fromkeys((data.root, *data.places)):
        path = next((place / name for name in CLASS_FILES if (place / name).is_file()), None)
        if path is None:
            continue
        names = read_lines(path)
        if not names:
            raise UserError(f"{path}: is empty; expected a line for each class")
        if first is not None and names != first[1]:
            raise UserError(
                f"{path}: lists other classes than {first[0]}, {names} and {first[1]}; all years "
                "need the same in the same order"
            )
        first = first or (path, names)
    return first[1] if first else None

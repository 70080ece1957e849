"""Reading and checking YOLO data as Ultralytics lays it out: `data.yaml` and a text file an image.

A label file has a line per object, `class cx cy w h`, in shares of the upright image's width and
height. Of an outline, `class x1 y1 x2 y2 ...`, the box around it is taken. An image without a label
file shows background.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from detdistill.data.collector import Box, BoxCollector, ImageFile
from detdistill.data.dataset import WITHOUT, DetectionDataset, MissingSplitError, SplitReader
from detdistill.data.files import (
    IMAGE_SUFFIXES,
    in_threads,
    is_image,
    read_lines,
    read_text,
)
from detdistill.errors import UserError
from detdistill.recipe import parse_yaml

CONFIG_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
"""Of a data folder; a file of another name can be given itself."""

FARTHEST = 2.0
"""Shares beyond this are another unit, not a box that pokes out."""

_NOT_LABELS = ("classes.txt", "labels.txt", "notes.txt")  # what labelling tools put beside them
_ADVICE = {
    "train": "add the line `train: FOLDER`",
    "val": f"{WITHOUT['val']}; or add the line `val: FOLDER`",
    "test": f"{WITHOUT['test']}; or add the line `test: FOLDER`",
}


def find_yolo(root: Path, split: str) -> SplitReader | None:
    """What reads a split of YOLO data; None when the folder has no `data.yaml`.

    Args:
        root: the folder, or its YAML file.
        split: train, val or test.
    """
    files = [root] if not root.is_dir() else [root / name for name in CONFIG_NAMES]
    source = next((file for file in files if file.is_file()), None)
    if source is None and not root.is_dir():
        raise UserError(f"{root}: no such file; expected a folder, or the data.yaml of YOLO data")
    if source is None:
        return None
    config = _Config(source)
    if not config.values.get(split):
        raise MissingSplitError(
            f"{source}: no {split} split, it has no {split!r}; {_ADVICE[split]}"
        )
    return partial(_read_yolo, config, split)


class _Config:
    """`data.yaml`.

    Attributes:
        source: the file.
        values: what it says.
        classes: K names.
    """

    def __init__(self, source: Path) -> None:
        """Refuses a file without usable names."""
        self.source = source
        values = parse_yaml(read_text(source) or "", str(source))
        if not isinstance(values, dict):
            raise UserError(
                f"{source}: expected lines such as `train: images/train` and `names: [cat, dog]`, "
                f"found {'nothing' if values is None else f'a {type(values).__name__}'}"
            )
        self.values: dict[Any, Any] = values
        self.classes = self._names()
        count = values.get("nc")
        if count is not None and count != len(self.classes):
            raise UserError(
                f"{source}: nc is {count!r}, but names has {len(self.classes)} classes; correct "
                "one of them"
            )

    def _names(self) -> list[str]:
        names = self.values.get("names")
        if isinstance(names, dict):
            if set(names) != set(range(len(names))):
                raise UserError(
                    f"{self.source}: names has the keys {list(names)}; expected 0, 1, 2, ..."
                )
            names = [names[number] for number in range(len(names))]
        if not isinstance(names, list) or not names:
            raise UserError(
                f"{self.source}: names is {names!r}; expected the classes in the order of their "
                "ids, such as `names: [cat, dog]`"
            )
        for number, name in enumerate(names):
            if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
                raise UserError(
                    f"{self.source}: class {number} has the name {name!r}; expected a text, in "
                    "quotes where YAML takes it for something else"
                )
        texts = [str(name) for name in names]
        for name in texts:
            if texts.count(name) > 1:
                raise UserError(
                    f"{self.source}: two classes are called {name!r}; give each its own name"
                )
        return texts

    def places(self, split: str) -> list[Path]:
        """The folders and lists of a split's images."""
        given = self.values[split]
        entries = given if isinstance(given, list) else [given]
        return [self._place(split, entry) for entry in entries]

    def _place(self, split: str, entry: object) -> Path:
        """The folder or list that an entry means.

        Downloaded sets often say where the folder was on another machine, or `../train/images`
        where the images are in `train/images`: what does not exist as said is looked for below the
        file's own folder, without the `../`.
        """
        base, path = self.source.parent, self.values.get("path") or "."
        for key, value in ((split, entry), ("path", path)):
            if not isinstance(value, str) or not value:
                raise UserError(
                    f"{self.source}: {key} has the value {value!r}; expected the name of a folder"
                )
        text = str(entry)
        places = [
            root / name for root in (base / path, base) for name in (text, text.removeprefix("../"))
        ]
        for place in places:
            if place.exists():
                return place
        raise UserError(
            f"{self.source}: {split} is {text!r}, looked for "
            f"{', '.join(str(place) for place in dict.fromkeys(places))}; correct {split!r} or "
            "'path', which is relative to that file's folder"
        )


def _images(config: _Config, split: str, places: list[Path]) -> list[Path]:
    """All images of a split, each once."""
    found: dict[Path, None] = {}
    for place in places:
        images = _below(place) if place.is_dir() else _listed(place)
        if not images:
            raise UserError(
                f"{config.source}: the {split} split is empty: no image in {place}; expected names "
                f"that end in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        found.update(dict.fromkeys(images))
    return list(found)


def _below(folder: Path) -> list[Path]:
    """The images in a folder and the folders in it, by path; links are followed, circles not."""
    seen: set[str] = set()
    found: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        found += [os.path.join(place, name) for name in names if is_image(name)]
    return [Path(path) for path in sorted(found)]


def _listed(file: Path) -> list[Path]:
    """The images that a text file names, relative to its folder."""
    return [file.parent / line for line in read_lines(file)]


def label_path(image: Path) -> Path:
    """Where the labels of an image are.

    The last folder called `images` becomes `labels`; without one they lie beside the image.
    """
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_yolo(config: _Config, split: str) -> DetectionDataset:
    places = config.places(split)
    images = _images(config, split, places)
    boxes = BoxCollector({i: ImageFile(image, str(image)) for i, image in enumerate(images, 1)})
    labels = [label_path(image) for image in images]
    texts = in_threads(read_text, labels)
    if all(text is None for text in texts):
        raise UserError(
            f"{config.source}: none of the {len(images)} {split} images has a label file, looked "
            f"for {labels[0]} and so on; images without objects may lack one, but not all"
        )
    reader = _LabelReader(boxes, len(config.classes), "kpt_shape" in config.values)
    for number, (label, text) in enumerate(zip(labels, texts, strict=True), 1):
        reader.add(number, label, text or "")
    if reader.indices and (min(reader.indices), max(reader.indices)) == (1, len(config.classes)):
        raise UserError(  # names would be shifted, and the last class lost
            f"{config.source}: the class ids in the {split} labels run from 1 to "
            f"{len(config.classes)}, none is 0; they count from 0, in the order of names: subtract "
            f"1 from every id"
        )
    if all(place.is_dir() for place in places):  # a list may leave images out
        boxes.faults += _without_image(labels)
    ids = range(1, len(config.classes) + 1)
    return boxes.dataset(config.classes, ids, split, config.source)


def _without_image(labels: list[Path]) -> Iterator[str]:
    """A fault for each label file that belongs to no image."""
    expected = set(map(str, labels))
    for folder in sorted({label.parent for label in labels if "labels" in label.parts[:-1]}):
        for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
            path = os.path.join(folder, name)
            if name.endswith(".txt") and path not in expected and name not in _NOT_LABELS:
                yield f"{path}: there is no image of this name (left out)"


class _FaultyLineError(Exception):
    """What is wrong with a line."""


class _LabelReader:
    """Files the objects of label files under their images, and notes the faults of the others."""

    def __init__(self, boxes: BoxCollector, num_classes: int, keypoints: bool) -> None:
        self._boxes = boxes
        self._num_classes = num_classes
        self._keypoints = keypoints
        self.indices: set[int] = set()
        """The classes that the files name, also such as there are not."""

    def add(self, image_id: int, label: Path, text: str) -> None:
        """All lines of a label file."""
        height, width = self._boxes.size(image_id)
        seen: dict[tuple[int, Box], int] = {}
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split()
            if not fields:
                continue
            where = f"{label} line {number}"
            try:
                index, (left, top, right, bottom) = item = self._object(fields)
                if item in seen:
                    raise _FaultyLineError(f"says the same as line {seen[item]}")
            except _FaultyLineError as fault:
                self._boxes.faults.append(f"{where}: {fault} (dropped)")
                continue
            seen[item] = number
            sides = ((right - left) * width, (bottom - top) * height)
            self._boxes.add(image_id, where, (left * width, top * height, *sides), index)

    def _object(self, fields: list[str]) -> tuple[int, Box]:
        """Class and corners, in shares of the image."""
        values = [_number(field) for field in fields]
        if self._keypoints:
            values = values[:5]
        points = len(values) >= 7 and len(values) % 2 == 1
        if len(values) != 5 and not points:
            raise _FaultyLineError(
                f"has {len(fields)} fields; expected class cx cy w h, or class and three or more "
                "points x y"
            )
        index = int(values[0])
        self.indices.add(index)
        if index != values[0] or not 0 <= index < self._num_classes:
            raise _FaultyLineError(
                f"has the class {fields[0]}; expected 0 to {self._num_classes - 1}, as names has "
                f"{self._num_classes} classes"
            )
        farthest = max(values[1:], key=abs)
        if abs(farthest) > FARTHEST:
            raise _FaultyLineError(
                f"has the coordinate {farthest:g}; expected shares of the image, 0 to 1, not pixels"
            )
        xs, ys = values[1::2], values[2::2]
        if points:
            corners = (min(xs), min(ys), max(xs), max(ys))
        else:
            (x, w), (y, h) = xs, ys
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise _FaultyLineError("has a box without a positive width and height")
        return index, corners


def _number(field: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _FaultyLineError(f"has {field!r}, which is no finite number")
    return value

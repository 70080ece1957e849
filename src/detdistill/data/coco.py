"""Reading and checking COCO annotation files.

A file that cannot be used is refused with one sentence. Faults of single annotations are counted:
the annotation is dropped or clipped, named by its image, and training goes on, unless the recipe
says `strict`.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from detdistill.data.images import read_header, read_image
from detdistill.data.splits import Split, find_split
from detdistill.errors import UserError
from detdistill.recipe import Recipe

Json = dict[str, Any]
Box = tuple[float, float, float, float]
Row = tuple[Box, Box, int, bool, float]  # clipped xyxy, stated xywh, label, crowd, area

TOLERANCE = 1.0
"""Pixels that a box may poke out of its image before that counts as a fault."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_MIN_SIDE = 1e-3  # pixels; what is thinner has no area left in float32


@dataclass(frozen=True)
class ImageRecord:
    """One image and its ground truth.

    Attributes:
        image_id: id in the annotation file.
        path: the image file.
        height: pixels, in the frame of the boxes (upright where EXIF turns the image).
        width: pixels.
        boxes_xyxy: (N, 4) float32 pixels, clipped to the image.
        labels: (N,) int64, 0..K-1.
        crowd: (N,) bool: regions that stand for many objects.
        areas: (N,) float64 pixels, as the file states them, else those of the box.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes_xyxy: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor


@dataclass(frozen=True)
class DetectionDataset:
    """A checked split.

    Attributes:
        records: one per image, in the order of the file.
        classes: K names, by ascending category id.
        category_ids: K ids, ascending; label i is `category_ids[i]`.
        split: train, val or test.
        source: the annotation file.
        faults: what was dropped or corrected, each naming the image.
        stated_xywh: (sum of N, 4) float64: all boxes as the file states them, for the evaluator.
    """

    records: list[ImageRecord]
    classes: list[str]
    category_ids: list[int]
    split: str
    source: Path
    faults: list[str]
    stated_xywh: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.records)

    def read(self, index: int) -> Tensor:
        """(3, h, w) uint8 RGB of one image, in the frame of its boxes."""
        record = self.records[index]
        image = read_image(record.path, (record.height, record.width))
        if image.shape[1:] != (record.height, record.width):
            raise UserError(
                f"{record.path}: the image is {image.shape[2]}x{image.shape[1]} now and was "
                f"{record.width}x{record.height} before; leave the data alone during a run"
            )
        return image

    def ground_truth(self) -> Json:
        """This split as a COCO dict, crowds included and faulty annotations left out."""
        images: list[Json] = []
        annotations: list[Json] = []
        stated = iter(self.stated_xywh.tolist())
        for record in self.records:
            images.append(
                {
                    "id": record.image_id,
                    "file_name": record.path.name,
                    "height": record.height,
                    "width": record.width,
                }
            )
            rows = (record.labels.tolist(), record.areas.tolist(), record.crowd.tolist())
            for label, area, crowd in zip(*rows, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # 0 means "unmatched" to COCO's evaluator
                        "image_id": record.image_id,
                        "category_id": self.category_ids[label],
                        "bbox": next(stated),
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        pairs = zip(self.category_ids, self.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        return {"images": images, "annotations": annotations, "categories": categories}

    def fault_summary(self) -> str:
        """One line about the faults; empty when there are none."""
        if not self.faults:
            return ""
        shown = "; ".join(self.faults[:3])
        more = f"; and {len(self.faults) - 3} more" if len(self.faults) > 3 else ""
        noun = "fault" if len(self.faults) == 1 else "faults"
        return f"{self.source}: {len(self.faults)} {noun}: {shown}{more}"


def require_same_classes(train: DetectionDataset, other: DetectionDataset) -> None:
    """`UserError` when two splits differ in their classes."""
    if other.classes != train.classes:
        raise UserError(
            f"{other.source}: classes {other.classes} differ from those of {train.source}: "
            f"{train.classes}; all splits need the same categories"
        )


def open_dataset(recipe: Recipe, split: Split) -> DetectionDataset:
    """Reads and checks a split of the recipe's data.

    Every image file is looked at, so that a missing or broken one stops the run before it starts:
    of JPEG and PNG the header and the end (about 0.1 ms an image), other formats are decoded.
    """
    folder, source = find_split(recipe, split)
    dataset = read_coco(folder, source, split)
    if recipe.strict and dataset.faults:
        raise UserError(f"{dataset.fault_summary()}; correct the file, or run without --strict")
    if split == "train" and not any((~record.crowd).any() for record in dataset.records):
        raise UserError(
            f"{dataset.source}: no training image has a usable box; there is nothing to learn from"
            + (f" ({dataset.fault_summary()})" if dataset.faults else "")
        )
    return dataset


def read_coco(folder: Path, source: Path, split: Split) -> DetectionDataset:
    """A checked data set from an image folder and a COCO annotation file."""
    data = load_json(source)
    categories = _categories(data, source)
    faults: list[str] = []
    sizes = _image_sizes(data, folder, source, faults)
    reader = _AnnotationReader(source, {number: i for i, number in enumerate(categories)}, sizes)
    for annotation in data["annotations"]:
        reader.add(annotation)
    records, stated = reader.records()
    return DetectionDataset(
        records,
        list(categories.values()),
        list(categories),
        split,
        source,
        faults + reader.faults,
        stated,
    )


def load_json(source: Path) -> Json:
    """The annotation file as a dict that has COCO's three lists."""
    try:
        data = json.loads(source.read_bytes())
    except OSError as error:
        raise UserError(f"{source}: cannot read the annotation file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{source}: not JSON, or cut off ({reason}); expected a COCO annotation file"
        ) from None
    if not isinstance(data, dict):
        found = type(data).__name__
        raise UserError(
            f"{source}: not a COCO annotation file: found a {found} at the top, not an object"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise UserError(f"{source}: not a COCO annotation file: it has no list {key!r}")
    if not data["images"]:
        raise UserError(f"{source}: the list 'images' is empty; at least one image is needed")
    return data


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique_id(entry: object, kind: str, place: int, seen: dict[int, Any], source: Path) -> int:
    number = entry.get("id") if isinstance(entry, dict) else None
    if not _is_id(number):
        raise UserError(
            f"{source}: {kind} number {place} has the id {number!r}; expected an integer"
        )
    if number in seen:
        raise UserError(f"{source}: {kind} id {number} occurs twice; give every {kind} its own id")
    return number


def _categories(data: Json, source: Path) -> dict[int, str]:
    """Category id to name, ids ascending."""
    names: dict[int, str] = {}
    for place, entry in enumerate(data["categories"]):
        number = _unique_id(entry, "category", place, names, source)
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip() or _CONTROL.search(name):
            raise UserError(f"{source}: category {number} has the name {name!r}; expected a line")
        if name in names.values():
            raise UserError(f"{source}: two categories are called {name!r}; give each its own name")
        names[number] = name
    if not names:
        raise UserError(f"{source}: the list 'categories' is empty; at least one class is needed")
    return dict(sorted(names.items()))


def _image_path(entry: Json, number: int, folder: Path, source: Path) -> Path:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{source}: image {number} has the file_name {name!r}; expected a text")
    # Lexical: a link inside the folder may point anywhere, the annotation file may not.
    inside = os.path.normpath(name)
    if os.path.isabs(name) or inside == ".." or inside.startswith(f"..{os.sep}"):
        raise UserError(
            f"{source}: image {number} has the file_name {name!r}, which leaves {folder}; "
            "use names relative to that folder"
        )
    return folder / name


def _stated_size(entry: Json) -> tuple[int, int] | None:
    """(h, w) of the annotation file, None where it gives no usable one."""
    height, width = entry.get("height"), entry.get("width")
    if all(isinstance(side, int | float) and 1 <= side < 1e9 for side in (height, width)):
        return round(entry["height"]), round(entry["width"])
    return None


@dataclass(frozen=True)
class _Sized:
    path: Path
    height: int
    width: int


def _image_sizes(data: Json, folder: Path, source: Path, faults: list[str]) -> dict[int, _Sized]:
    """Image id to path and size, from the files themselves."""
    entries: dict[int, tuple[Path, tuple[int, int] | None]] = {}
    for place, entry in enumerate(data["images"]):
        number = _unique_id(entry, "image", place, entries, source)
        entries[number] = (_image_path(entry, number, folder, source), _stated_size(entry))
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(read_header, [path for path, _ in entries.values()]))
    sizes: dict[int, _Sized] = {}
    for (number, (path, stated)), header in zip(entries.items(), headers, strict=True):
        height, width = header.frame(stated)
        if stated is not None and stated != (height, width):
            faults.append(
                f"image {number}: the file says {stated[1]}x{stated[0]}, {path.name} is "
                f"{width}x{height} (the image's own size is used)"
            )
        sizes[number] = _Sized(path, height, width)
    return sizes


class _AnnotationReader:
    """Collects the usable annotations of every image and the faults of the others."""

    def __init__(self, source: Path, labels: dict[int, int], sizes: dict[int, _Sized]) -> None:
        self.source = source
        self.labels = labels
        self.sizes = sizes
        self.faults: list[str] = []
        self._seen: dict[int, None] = {}
        self._rows: dict[int, list[Row]] = {n: [] for n in sizes}

    def add(self, annotation: object) -> None:
        """Files one annotation under its image, or notes why not."""
        if not isinstance(annotation, dict):
            raise UserError(
                f"{self.source}: found the annotation {reprlib.repr(annotation)}; "
                "expected an object"
            )
        number, image_id = annotation.get("id"), annotation.get("image_id")
        if isinstance(number, int):
            if number in self._seen:
                raise UserError(
                    f"{self.source}: annotation id {number} occurs twice (again in image "
                    f"{image_id}); give every annotation its own id"
                )
            self._seen[number] = None
        where = f"image {image_id}, annotation {number}"
        if not _is_id(image_id) or image_id not in self.sizes:
            self.faults.append(f"{where}: no such image (dropped)")
            return
        category = annotation.get("category_id")
        if not _is_id(category) or category not in self.labels:
            self.faults.append(f"{where}: unknown category id {category!r} (dropped)")
            return
        crowd = annotation.get("iscrowd")
        if crowd not in (None, 0, 1):
            self.faults.append(f"{where}: iscrowd is {reprlib.repr(crowd)}, not 0 or 1 (dropped)")
            return
        self._add_box(annotation, where, self.sizes[image_id], self._rows[image_id])

    def _add_box(
        self,
        annotation: Json,
        where: str,
        size: _Sized,
        rows: list[Row],
    ) -> None:
        stated = _box(annotation.get("bbox"))
        if stated is None:
            self.faults.append(
                f"{where}: box {reprlib.repr(annotation.get('bbox'))} is not four finite numbers "
                "with a positive width and height (dropped)"
            )
            return
        x, y, w, h = stated
        corners = (max(x, 0.0), max(y, 0.0), min(x + w, size.width), min(y + h, size.height))
        left, top, right, bottom = corners
        if min(right - left, bottom - top) < _MIN_SIDE:
            self.faults.append(
                f"{where}: box {list(stated)} has no area inside its "
                f"{size.width}x{size.height} image (dropped)"
            )
            return
        if max(-x, -y, x + w - size.width, y + h - size.height) > TOLERANCE:
            self.faults.append(
                f"{where}: box {list(stated)} pokes out of its "
                f"{size.width}x{size.height} image (clipped)"
            )
            stated = (left, top, right - left, bottom - top)
        label = self.labels[annotation["category_id"]]
        crowd = bool(annotation.get("iscrowd"))
        rows.append((corners, stated, label, crowd, _area(annotation.get("area"), stated)))

    def records(self) -> tuple[list[ImageRecord], Tensor]:
        """The records in the order of the file, and all boxes as stated."""
        rows = [row for image in self._rows.values() for row in image]
        counts = [len(image) for image in self._rows.values()]
        corners = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
        stated = torch.tensor([row[1] for row in rows], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
        crowd = torch.tensor([row[3] for row in rows], dtype=torch.bool)
        areas = torch.tensor([row[4] for row in rows], dtype=torch.float64)
        columns = [torch.split(column, counts) for column in (corners, labels, crowd, areas)]
        pieces = zip(self.sizes.items(), *columns, strict=True)
        records = [
            ImageRecord(number, size.path, size.height, size.width, *tensors)
            for (number, size), *tensors in pieces
        ]
        return records, stated


def _box(value: object) -> Box | None:
    """Four finite numbers, x, y, w, h with w, h > 0; None for anything else."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        return None
    x, y, w, h = map(float, value)
    return (x, y, w, h) if w > 0 and h > 0 else None


def _area(value: object, box_xywh: Box) -> float:
    """As the file states it, else that of the box."""
    return float(value) if _is_number(value) and value > 0 else box_xywh[2] * box_xywh[3]


def _is_number(value: object) -> TypeGuard[float]:
    """Finite also as a float, which JSON's integers need not be."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < sys.float_info.max  # type: ignore[arg-type]

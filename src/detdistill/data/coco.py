"""Reading and checking COCO annotation files.

A file that cannot be used is refused with one sentence. Faults of single annotations are counted:
the annotation is dropped or clipped, named by its image, and training goes on, unless the recipe
says `strict`.

Roboflow's exports are COCO files beside their images. They hold one category more, the
supercategory of all others, which is left out where no box has it.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import sys
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import TypeGuard

from detdistill.data.collector import Box, BoxCollector, ImageFile
from detdistill.data.dataset import WITHOUT, DetectionDataset, Json, MissingSplitError, SplitReader
from detdistill.data.files import require_folder
from detdistill.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# (annotation file, image folder) below the data folder; {} is the split
_LAYOUTS = (
    ("annotations/{}.json", "images"),
    ("annotations/instances_{}2017.json", "{}2017"),
)
_ROBOFLOW = "_annotations.coco.json"
_ROBOFLOW_FOLDERS = {"train": "train", "val": "valid", "test": "test"}
_ADVICE = {
    "train": "write one",
    "val": f"{WITHOUT['val']}; or set val_images and val_annotations in the recipe",
    "test": f"{WITHOUT['test']}; or set test_images and test_annotations in the recipe",
}


def find_coco(root: Path, split: str) -> SplitReader | None:
    """What reads a split of a COCO folder; None when the folder has no COCO annotations."""
    for file, folder in _places(split):
        source, images = root / file, root / folder
        if source.is_file():
            require_folder(images, f"image folder of {source.name}")
            return partial(read_coco, images, source, split)
    if any((root / file).is_file() for other in _ADVICE for file, _ in _places(other)):
        names = looked_for(split)
        raise MissingSplitError(f"{root}: no {split} split, looked for {names}; {_ADVICE[split]}")
    return None


def looked_for(split: str) -> str:
    """The annotation files that make a folder a COCO folder."""
    return " or ".join(file for file, _ in _places(split))


def _places(split: str) -> list[tuple[str, str]]:
    """Annotation file and image folder of a split, in every layout."""
    folder = _ROBOFLOW_FOLDERS[split]
    named = [(file.format(split), images.format(split)) for file, images in _LAYOUTS]
    return [*named, (f"{folder}/{_ROBOFLOW}", folder)]


def read_coco(folder: Path, source: Path, split: str) -> DetectionDataset:
    """A checked data set from an image folder and a COCO annotation file."""
    data = load_json(source)
    categories = _categories(data, source)
    boxes = BoxCollector(_images(data, folder, source))
    reader = _AnnotationReader(source, {number: i for i, number in enumerate(categories)}, boxes)
    for annotation in data["annotations"]:
        reader.add(annotation)
    return boxes.dataset(list(categories.values()), list(categories), split, source)


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


def _unique_id(entry: object, kind: str, place: int, seen: Container[int], source: Path) -> int:
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
    group = _group(data, source)
    for place, entry in enumerate(data["categories"]):
        if entry is group:
            continue
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


def _group(data: Json, source: Path) -> Json | None:
    """The category that Roboflow adds as the supercategory of all others; None if it is a class.

    It is a class where a box of any split has it, so that all splits agree.
    """
    entries: list[Json] = data["categories"]
    if source.name != _ROBOFLOW or not all(isinstance(entry, dict) for entry in entries):
        return None
    for entry in entries:
        parents = {str(other.get("supercategory")) for other in entries if other is not entry}
        if parents == {entry.get("name")} and not _holds_boxes(entry.get("id"), data, source):
            return entry
    return None


def _holds_boxes(category: object, data: Json, source: Path) -> bool:
    """Whether any annotation of a Roboflow export, in this split or another, has a category."""
    if _names_category(category, data):
        return True
    for folder in _ROBOFLOW_FOLDERS.values():
        other = source.absolute().parent.with_name(folder) / _ROBOFLOW
        if not other.is_file() or other.samefile(source):
            continue
        try:
            if _names_category(category, load_json(other)):
                return True
        except UserError:
            continue  # told when that split is opened
    return False


def _names_category(category: object, data: Json) -> bool:
    entries = filter(lambda entry: isinstance(entry, dict), data["annotations"])
    return any(entry.get("category_id") == category for entry in entries)


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


def _images(data: Json, folder: Path, source: Path) -> dict[int, ImageFile]:
    """Image id to file."""
    images: dict[int, ImageFile] = {}
    for place, entry in enumerate(data["images"]):
        number = _unique_id(entry, "image", place, images, source)
        path = _image_path(entry, number, folder, source)
        images[number] = ImageFile(path, f"image {number}", _stated_size(entry))
    return images


class _AnnotationReader:
    """Files annotations under their images, and notes the faults of those that it cannot."""

    def __init__(self, source: Path, labels: dict[int, int], boxes: BoxCollector) -> None:
        self.source = source
        self.labels = labels
        self.boxes = boxes
        self._seen: set[int] = set()

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
            self._seen.add(number)
        where = f"image {image_id}, annotation {number}"
        if not _is_id(image_id) or image_id not in self.boxes:
            self.boxes.faults.append(f"{where}: no such image (dropped)")
            return
        category = annotation.get("category_id")
        if not _is_id(category) or category not in self.labels:
            self.boxes.faults.append(f"{where}: unknown category id {category!r} (dropped)")
            return
        crowd = annotation.get("iscrowd")
        if crowd not in (None, 0, 1):
            self.boxes.faults.append(
                f"{where}: iscrowd is {reprlib.repr(crowd)}, not 0 or 1 (dropped)"
            )
            return
        box_xywh = _box(annotation.get("bbox"))
        if box_xywh is None:
            self.boxes.faults.append(
                f"{where}: box {reprlib.repr(annotation.get('bbox'))} is not four finite numbers "
                "with a positive width and height (dropped)"
            )
            return
        label, area = self.labels[category], _area(annotation.get("area"))
        self.boxes.add(image_id, where, box_xywh, label, crowd=bool(crowd), area=area)


def _box(value: object) -> Box | None:
    """Four finite numbers, x, y, w, h with w, h > 0; None for anything else."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        return None
    x, y, w, h = map(float, value)
    return (x, y, w, h) if w > 0 and h > 0 else None


def _area(value: object) -> float | None:
    return float(value) if _is_number(value) and value > 0 else None


def _is_number(value: object) -> TypeGuard[float]:
    """Finite also as a float, which JSON's integers need not be."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < sys.float_info.max  # type: ignore[arg-type]

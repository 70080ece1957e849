"""Where the images and the annotations of a split are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from detdistill.errors import UserError
from detdistill.recipe import Recipe

Split = Literal["train", "val", "test"]

# (annotation file, image folder) below the data folder; {} is the split
_LAYOUTS = (
    ("annotations/{}.json", "images"),
    ("annotations/instances_{}2017.json", "{}2017"),
)
_ADVICE = {
    "train": "write one, or point --data at a COCO folder",
    "val": "hold out some training images as val (10 % is usual), or set val_images and "
    "val_annotations in the recipe",
    "test": "use --split val, or set test_images and test_annotations in the recipe",
}


def find_split(recipe: Recipe, split: Split) -> tuple[Path, Path]:
    """(image folder, annotation file) of a split, both checked to exist.

    The recipe's explicit paths win over the data folder, where `images/` with
    `annotations/<split>.json` and the official `<split>2017/` with
    `annotations/instances_<split>2017.json` are known.
    """
    images: str | None = getattr(recipe, f"{split}_images")
    annotations: str | None = getattr(recipe, f"{split}_annotations")
    if images is not None and annotations is not None:
        return _folder(Path(images), f"{split}_images"), _file(Path(annotations), split)
    if images is not None or annotations is not None:
        given, missing = ("images", "annotations") if images else ("annotations", "images")
        raise UserError(
            f"recipe: {split}_{given} is set but {split}_{missing} is not; set both or neither"
        )
    if recipe.data is None:
        raise UserError(
            f"no {split} data given; pass --data FOLDER (a COCO folder), or set {split}_images and "
            f"{split}_annotations in the recipe"
        )
    return _search(Path(recipe.data), split)


def _search(root: Path, split: Split) -> tuple[Path, Path]:
    _folder(root, "data folder")
    layouts = [
        (root / file.format(split), root / folder.format(split)) for file, folder in _LAYOUTS
    ]
    for source, images in layouts:
        if source.is_file():
            return _folder(images, f"image folder of {source.name}"), source
    if not any(root.iterdir()):
        raise UserError(
            f"{root}: the data folder is empty; expected images/ and annotations/{split}.json"
        )
    names = " or ".join(file.format(split) for file, _ in _LAYOUTS)
    raise UserError(f"{root}: no {split} split, looked for {names}; {_ADVICE[split]}")


def _folder(path: Path, what: str) -> Path:
    if not path.exists():
        raise UserError(f"{path}: {what} not found; check the path")
    if not path.is_dir():
        raise UserError(f"{path}: {what} must be a folder, found a file")
    return path


def _file(path: Path, split: Split) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: {split}_annotations is no file; expected a COCO annotation file")
    return path

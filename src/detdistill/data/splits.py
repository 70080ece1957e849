"""From a recipe to a checked split: which format the data has, and where the split is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from detdistill.data.coco import find_coco, looked_for, read_coco
from detdistill.data.dataset import DetectionDataset, MissingSplitError, SplitReader
from detdistill.data.files import in_threads, require_folder
from detdistill.data.images import check_image
from detdistill.data.voc import find_voc
from detdistill.data.yolo import CONFIG_NAMES, find_yolo
from detdistill.errors import UserError
from detdistill.recipe import Recipe

Split = Literal["train", "val", "test"]


def open_dataset(recipe: Recipe, split: Split) -> DetectionDataset:
    """Reads and checks a split of the recipe's data.

    Every image file is looked at, so that a missing or broken one stops the run before it starts:
    of JPEG and PNG the header and the end (about 0.1 ms an image), other formats are decoded.
    With `drop_empty` the train split holds only images with a box to learn; the others are whole.
    """
    dataset = find_split(recipe, split)()
    if recipe.strict and dataset.faults:
        raise UserError(f"{dataset.fault_summary()}; correct the file, or run without --strict")
    if split != "train":
        return dataset
    learnable = [i for i, record in enumerate(dataset.records) if (~record.crowd).any()]
    if not learnable:
        raise UserError(
            f"{dataset.source}: no training image has a usable box; there is nothing to learn from"
            + (f" ({dataset.fault_summary()})" if dataset.faults else "")
        )
    return dataset.subset(learnable) if recipe.drop_empty else dataset


def decode_images(
    datasets: Sequence[DetectionDataset],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Decodes every image, to see that each can be: `open_dataset` looks at JPEG and PNG briefly.

    Args:
        datasets: opened splits.
        progress: called with (images done, all).

    Raises:
        UserError: for the first image that is broken.
    """
    paths = [record.path for dataset in datasets for record in dataset.records]
    in_threads(check_image, paths, progress)


def find_split(recipe: Recipe, split: Split) -> SplitReader:
    """What reads a split, after a look at where it is.

    The recipe's explicit paths to COCO annotations win over the data folder, which is told apart by
    what lies in it: COCO, YOLO or Pascal VOC.

    Raises:
        MissingSplitError: when the data has no such split.
        UserError: when there is no data.
    """
    if split not in get_args(Split):
        raise UserError(f"no split is called {split!r}; choose one of {', '.join(get_args(Split))}")
    images: str | None = getattr(recipe, f"{split}_images")
    annotations: str | None = getattr(recipe, f"{split}_annotations")
    if images is not None and annotations is not None:
        folder = require_folder(Path(images), f"{split}_images")
        return partial(read_coco, folder, _file(Path(annotations), split), split)
    if images is not None or annotations is not None:
        given, missing = ("images", "annotations") if images else ("annotations", "images")
        raise UserError(
            f"recipe: {split}_{given} is set but {split}_{missing} is not; set both or neither"
        )
    if recipe.data is None:
        raise MissingSplitError(
            f"no {split} data given; pass --data FOLDER (COCO, YOLO or Pascal VOC), or set "
            f"{split}_images and {split}_annotations in the recipe"
        )
    return _find_in(Path(recipe.data), split)


def has_split(recipe: Recipe, split: Split) -> bool:
    """Whether the recipe's data has such a split."""
    try:
        find_split(recipe, split)
    except MissingSplitError:
        return False
    return True


def _find_in(root: Path, split: Split) -> SplitReader:
    """The first format of which the folder has something."""
    if root.suffix not in (".yaml", ".yml") or root.is_dir():
        require_folder(root, "data folder")
    for find in (find_coco, find_yolo, find_voc):
        reader = find(root, split)
        if reader is not None:
            return reader
    empty = not any(root.iterdir())
    found = "the data folder is empty" if empty else "neither COCO nor YOLO nor Pascal VOC data"
    raise UserError(
        f"{root}: {found}; looked for {looked_for(split)} (COCO), {' or '.join(CONFIG_NAMES)} "
        f"(YOLO), Annotations/*.xml with ImageSets/Main/{split}.txt, or {split}/*.xml beside the "
        f"images (VOC){_nearby(root)}"
    )


def _nearby(root: Path) -> str:
    """A hint at a folder above or below that looks like the one that was meant."""
    here = root.absolute()
    for folder in (here.parent, here.parent.parent, *sorted(here.iterdir())):
        for name in (*CONFIG_NAMES, "annotations", "Annotations"):
            if (folder / name).exists():
                return f"; {folder} holds {name}: was that meant?"
    return ""


def _file(path: Path, split: Split) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: {split}_annotations is no file; expected a COCO annotation file")
    return path

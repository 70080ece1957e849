"""Data of any format as a COCO folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from detdistill.data.dataset import DetectionDataset
from detdistill.data.files import new_folder


def write_coco_folder(
    folder: str | Path,
    datasets: Sequence[DetectionDataset],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes splits as one COCO folder and returns it.

    The images are hard links where the file system allows it, which takes neither time nor room,
    else copies. What was dropped or clipped on reading stays so. The folder appears only when
    complete.

    Args:
        folder: where to; new or empty.
        datasets: the splits, each once.
        progress: called with (images done, all).
    """
    folder = Path(folder)
    total, done = sum(len(dataset) for dataset in datasets), 0
    with new_folder(folder) as unfinished:
        (unfinished / "annotations").mkdir(parents=True)
        for dataset in datasets:
            data = dataset.ground_truth()
            names = _names(dataset)
            (unfinished / "images" / dataset.split).mkdir(parents=True)
            for entry, record, name in zip(data["images"], dataset.records, names, strict=True):
                entry["file_name"] = f"{dataset.split}/{name}"
                _link(record.path, unfinished / "images" / dataset.split / name)
                done += 1
                if progress is not None:
                    progress(done, total)
            text = json.dumps(data)
            path = unfinished / "annotations" / f"{dataset.split}.json"
            path.write_text(text, encoding="utf-8")
    return folder


def _names(dataset: DetectionDataset) -> list[str]:
    """A name for each image: its own, with its number where two folders hold the same name."""
    taken: set[str] = set()
    names = []
    for record in dataset.records:
        name = record.path.name
        while name.lower() in taken:  # to some file systems A.jpg is a.jpg
            name = f"{record.image_id}_{name}"
        taken.add(name.lower())
        names.append(name)
    return names


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)

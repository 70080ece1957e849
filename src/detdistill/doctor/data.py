"""Whether the splits hold what a training needs, and nothing that spoils the numbers."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from detdistill.data import DetectionDataset, open_dataset, require_same_classes
from detdistill.data.splits import Split, find_split
from detdistill.doctor.finding import Finding, Level, Section, counted, few, from_error
from detdistill.errors import UserError
from detdistill.recipe import Recipe

RARE = 10
"""Training boxes below which a class that is measured counts as rare."""

MANY_FAULTS = 0.1
"""Share of faulty boxes from which on the whole file is suspected."""

MANY_EMPTY = 0.5
"""Share of images without boxes that is worth a warning."""

HEAD_BYTES = 16384
"""Of a file, compared before all of it is."""

MISSING: dict[str, Level] = {"val": "problem", "test": "warning"}


def check_data(recipe: Recipe) -> tuple[Section, dict[str, DetectionDataset]]:
    """All splits, and those of them that can be used.

    Raises:
        UserError: when there is no training split at all.
    """
    find_split(recipe, "train")
    section = Section("data", "Data")
    splits: dict[str, DetectionDataset] = {}
    for split in get_args(Split):
        try:
            find_split(recipe, split)
        except UserError as error:
            section.findings.append(from_error(MISSING[split], error))
            continue
        try:
            splits[split] = open_dataset(recipe, split)
        except UserError as error:
            section.findings.append(from_error("problem", error))
            continue
        section.findings += check_split(splits[split])
    section.findings += check_classes(splits)
    shared = shared_images(splits)
    section.findings += check_shared(shared)
    section.numbers = {
        "splits": {name: split_numbers(dataset) for name, dataset in splits.items()},
        "shared_images": {"+".join(pair): len(paths) for pair, paths in shared.items()},
    }
    return section, splits


def split_numbers(dataset: DetectionDataset) -> dict[str, Any]:
    """What a split holds."""
    boxes = boxes_per_class(dataset)
    crowds = sum(int(record.crowd.sum()) for record in dataset.records)
    return {
        "images": len(dataset),
        "images_without_boxes": sum(len(record.labels) == 0 for record in dataset.records),
        "boxes": sum(boxes.values()),
        "crowds": crowds,
        "faults": len(dataset.faults),
        "boxes_per_class": boxes,
    }


def boxes_per_class(dataset: DetectionDataset) -> dict[str, int]:
    """Boxes of each class by name, crowds left out."""
    counts = torch.zeros(len(dataset.classes), dtype=torch.int64)
    for record in dataset.records:
        counts += record.labels[~record.crowd].bincount(minlength=len(counts))
    return dict(zip(dataset.classes, counts.tolist(), strict=True))


def check_split(dataset: DetectionDataset) -> list[Finding]:
    """Counts, images without boxes, faults, and coordinates that are no pixels."""
    numbers = split_numbers(dataset)
    images, boxes, empty = (numbers[key] for key in ("images", "boxes", "images_without_boxes"))
    text = (
        f"{dataset.split}: {counted(images, 'image')}, {counted(boxes, 'box')}, "
        f"{counted(len(dataset.classes), 'class')}"
    )
    text += f", {counted(empty, 'image')} without boxes" if empty else ""
    findings = [Finding("ok", text)]
    if not boxes:
        advice = f"label it, or take another {dataset.split} split: no AP can be measured on this"
        findings.append(Finding("warning", f"{dataset.split}: no box at all", advice))
    elif empty > MANY_EMPTY * images:
        findings.append(
            Finding(
                "warning",
                f"{dataset.split}: {empty} of {images} images have no box",
                "right where they show background alone; if they show objects, the annotations "
                "belong to other images or lack most of them",
            )
        )
    findings += _check_faults(dataset, boxes)
    sides = dataset.stated_xywh[:, 2:]
    if len(sides) and float(sides.median()) <= 1:
        findings.append(
            Finding(
                "problem",
                f"{dataset.split}: half of all box sides are at most 1 pixel long",
                "the coordinates look like shares of the image; COCO's are [x, y, width, height] "
                "in pixels",
            )
        )
    return findings


def _check_faults(dataset: DetectionDataset, boxes: int) -> list[Finding]:
    faults = dataset.faults
    if not faults:
        return []
    summary = dataset.fault_summary().removeprefix(f"{dataset.source}: ")
    text = f"{dataset.split}: {summary}"
    if len(faults) >= MANY_FAULTS * max(1, boxes):
        advice = (
            "so many are no slips: are the boxes [x, y, width, height] in pixels, and of these "
            "images?"
        )
        return [Finding("problem", text, advice)]
    return [Finding("warning", text, f"correct {dataset.source}; until then these are left out")]


def check_classes(splits: Mapping[str, DetectionDataset]) -> list[Finding]:
    """Equal classes in all splits, and enough training boxes of those that are measured."""
    train, findings = splits.get("train"), []
    if train is None:
        return []
    learnt = boxes_per_class(train)
    for name in ("val", "test"):
        if name not in splits:
            continue
        try:
            require_same_classes(train, splits[name])
        except UserError as error:
            findings.append(from_error("problem", error))
            continue
        measured = boxes_per_class(splits[name])
        findings += _compare_counts(name, learnt, measured)
    return findings


def _compare_counts(
    split: str, learnt: Mapping[str, int], measured: Mapping[str, int]
) -> list[Finding]:
    absent = [name for name, count in measured.items() if count and not learnt[name]]
    rare = [name for name, count in measured.items() if count and 0 < learnt[name] < RARE]
    findings = []
    if absent:
        boxes = counted(sum(measured[name] for name in absent), "box")
        findings.append(
            Finding(
                "problem",
                f"{split} measures {counted(len(absent), 'class')} of which train has no box: "
                f"{few(absent)} ({boxes})",
                "label some in train, or leave the class out of all splits",
            )
        )
    if rare:
        shown = few([f"{name} ({learnt[name]})" for name in rare])
        findings.append(
            Finding(
                "warning",
                f"{split} measures {counted(len(rare), 'class')} with fewer than {RARE} boxes in "
                f"train: {shown}",
                "label more of them; their AP will be near 0 and pull the mean down",
            )
        )
    return findings


def shared_images(
    splits: Mapping[str, DetectionDataset],
) -> dict[tuple[str, str], list[Path]]:
    """For each two splits the second one's images that the first one holds, too, byte by byte.

    Only files of equal size are read, and whole only where their beginnings agree.
    """
    groups: dict[Any, set[tuple[str, Path]]] = {
        (): {(name, record.path) for name, data in splits.items() for record in data.records}
    }
    for key in (_size, _beginning, _content):
        groups = _split_groups(groups, key)
    shared: dict[tuple[str, str], list[Path]] = defaultdict(list)
    order = list(splits)
    for members in groups.values():
        held = {name for name, _ in members}
        for name, path in members:
            for other in order[: order.index(name)]:
                if other in held:
                    shared[other, name].append(path)
    return {pair: sorted(paths) for pair, paths in sorted(shared.items())}


def _split_groups(groups: Mapping[Any, Iterable[tuple[str, Path]]], key: Any) -> dict[Any, Any]:
    """Divides groups of files by a key of each; groups of one split alone are dropped."""
    divided: dict[Any, set[tuple[str, Path]]] = defaultdict(set)
    for group, members in groups.items():
        for name, path in members:
            divided[group, key(path)].add((name, path))
    return {k: found for k, found in divided.items() if len({name for name, _ in found}) > 1}


def _size(path: Path) -> int:
    return path.stat().st_size


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(HEAD_BYTES)).digest()


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def check_shared(shared: Mapping[tuple[str, str], list[Path]]) -> list[Finding]:
    """Images that stand in two splits: what was learnt by heart is measured."""
    findings = []
    for (first, second), paths in shared.items():
        verb = "is" if len(paths) == 1 else "are"
        names = few([path.name for path in paths])
        text = f"{counted(len(paths), 'image')} of {second} {verb} in {first}, too: {names}"
        if first == "train":
            advice = f"take them out of {second}: AP on images that were learnt is too high"
            findings.append(Finding("problem", text, advice))
        else:
            advice = "take them out of one of the two: test is for images that no choice has seen"
            findings.append(Finding("warning", text, advice))
    return findings

"""Data in one piece, divided into splits, and splits put together into one piece."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from detdistill.data.dataset import DetectionDataset
from detdistill.errors import UserError


@dataclass(frozen=True)
class _Unit:
    """Images that stay together, and how many of them show each class."""

    images: list[int]
    classes: Counter[int]


def divide(
    dataset: DetectionDataset,
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    group: str | None = None,
) -> list[DetectionDataset]:
    """Divides a split into several, each with about its share of the images of every class.

    Images go one after another to the split that lacks them most, rare classes first (iterative
    stratification: Sechidis et al., ECML PKDD 2011), in an order drawn by seed.

    Args:
        dataset: what to divide; its faults stay with the first part.
        shares: the name of each part and its share of the images, 0..1; together 1.
        seed: another seed, another division.
        group: a regular expression. Images in whose path it finds the same text (that of its first
            group, if it has one) stay together; one in whose path it finds nothing stands alone.

    Raises:
        UserError: when a part would be empty, or the expression is none.
    """
    units = _units(dataset, group)
    random.Random(seed).shuffle(units)
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for unit, name in _stratified(units, shares):
        parts[name] += unit.images
    empty = [name for name, images in parts.items() if not images]
    if empty:
        held = f"{len(units)} groups of images" if group else f"{len(units)} images"
        raise UserError(
            f"{dataset.source}: {held} do not suffice for a share of {shares[empty[0]]:g} for "
            f"{empty[0]}; give it a larger share"
        )
    return [
        _part(dataset, name, sorted(images), keep_faults=name == next(iter(shares)))
        for name, images in parts.items()
    ]


def join(train: DetectionDataset, val: DetectionDataset) -> DetectionDataset:
    """Two splits of the same classes as one, called as the first; faults of both stay.

    Images whose ids occur in both are counted from 1.

    Raises:
        UserError: when an image is in both.
    """
    records = [*train.records, *val.records]
    paths = {record.path for record in train.records}
    for record in val.records:
        if record.path in paths:
            raise UserError(
                f"{record.path}: is an image of both {train.split} ({train.source}) and "
                f"{val.split} ({val.source}); take it out of one of them"
            )
    if len({record.image_id for record in records}) < len(records):
        records = [replace(record, image_id=i) for i, record in enumerate(records, 1)]
    return replace(
        train,
        records=records,
        faults=[*train.faults, *val.faults],
        stated_xywh=torch.cat([train.stated_xywh, val.stated_xywh]),
    )


def _units(dataset: DetectionDataset, group: str | None) -> list[_Unit]:
    try:
        pattern = re.compile(group) if group else None
    except re.error as error:
        raise UserError(f"group {group!r} is no regular expression: {error}") from None
    together: dict[object, list[int]] = {}
    for index, record in enumerate(dataset.records):
        found = pattern.search(record.path.as_posix()) if pattern else None
        key = index if found is None else _group_of(found)
        together.setdefault(key, []).append(index)
    if pattern and len(together) == len(dataset):
        raise UserError(
            f"group {group!r} puts no two images of {dataset.source} together; the first is "
            f"{dataset.records[0].path.as_posix()}"
        )
    return [
        _Unit(images, Counter(c for i in images for c in set(dataset.records[i].labels.tolist())))
        for images in together.values()
    ]


def _group_of(found: re.Match[str]) -> str:
    """The first group that took part in the match; all of the match where there is none."""
    return next((group for group in found.groups() if group is not None), found.group())


def _stratified(units: Sequence[_Unit], shares: Mapping[str, float]) -> list[tuple[_Unit, str]]:
    """Each unit with the split it goes to."""
    left: Counter[int] = Counter()  # how many of the waiting images show each class
    for unit in units:
        left.update(unit.classes)
    lacks = {
        name: {c: share * count for c, count in left.items()} for name, share in shares.items()
    }
    images = sum(len(unit.images) for unit in units)
    room = {name: share * images for name, share in shares.items()}
    waiting, placed = list(units), []
    while waiting:
        # Images without boxes are all that is left when no class is.
        rarest = min((c for c in left if left[c]), key=lambda c: (left[c], c), default=-1)
        chosen = [unit for unit in waiting if rarest < 0 or rarest in unit.classes]
        waiting = [unit for unit in waiting if rarest >= 0 and rarest not in unit.classes]
        for unit in sorted(chosen, key=lambda unit: -len(unit.images)):
            name = max(room, key=lambda name: (lacks[name].get(rarest, 0.0), room[name]))
            room[name] -= len(unit.images)
            left.subtract(unit.classes)
            for c, count in unit.classes.items():
                lacks[name][c] -= count
            placed.append((unit, name))
    return placed


def _part(
    dataset: DetectionDataset, name: str, images: list[int], *, keep_faults: bool
) -> DetectionDataset:
    faults = dataset.faults if keep_faults else []
    return replace(dataset.subset(images), split=name, faults=faults)

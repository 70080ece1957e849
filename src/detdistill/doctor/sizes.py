"""Whether the objects, as the recipe shows them, are large enough for the student."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from detdistill.boxes import area, keep_ratio_size
from detdistill.data import DetectionDataset
from detdistill.data.transforms import eval_size
from detdistill.detectors import FPNDetector
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.doctor.finding import Finding, Level
from detdistill.recipe import Recipe
from detdistill.structures import PADDED_TO, Assignment, Batch

FEW_SMALL = 0.05
"""Share of boxes below the finest stride that is usual in good data sets."""

FEW_MISSED, MANY_MISSED = 0.02, 0.2
"""Shares of boxes without an anchor from which on that is a warning, and a problem."""

AMPLE = 1.5
"""Strides that a box should measure, and the least factor that is worth enlarging by."""

LARGEST = 1600
"""Pixels of the short side beyond which tiles are better than a larger image."""


@dataclass(frozen=True)
class Reach:
    """What an assigner made of real batches.

    Attributes:
        boxes: number of ground-truth boxes.
        missed_sides: of those without a positive anchor or point, the square root of the area at
            the size that they were shown at, pixels.
    """

    boxes: int
    missed_sides: tuple[float, ...] = ()

    @property
    def missed(self) -> int:
        """How many got none."""
        return len(self.missed_sides)

    @property
    def share(self) -> float:
        """Of the boxes that got none, 0..1."""
        return self.missed / self.boxes if self.boxes else 0.0


def box_sides(dataset: DetectionDataset, recipe: Recipe) -> Tensor:
    """(N,) square root of each box's area at the recipe's largest size, pixels; crowds left out."""
    short, long = eval_size(recipe)
    sides = []
    for record in dataset.records:
        height, width = keep_ratio_size((record.height, record.width), short, long)
        scale = math.sqrt(height * width / (record.height * record.width))
        sides.append(area(record.boxes_xyxy[~record.crowd]).sqrt() * scale)
    return torch.cat(sides)


@torch.no_grad()
def measure_reach(student: FPNDetector, batches: Iterable[Batch], device: torch.device) -> Reach:
    """What the student's own assigner does with the boxes of real training batches."""
    student.to(device).eval()
    boxes = 0
    missed: list[float] = []
    for batch in batches:
        batch = batch.to(device)
        targets, output = batch.padded_targets(), student(batch)
        if isinstance(student, TwoStageDetector):  # before it draws some of them
            matched = student.rpn.match(output, targets)
        else:
            matched = cast(Assignment, student.assign(output, targets)).matched
        slots = torch.arange(targets.labels.shape[1], device=device)
        taken = torch.stack([torch.isin(slots, rows) for rows in matched])
        boxes += int(targets.present.sum())
        missed += area(targets.boxes).sqrt()[targets.present & ~taken].tolist()
    student.train()
    return Reach(boxes, tuple(missed))


def check_sizes(sides: Tensor, strides: Sequence[int], recipe: Recipe) -> list[Finding]:
    """The sizes of the boxes against the finest level of the pyramid."""
    finest = min(strides)
    small = float((sides < finest).double().mean())
    low, middle, high = (float(sides.quantile(share)) for share in (0.05, 0.5, 0.95))
    text = (
        f"boxes at short side {eval_size(recipe)[0]}: {low:.0f}, {middle:.0f}, {high:.0f} px (5 %, "
        f"half, 95 % are smaller; side of a square of equal area); {small:.1%} are smaller than "
        f"the finest stride, {finest} px"
    )
    if small <= FEW_SMALL:
        return [Finding("ok", text)]
    return [Finding("warning", text, enlarge(sides, AMPLE * finest, recipe))]


def check_reach(reach: Reach, sides: Tensor, student: FPNDetector, recipe: Recipe) -> list[Finding]:
    """Boxes that no anchor or point learns teach the student that they are background."""
    text = (
        f"{reach.missed} of {reach.boxes} boxes of real batches get no positive anchor or point "
        f"from {student.name}'s assigner ({reach.share:.1%})"
    )
    if reach.share <= FEW_MISSED:
        return [Finding("ok", text)]
    level: Level = "problem" if reach.share > MANY_MISSED else "warning"
    lost = float(torch.tensor(reach.missed_sides).quantile(0.9))
    wanted = max(lost, AMPLE * min(student.strides))
    return [Finding(level, text, enlarge(sides, wanted, recipe))]


def enlarge(sides: Tensor, least: float, recipe: Recipe) -> str:
    """The size at which 95 % of the boxes are at least so many pixels, as settings; or tiles."""
    short, long = eval_size(recipe)
    factor = max(AMPLE, least / float(sides.quantile(0.05)))
    wanted = math.ceil(short * factor / PADDED_TO) * PADDED_TO
    if wanted > LARGEST:
        return (
            "cut the images into tiles: enlarged until these boxes can be found they would "
            f"measure {wanted} px and more"
        )
    return (
        f"show the images larger: --set 'resize_short=[{wanted}]' --set "
        f"resize_long={math.ceil(long * wanted / short)}"
    )


def size_numbers(sides: Tensor, reach: Reach, strides: Sequence[int]) -> dict[str, Any]:
    """For the JSON file."""
    shares = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    return {
        "side_quantiles": {str(share): float(sides.quantile(share)) for share in shares},
        "below_finest_stride": float((sides < min(strides)).double().mean()),
        "assigned_boxes": reach.boxes,
        "boxes_without_positive": reach.missed,
    }

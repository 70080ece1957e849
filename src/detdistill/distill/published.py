"""Settings of the released configurations, by the family of the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detdistill.detectors.dense import DenseDetector

BoxLoss = Literal["kl", "giou", "iou"]


@dataclass(frozen=True)
class Published:
    """Settings of CrossKD's released configuration for one family of teachers.

    `quality_weight` None: the quality branch is not distilled. `divide_by`: the positives of the
    teacher's assigner, or the sum of their quality (centerness) targets.
    """

    depth: int
    cls_weight: float
    box_weight: float
    box_loss: BoxLoss
    quality_weight: float | None = None
    divide_by: Literal["positives", "quality"] = "positives"


PUBLISHED = {
    "gfl": Published(depth=3, cls_weight=1.0, box_weight=4.0, box_loss="kl"),
    "retinanet": Published(depth=3, cls_weight=1.0, box_weight=1.0, box_loss="giou"),
    "atss": Published(depth=3, cls_weight=1.0, box_weight=1.0, box_loss="giou", quality_weight=1.0),
    "fcos": Published(
        depth=2, cls_weight=0.4, box_weight=0.75, box_loss="iou", divide_by="quality"
    ),
}
# A family without a published setting takes the one with its box encoding.
LIKE = {
    "distribution": "gfl",
    "deltas": "retinanet",
    "distances": "fcos",
    "points": "retinanet",
}


def published_for(teacher: DenseDetector) -> Published:
    """Settings of the teacher's family, or of the one with its box encoding."""
    return PUBLISHED[teacher.family if teacher.family in PUBLISHED else LIKE[teacher.box_coding]]


# PKD as CrossKD's authors combine the two.
PKD_WEIGHTS = {"retinanet": 2.0, "fcos": 2.0, "atss": 1.0, "gfl": 6.0}
OTHER_PKD_WEIGHT = 2.0  # our choice for families without a published value: the commonest

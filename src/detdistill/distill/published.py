"""Settings of the released configurations, by the family of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import same_bins, unequal_bins
from detdistill.errors import UserError
from detdistill.registry import check_choice

BoxLoss = Literal["kl", "giou", "iou"]
Divisor = Literal["positives", "quality"]


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
    divide_by: Divisor = "positives"


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

# PKD as CrossKD's authors combine the two; RepPoints, with which they do not, as PKD's own authors.
PKD_WEIGHTS = {
    "retinanet": 2.0,
    "fcos": 2.0,
    "atss": 1.0,
    "gfl": 6.0,
    "faster_rcnn": 6.0,
    "reppoints": 6.0,
}
OTHER_PKD_WEIGHT = 2.0  # our choice for families without a published value, as for most dense ones


def published_for(teacher: DenseDetector) -> Published:
    """Settings of the teacher's family, or of the one with its box encoding.

    Raises:
        UserError: for an encoding of neither.
    """
    if teacher.family in PUBLISHED:
        return PUBLISHED[teacher.family]
    check_choice(f"{teacher.name}: box_coding", teacher.box_coding, LIKE)
    return PUBLISHED[LIKE[teacher.box_coding]]


def settle(
    method: str,
    teacher: DenseDetector,
    predictor: DenseDetector,
    wanted: Mapping[str, bool | None],
    given_weights: Mapping[str, float | None],
    box_loss: BoxLoss | None,
) -> tuple[dict[str, float], BoxLoss, Divisor]:
    """Weights of the terms that there are, the box loss and what divides; None is as published.

    Args:
        method: its name, for messages.
        teacher: whose predictions are the target.
        predictor: whose head makes the predictions that learn: the teacher or the student.
        wanted: whether "cls", "box" and "quality" are compared.
        given_weights: factors of these terms.
        box_loss: of the boxes.

    Raises:
        UserError: when one of the two detectors lacks what a setting needs.
    """
    published = _comparable(method, teacher, predictor, box_loss)
    defaults = {
        "cls": published.cls_weight,
        "box": published.box_weight,
        "quality": published.quality_weight or 1.0,
    }
    given = {term: weight for term, weight in given_weights.items() if weight is not None}
    quality = _wants_quality(method, published, teacher, predictor, wanted)
    terms = {**wanted, "quality": quality}
    weights = {t: weight for t, weight in {**defaults, **given}.items() if terms[t]}
    return weights, box_loss or published.box_loss, published.divide_by


def _comparable(
    method: str, teacher: DenseDetector, predictor: DenseDetector, box_loss: BoxLoss | None
) -> Published:
    """What is published for the teacher, or for decoded boxes where distributions do not fit."""
    published = published_for(teacher)
    if same_bins(teacher, predictor):
        return published
    if box_loss == "kl":
        raise unequal_bins(predictor, teacher, f"{method}: box_loss 'kl'", "use box_loss 'giou'")
    return PUBLISHED[LIKE["deltas"]] if published.box_loss == "kl" else published


def _wants_quality(
    method: str,
    published: Published,
    teacher: DenseDetector,
    predictor: DenseDetector,
    wanted: Mapping[str, bool | None],
) -> bool:
    """As the user says; else as published, where both sides have the branch."""
    without = [m.name for m in (teacher, predictor) if m.quality_tower is None]
    if wanted["quality"] and without:
        raise UserError(
            f"{method}: quality=True, but {without[0]} has no quality branch; leave it out"
        )
    if wanted["quality"] is not None:
        return wanted["quality"]
    if published.quality_weight is None or without:
        return False
    return bool(wanted[str(teacher.quality_tower)])

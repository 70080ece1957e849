"""Rank disagreement: whether both models order the candidates of an object alike.

Rank Mimicking (Li et al., arXiv 2112.04840) argues from it: where the student's order differs, the
box that survives comes from a worse anchor. As far as its formulas are known (reconstructed), the
candidates of an object are the anchors that the teacher's assigner gives to it, and their score is
that of the object's class. The box that survives is the one with the best final score, into which a
quality branch (centerness) enters, too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detdistill.analysis.examples import Foremost
from detdistill.analysis.pair import Pair, Sample
from detdistill.analysis.statistics import kendall_tau
from detdistill.boxes import centers_xy, elementwise_iou

SMALL, LARGE = 32**2, 96**2  # COCO's limits, pixels squared of the image file
SIZES = ("small", "medium", "large")
BINS = 20
EASY = 0.75  # IoU of the teacher's box with the object from which on it is easy
DRAWN = 6  # candidates from which on an object may become an example


@dataclass(frozen=True)
class Row:
    """One object's numbers.

    Attributes:
        size: 0 small, 1 medium, 2 large.
        tau: Kendall's, -1..1; NaN where a model gives all candidates one score.
        differs: whether the best candidate differs.
        iou_teacher: of the teacher's box with the object, at the teacher's best candidate.
        iou_own, iou_teachers, iou_best: of the student's box with the object, at the student's best
            candidate, at the teacher's, and at the candidate with the highest IoU.
    """

    size: int
    tau: float
    differs: bool
    iou_teacher: float
    iou_own: float
    iou_teachers: float
    iou_best: float


@dataclass(frozen=True)
class RankExample:
    """One object with its n candidates.

    Attributes:
        index: of the image in the data set.
        image: (3, h, w) uint8.
        box_xyxy: (4,) of the object.
        points: (n, 2) their centres.
        teacher, student: (n,) their class scores, 0..1.
        finals: (2, n) their final scores, teacher's and student's.
        boxes: (2, n, 4) what they predict there, xyxy.
        tau: Kendall's of the two class scores.
    """

    index: int
    image: Tensor
    box_xyxy: Tensor
    points: Tensor
    teacher: Tensor
    student: Tensor
    finals: Tensor
    boxes: Tensor
    tau: float

    @property
    def best(self) -> tuple[int, int]:
        """The candidate whose box survives, the teacher's and the student's."""
        teacher, student = self.finals.argmax(1).tolist()
        return teacher, student

    def row(self, area: float) -> Row:
        """The numbers of this object of `area` pixels squared of the image file."""
        iou_teacher, iou = elementwise_iou(self.boxes, self.box_xyxy.expand_as(self.boxes))
        teachers, own = self.best
        return Row(
            size_of(area),
            self.tau,
            best_differs(*self.finals),
            float(iou_teacher[teachers]),
            float(iou[own]),
            float(iou[teachers]),
            float(iou.max()),
        )


def candidates_of(matched: Tensor, count: int) -> list[Tensor]:
    """Of each of `count` objects the rows of (P,) `matched` that hold its number."""
    return [(matched == number).nonzero()[:, 0] for number in range(count)]


def best_differs(teacher: Tensor, student: Tensor) -> bool:
    """Whether the teacher's best of n candidates is not the student's; ties do not count."""
    return bool(student[teacher.argmax()] < student.max())


def size_of(area: float) -> int:
    """0 small, 1 medium, 2 large."""
    return int(area >= SMALL) + int(area >= LARGE)


class Ranks:
    """Rank disagreement over a stream of images; a few numbers per object are kept."""

    def __init__(self, pair: Pair, examples: int) -> None:
        """Nothing seen yet."""
        self.pair, self.objects = pair, 0
        self.rows: list[Row] = []
        self.examples = Foremost[RankExample](examples)

    @staticmethod
    def left_out(pair: Pair) -> str | None:
        """Why the pair cannot be measured so; None where it can."""
        if not pair.dense or not pair.same_anchors:
            return (
                "Ranks are compared over the same candidates, but these two models do not predict "
                "at the same anchors or points."
            )
        return None

    def add(self, sample: Sample) -> None:
        """Adds the objects of one image."""
        model = self.pair.dense_models[0]
        matched = model.assign(sample.teacher.dense, sample.targets).matched[0]
        self.objects += len(sample.areas)
        candidates = _Candidates(sample, self.pair)
        for number, rows in enumerate(candidates_of(matched, len(sample.areas))):
            if len(rows) > 1:
                self._add_object(candidates.of_object(number, rows), float(sample.areas[number]))

    def _add_object(self, found: RankExample, area: float) -> None:
        self.rows.append(found.row(area))
        if len(found.points) >= DRAWN and not math.isnan(found.tau):
            self.examples.offer(1 - found.tau, lambda: found)

    def numbers(self) -> dict[str, Any]:
        """For the JSON file."""
        taus = [row.tau for row in self.rows if not math.isnan(row.tau)]
        histogram = torch.tensor(taus, dtype=torch.float64).histc(BINS, -1, 1)
        return {
            "objects": self.objects,
            "objects_with_candidates": len(self.rows),
            "all": summarise(self.rows),
            "sizes": {
                name: summarise([row for row in self.rows if row.size == size])
                for size, name in enumerate(SIZES)
            },
            "easy": summarise([row for row in self.rows if row.iou_teacher >= EASY]),
            "hard": summarise([row for row in self.rows if row.iou_teacher < EASY]),
            "histogram": histogram.long().tolist(),
        }


class _Candidates:
    """Scores and boxes of one image over all anchors, from which objects take their rows."""

    def __init__(self, sample: Sample, pair: Pair) -> None:
        self.sample, self.models = sample, pair.dense_models
        views = (sample.teacher.dense, sample.student.dense)
        self.flat = [view.predictions.flatten() for view in views]
        self.anchors = self.models[1].flat_anchors(views[1].anchors)

    def of_object(self, number: int, rows: Tensor) -> RankExample:
        label = self.sample.targets.labels[0, number]
        scores = [flat.logits[0, rows, label].sigmoid() for flat in self.flat]
        finals = [
            score if flat.quality is None else model.with_quality(score, flat.quality[0, rows])
            for model, flat, score in zip(self.models, self.flat, scores, strict=True)
        ]
        boxes = [
            model.decode(flat.boxes[0, rows], self.anchors[rows])
            for model, flat in zip(self.models, self.flat, strict=True)
        ]
        teacher, student = (score.cpu() for score in scores)
        return RankExample(
            self.sample.index,
            self.sample.image,
            self.sample.boxes_xyxy[number].cpu(),
            centers_xy(self.anchors[rows]).cpu(),
            teacher,
            student,
            torch.stack(finals).cpu(),
            torch.stack(boxes).cpu(),
            kendall_tau(teacher, student),
        )


def summarise(rows: list[Row]) -> dict[str, float | int | None]:
    """Means over objects; None where there are none."""
    taus = [row.tau for row in rows if not math.isnan(row.tau)]
    return {
        "objects": len(rows),
        "tau": _mean(taus),
        "tau_median": statistics.median(taus) if taus else None,
        "best_differs_share": _mean([float(row.differs) for row in rows]),
        "teachers_iou": _mean([row.iou_teacher for row in rows]),
        "iou_at_own_best": _mean([row.iou_own for row in rows]),
        "iou_at_teachers_best": _mean([row.iou_teachers for row in rows]),
        "iou_at_best": _mean([row.iou_best for row in rows]),
    }


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None

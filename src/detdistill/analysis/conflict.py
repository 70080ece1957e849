"""Target conflict: where the labels ask one score of the student and the teacher another.

CrossKD (Wang et al., arXiv 2306.11369) argues from it: predictions that mimic the teacher's are
pulled two ways, and its study counts the places where |label - teacher's score| passes 0.5. How
it turns the classes of a place into one number is not known to us: here it is the class on which
both differ most (reconstructed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detdistill.analysis.examples import Foremost, HeatMap, MapExample, heat_map, map_example
from detdistill.analysis.pair import Pair, Sample, best_of_cell, level_scores, split_levels
from detdistill.boxes import centers_xy
from detdistill.structures import DenseOutput

THRESHOLD = 0.5
BINS = 100
GROUPS = ("all", "inside_objects", "positives")
OF_CONFLICTS = (
    *("teacher_higher_share", "nearer_to_teacher_share"),
    *("student_to_label", "student_to_teacher"),
)
MAPS = ("labels and teacher", "student and labels", "student and teacher")
TEACHER, STUDENT = 0, 1


@dataclass(frozen=True)
class Gaps:
    """Per place, on the class on which label and teacher differ most; each (n,).

    Attributes:
        gap: |label - teacher's score|, 0..1.
        teacher_higher: whether the teacher's score is the higher one.
        to_label, to_teacher: the student's distance to each, 0..1.
    """

    gap: Tensor
    teacher_higher: Tensor
    to_label: Tensor
    to_teacher: Tensor


def measure_gaps(label: Tensor, teacher: Tensor, student: Tensor) -> Gaps:
    """Three (n, K) tables of scores, 0..1: what the labels ask, what both models say."""
    gap, worst = (teacher - label).abs().max(1, keepdim=True)
    asked, taught, said = (scores.gather(1, worst)[:, 0] for scores in (label, teacher, student))
    return Gaps(gap[:, 0], taught > asked, (said - asked).abs(), (said - taught).abs())


def label_scores(labels: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """(n, K) that the labels ask: (n,) `target` in the class of (n,) `labels`, 0 elsewhere.

    A label of K (background) asks for 0 in every class.
    """
    asked = target.new_zeros(len(labels), num_classes)
    rows = (labels < num_classes).nonzero()[:, 0]
    asked[rows, labels[rows]] = target[rows]
    return asked


def inside_any(points: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """(n,) bool: whether each of (n, 2) points lies in one of (N, 4) boxes."""
    low, high = boxes_xyxy[None, :, :2], boxes_xyxy[None, :, 2:]
    return ((points[:, None] > low) & (points[:, None] < high)).all(-1).any(-1)


class Tally:
    """Sums over the conflicts per level and group, and a histogram of the gaps per group."""

    def __init__(self, levels: int) -> None:
        """All zero."""
        self.sums = torch.zeros(levels, len(GROUPS), 2 + len(OF_CONFLICTS), dtype=torch.float64)
        self.histogram = torch.zeros(len(GROUPS), BINS, dtype=torch.int64)

    def add(self, level: int, gaps: Gaps, groups: Tensor) -> int:
        """Files the n places of a level under (groups, n) bool; returns how many conflict."""
        wrong = gaps.gap > THRESHOLD
        columns = torch.stack(
            (
                torch.ones_like(gaps.gap),
                wrong,
                wrong & gaps.teacher_higher,
                wrong & (gaps.to_teacher < gaps.to_label),
                wrong * gaps.to_label,
                wrong * gaps.to_teacher,
            ),
            1,
        ).double()
        self.sums[level] += (groups.double() @ columns).cpu()
        bins = (gaps.gap * BINS).long().clamp(max=BINS - 1)
        for row, members in zip(self.histogram, groups, strict=True):
            row += bins[members].cpu().bincount(minlength=BINS)
        return int((groups[0] & wrong).sum())

    def numbers(self, level: int | None = None) -> dict[str, dict[str, float | int | None]]:
        """Shares and means by group, of one level or of all."""
        sums = self.sums.sum(0) if level is None else self.sums[level]
        return {name: _shares(row.tolist()) for name, row in zip(GROUPS, sums, strict=True)}


def _shares(sums: list[float]) -> dict[str, float | int | None]:
    places, conflicts, *rest = sums
    of_conflicts = {
        name: value / conflicts if conflicts else None
        for name, value in zip(OF_CONFLICTS, rest, strict=True)
    }
    share = conflicts / places if places else None
    return {"places": int(places), "conflicts": int(conflicts), "share": share, **of_conflicts}


class Conflict:
    """Target conflict over a stream of images.

    The labels are those of the student's assigner and loss: 1 for the class of a positive, with GFL
    the IoU of the student's own box. Places are anchors where both heads have the same; else they
    are the cells of a level, with the best of a cell's anchors on each side.
    """

    def __init__(self, pair: Pair, examples: int) -> None:
        """Nothing seen yet."""
        self.pair, self.cells = pair, not pair.same_anchors
        self.tally = Tally(len(pair.strides))
        teacher, student = pair.dense_models
        # With unlike assigners: what the teacher contradicts even in the labels it was trained on.
        unlike = teacher.assignment_key != student.assignment_key
        self.own = Tally(len(pair.strides)) if unlike else None
        self.examples = Foremost[MapExample](examples)

    @staticmethod
    def left_out(pair: Pair) -> str | None:
        """Why the pair cannot be measured so; None where it can."""
        if not pair.dense:
            return (
                "Labels and scores are compared place by place, and that needs a dense head on "
                "both sides."
            )
        return None if pair.strides else "The two pyramids have no level of the same stride."

    def add(self, sample: Sample) -> None:
        """Counts one image."""
        conflicts, maps = 0, []
        for level, (gaps, groups) in enumerate(self._levels(sample, STUDENT)):
            conflicts += self.tally.add(level, gaps, groups)
            maps.append((gaps, groups[0]))
        if self.own is not None:
            for level, (gaps, groups) in enumerate(self._levels(sample, TEACHER)):
                self.own.add(level, gaps, groups)
        self.examples.offer(
            conflicts, lambda: map_example(sample, self._heat_maps(sample, maps), conflicts)
        )

    def _levels(self, sample: Sample, role: int) -> list[tuple[Gaps, Tensor]]:
        """Per common level the gaps and (groups, n) bool, with the labels of one model's loss."""
        model, output = self.pair.dense_models[role], _outputs(sample)[role]
        asked = model.assign(output, sample.targets)
        target = model.class_targets(output, asked)
        values = (asked.labels, target, asked.weights > 0, asked.positive)
        pieces = [split_levels(value[0], output) for value in values]
        return [
            self._level(sample, levels, role, [piece[levels[role]] for piece in pieces])
            for levels in self.pair.levels
        ]

    def _level(
        self, sample: Sample, levels: tuple[int, int], role: int, labelled: list[Tensor]
    ) -> tuple[Gaps, Tensor]:
        labels, target, counted, positive = labelled
        outputs = _outputs(sample)
        asked = label_scores(labels, target, self.pair.student.num_classes)
        teacher, student = (
            level_scores(output, level) for output, level in zip(outputs, levels, strict=True)
        )
        centres = centers_xy(outputs[role].anchors[levels[role]])
        inside = inside_any(centres, sample.boxes_xyxy)
        groups = torch.stack((counted, counted & inside, positive), 1)
        if self.cells:
            each = [output.predictions.logits[0].shape[1] for output in outputs]
            asked, groups = (best_of_cell(v, each[role]) for v in (asked, groups.byte()))
            teacher = best_of_cell(teacher, each[TEACHER])
            student = best_of_cell(student, each[STUDENT])
        return measure_gaps(asked, teacher, student), groups.bool().T

    def _heat_maps(
        self, sample: Sample, levels: list[tuple[Gaps, Tensor]]
    ) -> dict[str, list[HeatMap]]:
        maps: dict[str, list[HeatMap]] = {name: [] for name in MAPS}
        output = sample.student.dense
        for (gaps, counted), (_, level) in zip(levels, self.pair.levels, strict=True):
            for name, values in zip(MAPS, (gaps.gap, gaps.to_label, gaps.to_teacher), strict=True):
                maps[name].append(heat_map(values * counted, output, level))
        return maps

    def numbers(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "threshold": THRESHOLD,
            "places": "cells" if self.cells else "anchors",
            **self.tally.numbers(),
            "levels": [
                {"stride": stride, **self.tally.numbers(level)}
                for level, stride in enumerate(self.pair.strides)
            ],
            "histogram": dict(zip(GROUPS, self.tally.histogram.tolist(), strict=True)),
            "teacher_against_its_own_labels": None if self.own is None else self.own.numbers(),
        }


def _outputs(sample: Sample) -> tuple[DenseOutput, DenseOutput]:
    return sample.teacher.dense, sample.student.dense

"""Where features differ and where predictions do: whether these are the same places.

Prediction-guided Feature Imitation (Li et al., arXiv 2112.04840) argues from it: if they are not,
imitating all places alike is wasted. As far as its formulas are known (reconstructed): P is the
squared difference of the scores, averaged over anchors and classes, and F that of the pyramid's
features, averaged over channels.

A trained adapter between unequal widths is no part of a finished student, so F exists for equal
widths only. For unequal ones a place counts as different by its relations: how similar it is to
other places of the same map, in the teacher's features and in the student's (one row of each of
the two kernels that linear CKA compares). Both kinds are never mixed in one analysis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.analysis.examples import Foremost, HeatMap, MapExample, heat_map, map_example
from detdistill.analysis.pair import Pair, Sample, best_of_cell, evenly, level_scores
from detdistill.analysis.statistics import Moments, average_ranks, overlap_at_top, spearman

TOP = 0.1
KEPT = 20_000  # places per level for what needs all values at once
REFERENCES = 256  # places of a map that each of its places is related to
FEWEST = 4  # places of a map below which relations mean nothing
CELLS = 12  # of the table of ranks, each way
MAPS = ("features", "predictions", "product")


def prediction_difference(teacher: Tensor, student: Tensor) -> Tensor:
    """P: two (n, K) tables of scores to (n,), the mean squared difference over the classes."""
    return (teacher - student).square().mean(1)


def feature_difference(teacher: Tensor, student: Tensor) -> Tensor:
    """F: two (n, C) tables of features to (n,), the mean squared difference over the channels."""
    return (teacher - student).square().mean(1)


def relational_difference(teacher: Tensor, student: Tensor, references: Tensor) -> Tensor:
    """(n, C1) and (n, C2) features to (n,): 0 for equal relations, 1 for unrelated ones, up to 2.

    Features are centred over the places; a place's relations are its inner products with the
    reference places, and what is returned is 1 less the correlation of both models' relations.
    """
    rows = []
    for features in (teacher, student):
        centred = features.double() - features.double().mean(0)
        relations = centred @ centred[references].T
        relations = relations - relations.mean(1, keepdim=True)
        rows.append(F.normalize(relations, dim=1, eps=1e-12))
    return (1 - (rows[0] * rows[1]).sum(1)).float()


class _Level:
    """What is known of one common level."""

    def __init__(self) -> None:
        self.moments, self.sums = Moments(), torch.zeros(2, dtype=torch.float64)
        self._kept: list[Tensor] = []

    def add(self, features: Tensor, predictions: Tensor, kept: Tensor) -> None:
        values = torch.stack((features, predictions)).cpu()
        self.moments.add(*values)
        self.sums += values.double().sum(1)
        self._kept.append(values[:, kept])

    @property
    def kept(self) -> Tensor:
        """(2, n) features and predictions of the places that were kept."""
        return torch.cat(self._kept, 1) if self._kept else torch.zeros(2, 0)

    def numbers(self) -> dict[str, Any]:
        count, kept = self.moments.count, self.kept
        feature, prediction = (self.sums / max(1, count)).tolist()
        return {
            "places": count,
            "feature_difference": feature if count else None,
            "prediction_difference": prediction if count else None,
            "pearson": _defined(self.moments.correlation()),
            "spearman": _defined(spearman(kept[0], kept[1])),
            "overlap_of_top_tenth": _defined(overlap_at_top(kept[0], kept[1], TOP)),
        }


class Imitation:
    """Feature against prediction differences over a stream of images, per common level.

    Pearson's correlation is over all places of all images; rank correlation and overlap, which
    need all values at once, over an even draw of at most `KEPT` places per level.
    """

    def __init__(self, pair: Pair, images: int, examples: int) -> None:
        """Nothing seen yet; `images` are to come."""
        self.pair, self.per_image = pair, max(1, KEPT // max(1, images))
        self.relational = pair.teacher.pyramid_channels != pair.student.pyramid_channels
        self.levels = [_Level() for _ in pair.strides]
        self.examples = Foremost[MapExample](examples)

    @staticmethod
    def left_out(pair: Pair) -> str | None:
        """Why the pair cannot be measured so; None where it can."""
        if not pair.dense:
            return (
                "Predictions are compared place by place, and that needs a dense head on both "
                "sides."
            )
        return None if pair.strides else "The two pyramids have no level of the same stride."

    def add(self, sample: Sample) -> None:
        """Adds the places of one image."""
        found = [self._differences(sample, *levels) for levels in self.pair.levels]
        for level, differences in zip(self.levels, found, strict=True):
            if differences is not None:
                kept = evenly(len(differences[0]), self.per_image, sample.index)
                level.add(*differences, kept)
        total = sum(float(pair[1].sum()) for pair in found if pair is not None)
        self.examples.offer(
            total, lambda: map_example(sample, self._heat_maps(sample, found), total)
        )

    def _differences(
        self, sample: Sample, teacher_level: int, student_level: int
    ) -> tuple[Tensor, Tensor] | None:
        """F and P of a level, each (H*W,); None where it has too few places."""
        teacher, student = (
            view.pyramid[level][0].flatten(1).T.float()
            for view, level in ((sample.teacher, teacher_level), (sample.student, student_level))
        )
        places = len(teacher)
        if not self.relational:
            features = feature_difference(teacher, student)
        elif places >= FEWEST:
            references = evenly(places, REFERENCES, sample.index).to(teacher.device)
            features = relational_difference(teacher, student, references)
        else:
            return None
        scores = [
            level_scores(sample.teacher.dense, teacher_level),
            level_scores(sample.student.dense, student_level),
        ]
        if self.pair.same_anchors:
            scores = [values.reshape(places, -1) for values in scores]
        else:
            scores = [best_of_cell(values, len(values) // places) for values in scores]
        return features, prediction_difference(*scores)

    def _heat_maps(
        self, sample: Sample, found: list[tuple[Tensor, Tensor] | None]
    ) -> dict[str, list[HeatMap]]:
        maps: dict[str, list[HeatMap]] = {name: [] for name in MAPS}
        output = sample.student.dense
        for differences, (_, level) in zip(found, self.pair.levels, strict=True):
            if differences is None:
                continue
            features, predictions = differences
            for name, values in zip(
                MAPS, (features, predictions, features * predictions), strict=True
            ):
                maps[name].append(heat_map(values, output, level))
        return maps

    @property
    def main_stride(self) -> int:
        """Of the level that holds most of the prediction difference."""
        totals = [float(level.sums[1]) for level in self.levels]
        return self.pair.strides[totals.index(max(totals))]

    def numbers(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "feature_measure": "relational" if self.relational else "mean_squared",
            "main_stride": self.main_stride,
            "levels": [
                {"stride": stride, **level.numbers()}
                for stride, level in zip(self.pair.strides, self.levels, strict=True)
            ],
        }

    def rank_table(self) -> Tensor:
        """(CELLS, CELLS) of the main level: the share of places by rank of P (rows) and F."""
        kept = self.levels[self.pair.strides.index(self.main_stride)].kept
        return rank_table(kept[0], kept[1])


def rank_table(features: Tensor, predictions: Tensor) -> Tensor:
    """Two (n,) lists to (CELLS, CELLS): the share of places by rank of the second and the first.

    Evenly filled where both have nothing to do with each other: every cell 1 / CELLS**2.
    """
    count = max(1, len(features))
    cells = [
        ((average_ranks(values) - 1) * CELLS / count).long() for values in (predictions, features)
    ]
    flat = (cells[0] * CELLS + cells[1]).bincount(minlength=CELLS**2)
    return flat.reshape(CELLS, CELLS).double() / count


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value

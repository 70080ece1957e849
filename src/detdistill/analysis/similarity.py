"""How alike the features of both models are, from the backbone to the ends of the heads.

HEAD (Wang et al., arXiv 2207.05345) argues from it: heads of unlike kinds make unlike features of
equal inputs. Measured is linear CKA over positions drawn from each map, or over boxes that both
heads look at; it asks for the same positions, not for equal widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detdistill.analysis.heads import assistant_places, rows_on_boxes
from detdistill.analysis.pair import Pair, Place, Sample, evenly, places_of
from detdistill.analysis.statistics import LinearCKA
from detdistill.distill.assistants import DenseAssistant, RoIAssistant

POSITIONS = 128  # per map and image
ON_BOXES = "boxes"


class Similarity:
    """CKA of every place that both models have, over a stream of images.

    An assistant, where one is given, is compared with the teacher's head beside the student's own.
    """

    def __init__(self, pair: Pair, assistant: DenseAssistant | RoIAssistant | None = None) -> None:
        """Nothing seen yet."""
        self.pair, self.assistant = pair, assistant
        self.meters: dict[Place, LinearCKA] = {}
        depths = [getattr(model, "tower_depth", 0) for model in (pair.teacher, pair.student)]
        # The ends of towers of one depth are their last blocks, which are compared anyway.
        self.ends = depths[0] != depths[1]

    def add(self, sample: Sample) -> None:
        """Adds the positions of one image."""
        teacher, student = (
            places_of(view, ends=self.ends) for view in (sample.teacher, sample.student)
        )
        self.compare(teacher, student, sample.index)
        boxes_assistant = None
        if isinstance(self.assistant, DenseAssistant):
            self.compare(*assistant_places(self.assistant, sample), sample.index)
        else:
            boxes_assistant = self.assistant
        rows = rows_on_boxes(self.pair, sample, boxes_assistant)
        for stage, (taught, found) in rows.items():
            self.compare_rows((stage, ON_BOXES), taught, found)

    def compare(
        self, teacher: Mapping[Place, Tensor], student: Mapping[Place, Tensor], seed: int
    ) -> None:
        """Adds maps (1, C, H, W) by place; what only one side has is left out."""
        for place in student:
            if place in teacher:
                rows = [side[place][0].flatten(1).T for side in (teacher, student)]
                kept = evenly(len(rows[0]), POSITIONS, seed).to(rows[0].device)
                self.compare_rows(place, rows[0][kept], rows[1][kept])

    def compare_rows(self, place: Place, teacher: Tensor, student: Tensor) -> None:
        """Adds features (n, C1) and (n, C2) of the same n inputs."""
        self.meters.setdefault(place, LinearCKA()).add(teacher, student)

    def numbers(self) -> dict[str, Any]:
        """For the JSON file: CKA by stage and stride, None where there are too few positions."""
        stages: dict[str, dict[str, float | None]] = {}
        for (stage, column), meter in self.meters.items():
            value = meter.value()
            stages.setdefault(stage, {})[column] = None if math.isnan(value) else value
        return {"positions_per_map": POSITIONS, "stages": stages}

"""How alike the features of both models are, from the backbone to the ends of the towers.

HEAD (Wang et al., arXiv 2207.05345) argues from it: heads of unlike kinds make unlike features of
equal inputs, so a student's head cannot simply imitate another kind's. Measured is linear CKA over
positions drawn from each map, which asks for equal positions, not for equal widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detdistill.analysis.pair import Pair, Sample, View, evenly
from detdistill.analysis.statistics import LinearCKA

POSITIONS = 128  # per map and image
END = " end"
Place = tuple[str, int]  # the name of a stage, the stride of its map


def places_of(view: View) -> dict[Place, Tensor]:
    """All maps (1, C, H, W) of one model: "backbone", "pyramid", "cls 1".."cls 4", "cls end"..."""
    maps: dict[Place, Tensor] = {("backbone", s): level for s, level in view.backbone.items()}
    strides = view.pyramid.strides
    maps |= {("pyramid", s): level for s, level in zip(strides, view.pyramid, strict=True)}
    towers = {} if view.output is None else view.output.towers
    for branch, levels in towers.items():
        for stride, depths in zip(strides, levels, strict=True):
            maps |= {(f"{branch} {d}", stride): level for d, level in enumerate(depths) if d}
            maps[f"{branch}{END}", stride] = depths[-1]
    return maps


class Similarity:
    """CKA of every place that both models have, over a stream of images."""

    def __init__(self, pair: Pair) -> None:
        """Nothing seen yet."""
        self.meters: dict[Place, LinearCKA] = {}
        depths = [getattr(model, "tower_depth", 0) for model in (pair.teacher, pair.student)]
        self.ends = depths[0] != depths[1]  # else they are the last blocks

    def add(self, sample: Sample) -> None:
        """Adds the positions of one image."""
        self.compare(places_of(sample.teacher), places_of(sample.student), sample.index)

    def compare(
        self, teacher: Mapping[Place, Tensor], student: Mapping[Place, Tensor], seed: int
    ) -> None:
        """Adds maps (1, C, H, W) by place; what only one side has is left out."""
        for place in student:
            if place not in teacher or (place[0].endswith(END) and not self.ends):
                continue
            rows = [side[place][0].flatten(1).T for side in (teacher, student)]
            kept = evenly(len(rows[0]), POSITIONS, seed).to(rows[0].device)
            self.meters.setdefault(place, LinearCKA()).add(*(r[kept] for r in rows))

    def numbers(self) -> dict[str, Any]:
        """For the JSON file: CKA by stage and stride, None where there are too few positions."""
        stages: dict[str, dict[str, float | None]] = {}
        for (stage, stride), meter in self.meters.items():
            value = meter.value()
            stages.setdefault(stage, {})[str(stride)] = None if math.isnan(value) else value
        return {"positions_per_map": POSITIONS, "stages": stages}

"""Feature imitation: the student's maps copy the teacher's (FitNets, Romero et al., 1412.6550)."""

from __future__ import annotations

import copy
from typing import Literal, cast

import torch
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import (
    channel_adapter,
    check_same_classes,
    match_levels,
    mean_square,
    projection,
    require_dense,
    require_own_head,
    tower_maps,
)
from detdistill.distill.method import METHODS, Method, Step
from detdistill.distill.pkd import pattern_difference
from detdistill.errors import UserError
from detdistill.registry import check_choice
from detdistill.structures import DenseOutput


@METHODS.register("feature")
class FeatureImitation(Method):
    """Difference between the maps of student and teacher, summed over levels and towers.

    Term: `feature/map`. FitNet as HEAD (arXiv 2207.05345) compares with, which is also what HEAD
    becomes for equal detectors, is `FeatureImitation(adapter="per_level", transfer_head=True)`.

    Args:
        weight: factor of `feature/map`.
        at: the pyramid ("neck") or a tower: "cls", "box" or, for both, "towers".
        depth: tower blocks before the maps, 0 (the pyramid) to the tower's depth; None takes the
            end of each tower.
        difference: mean squared error, "square", or PKD's of standardised channels, "pattern",
            which is what CrossKD (arXiv 2306.11369) compares with at each place.
        adapter: "auto" is one 1x1 convolution for all levels of a place, and only where widths
            differ; "per_level" one for each level in any case.
        transfer_head: the student's head starts with the teacher's weights.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        at: Literal["neck", "cls", "box", "towers"] = "neck",
        depth: int | None = None,
        difference: Literal["square", "pattern"] = "square",
        adapter: Literal["auto", "per_level"] = "auto",
        transfer_head: bool = False,
    ) -> None:
        """The weight is that of HEAD's comparison."""
        super().__init__()
        check_choice("feature: at", at, ("neck", "cls", "box", "towers"))
        check_choice("feature: difference", difference, ("square", "pattern"))
        check_choice("feature: adapter", adapter, ("auto", "per_level"))
        if at == "neck" and depth is not None:
            raise UserError(f"feature: depth is {depth}, but the neck has none; set at, e.g. 'cls'")
        self.weights = {"map": weight}
        self.at, self.depth = at, depth
        self.places = ("cls", "box") if at == "towers" else (at,)
        self.difference = pattern_difference if difference == "pattern" else mean_square
        self.per_level, self.transfer_head = adapter == "per_level", transfer_head
        self.teacher_stage = "pyramid" if at == "neck" else "head"

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Matches levels by stride, builds adapters, and copies the head where wanted."""
        assert teacher is not None
        self.levels = match_levels(student.strides, teacher.strides, "feature")
        self.depths = self._depth_in(student, "student"), self._depth_in(teacher, "teacher")
        widths = self._width_of(student, self.depths[0]), self._width_of(teacher, self.depths[1])
        make, count = (projection, len(self.levels)) if self.per_level else (channel_adapter, 1)
        self.adapters = nn.ModuleList(make(*widths) for _ in range(count * len(self.places)))
        if self.transfer_head:
            check_same_classes(student, teacher, "feature: transfer_head")
            copy_head(student, teacher)

    def _depth_in(self, model: FPNDetector, role: str) -> int:
        """Of the maps in a detector's tower; 0 for the pyramid."""
        if self.at == "neck":
            return 0
        dense = require_dense(model, f"feature at {self.at!r}", role)
        deepest = dense.tower_depth
        if self.depth is None:
            return deepest
        if not 0 <= self.depth <= deepest:
            raise UserError(
                f"feature: depth is {self.depth}, but the towers of {dense.name} have {deepest} "
                f"blocks; choose 0 to {deepest}"
            )
        return self.depth

    def _width_of(self, model: FPNDetector, depth: int) -> int:
        if self.at == "neck":
            return model.pyramid_channels
        return cast(DenseDetector, model).tower_channels_at(depth)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw term `map`."""
        assert step.teacher is not None
        depths, losses = self.depths, []
        each = len(self.adapters) // len(self.places)
        for place, branch in enumerate(self.places):
            found = _maps(step.student, branch, depths[0])
            wanted = _maps(step.teacher, branch, depths[1])
            for i, (level, target) in enumerate(zip(self.levels, wanted, strict=True)):
                adapter = self.adapters[place * each + i % each]
                losses.append(self.difference(adapter(found[level]), target))
        return {"map": torch.stack(losses).sum()}


def _maps(output: DenseOutput, branch: str, depth: int) -> list[Tensor]:
    return tower_maps(output, branch, depth) if depth else output.pyramid.levels


def copy_head(student: FPNDetector, teacher: FPNDetector) -> None:
    """Copies all weights beyond backbone and pyramid from the teacher to the student, in place.

    Raises:
        UserError: when the two heads do not have the same weights of the same shapes.
    """
    found, wanted = (_head_weights(model) for model in (student, teacher))
    for key in sorted(found.keys() | wanted.keys()):
        shapes = [tuple(head[key].shape) if key in head else None for head in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"feature: transfer_head needs equal heads, but {key} is {shapes[1] or 'absent'} "
                f"in the teacher {teacher.name} and {shapes[0] or 'absent'} in the student "
                f"{student.name}; choose equal families and widths, or leave transfer_head out"
            )
    with torch.no_grad():
        for key, weight in wanted.items():
            found[key].copy_(weight)


def _head_weights(model: FPNDetector) -> dict[str, Tensor]:
    """The detector's own tensors, not copies."""
    require_own_head(model, "feature: transfer_head")
    # Of a copy, since `head_only` takes the body off and puts it back in another place.
    head = copy.deepcopy(model).head_only().state_dict()
    return {key: weight for key, weight in model.state_dict().items() if key in head}

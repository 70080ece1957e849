"""Feature imitation: the student's maps copy the teacher's (FitNets, Romero et al., 1412.6550)."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import (
    channel_adapter,
    check_same_classes,
    match_levels,
    projection,
    require_dense,
)
from detdistill.distill.method import METHODS, Method, Step
from detdistill.errors import UserError
from detdistill.registry import check_choice
from detdistill.structures import DenseOutput


@METHODS.register("feature")
class FeatureImitation(Method):
    """Mean squared error between the maps of student and teacher, summed over the levels.

    Term: `feature/map`. FitNet as HEAD (arXiv 2207.05345) compares with, which is also what HEAD
    becomes for equal detectors, is `FeatureImitation(adapter="per_level", transfer_head=True)`.

    Args:
        weight: factor of `feature/map`.
        at: the pyramid ("neck") or a tower: "cls" or "box".
        depth: tower blocks before the maps, 0 (the pyramid) to the tower's depth; None takes the
            end of each tower.
        adapter: "auto" is one 1x1 convolution for all levels, and only where widths differ;
            "per_level" one for each level in any case.
        transfer_head: the student's head starts with the teacher's weights.
    """

    def __init__(
        self,
        *,
        weight: float = 1.0,
        at: Literal["neck", "cls", "box"] = "neck",
        depth: int | None = None,
        adapter: Literal["auto", "per_level"] = "auto",
        transfer_head: bool = False,
    ) -> None:
        """The weight is that of HEAD's comparison."""
        super().__init__()
        check_choice("feature: at", at, ("neck", "cls", "box"))
        check_choice("feature: adapter", adapter, ("auto", "per_level"))
        if at == "neck" and depth is not None:
            raise UserError(f"feature: depth is {depth}, but the neck has none; set at, e.g. 'cls'")
        self.weights = {"map": weight}
        self.at, self.depth = at, depth
        self.per_level, self.transfer_head = adapter == "per_level", transfer_head
        self.teacher_stage = "pyramid" if at == "neck" else "head"

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Matches levels by stride, builds adapters, and copies the head where wanted."""
        assert teacher is not None
        self.levels = match_levels(student.strides, teacher.strides, "feature")
        self.depths = self._depth_in(student, "student"), self._depth_in(teacher, "teacher")
        widths = self._width_of(student, self.depths[0]), self._width_of(teacher, self.depths[1])
        if self.per_level:
            adapters: list[nn.Module] = [projection(*widths) for _ in self.levels]
        else:
            adapters = [channel_adapter(*widths)]
        self.adapters = nn.ModuleList(adapters)
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
        sides = zip((step.student, step.teacher), self.depths, strict=True)
        found, wanted = (self._maps(output, depth) for output, depth in sides)
        losses = [
            F.mse_loss(self.adapters[i % len(self.adapters)](found[level]).float(), target.float())
            for i, (level, target) in enumerate(zip(self.levels, wanted, strict=True))
        ]
        return {"map": torch.stack(losses).sum()}

    def _maps(self, output: DenseOutput, depth: int) -> list[Tensor]:
        if depth == 0:
            return output.pyramid.levels
        # Another method may have asked for maps before their activation; after it, ReLU is nothing.
        return [F.relu(level[depth]) for level in output.towers[self.at]]


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
    body = ("backbone.", "fpn.")
    return {k: v for k, v in model.state_dict().items() if not k.startswith(body)}

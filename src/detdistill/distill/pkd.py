"""PKD, distillation by Pearson correlation (Cao et al., arXiv 2207.02039, NeurIPS 2022).

Two pyramids may differ in scale and offset of every channel and still say the same. PKD compares
standardised channels, so only their pattern counts: half the squared difference of standardised
maps is 1 minus their Pearson correlation.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.distill.adapters import EPSILON, channel_adapter, channel_statistics, match_levels
from detdistill.distill.method import METHODS, Method, Step
from detdistill.distill.published import OTHER_PKD_WEIGHT, PKD_WEIGHTS
from detdistill.errors import UserError
from detdistill.registry import check_choice


@METHODS.register("pkd")
class PKD(Method):
    """Pattern mimicking of the pyramid; without arguments with published weights.

    Term: `pkd/feature`, summed over the levels. The weights are those with which CrossKD's authors
    combine the two, for RepPoints PKD's own. The original paper's setting is `levels=4` with
    `weight=10` for RetinaNet and FCOS teachers, 6 for Faster R-CNN and RepPoints.

    Args:
        weight: factor of `pkd/feature`; None takes the published one of the teacher's family.
        levels: how many of the teacher's levels, from the finest; None takes all.
        match: which levels meet: those of one "stride", or the finest with the finest and so on, by
            "order", as in PKD's own comparisons of unlike pyramids; the student's maps are then
            resized to the teacher's.
    """

    teacher_stage = "pyramid"

    def __init__(
        self,
        *,
        weight: float | None = None,
        levels: int | None = None,
        match: Literal["stride", "order"] = "stride",
    ) -> None:
        """None means the published value."""
        super().__init__()
        check_choice("pkd: match", match, ("stride", "order"))
        if levels is not None and levels < 1:
            raise UserError(f"pkd with levels={levels} distils nothing; choose at least 1")
        self.weight, self.level_count, self.by_order = weight, levels, match == "order"

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Matches levels and builds one adapter, shared by all of them."""
        assert teacher is not None
        strides = teacher.strides[: self.level_count]
        if self.level_count is not None and len(strides) < self.level_count:
            raise UserError(
                f"pkd: levels is {self.level_count}, but {teacher.name} has {len(strides)} "
                f"pyramid levels; choose 1 to {len(strides)}"
            )
        if self.by_order:
            self.levels = self._in_order(student, len(strides))
        else:
            way_out = "set match to 'order'"
            self.levels = match_levels(student.strides, strides, "pkd", way_out)
        weight = PKD_WEIGHTS.get(teacher.family, OTHER_PKD_WEIGHT)
        self.weights = {"feature": weight if self.weight is None else self.weight}
        self.adapter = channel_adapter(student.pyramid_channels, teacher.pyramid_channels)

    def _in_order(self, student: FPNDetector, wanted: int) -> list[int]:
        """All levels that there are, or as many as the user wants."""
        found = len(student.strides)
        if self.level_count is not None and found < wanted:
            raise UserError(
                f"pkd: levels is {wanted}, but {student.name} has {found} pyramid levels; choose 1 "
                f"to {found}"
            )
        return list(range(min(found, wanted)))

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw term `feature`."""
        assert step.teacher is not None
        losses = []
        for level, teacher in zip(self.levels, step.teacher.pyramid, strict=False):
            student = self.adapter(step.student.pyramid[level])
            if self.by_order:
                size = teacher.shape[-2:]
                student = F.interpolate(student.float(), size, mode="bilinear")
            losses.append(pattern_difference(student, teacher))
        return {"feature": torch.stack(losses).sum()}


def pattern_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of two standardised (B, C, H, W) maps (PKD eq. 6).

    A map of one element per channel has no pattern: 0, tied to the student.
    """
    if student.numel() == student.shape[1]:
        return student.sum() * 0
    return (standardize(student) - standardize(teacher)).square().mean() / 2


def standardize(level: Tensor) -> Tensor:
    """(B, C, H, W) with mean 0 and deviation 1 per channel over B, H and W; float32."""
    mean, deviation = channel_statistics(level)
    return (level.float() - mean) / (deviation + EPSILON)

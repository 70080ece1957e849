"""PFI, prediction-guided feature imitation (Li et al., arXiv 2112.04840, AAAI 2022).

Features differ between two detectors in places where it matters and where it does not. PFI weighs
the difference of the pyramids at each position by the difference of the class predictions there.

The paper's body was not at hand. The formula is reconstructed from third-party implementations;
where they disagree there is an option, and the default is our choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detdistill.detectors.base import FPNDetector
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


@METHODS.register("pfi")
class PFI(Method):
    """Imitation of the pyramid, weighted by the difference of the class predictions.

    Term: `pfi/map`, the mean over the levels.

    Args:
        weight: factor of `pfi/map`.
        score: predictions compared as scores after the sigmoid, or as logits.
        norm: of the products over the positions: "l1" is their mean; "l2" of each image the root
            of the sum of their squares, divided by the number of positions, then the mean over
            the images; "sq" the mean of their squares.
        adapter: one trained 1x1 convolution for all levels, "auto" where the widths differ or
            "always"; of the implementations some have one.
        detach_prediction: weigh the features only; otherwise the predictions learn, too.
    """

    def __init__(
        self,
        *,
        weight: float = 1.5,
        score: Literal["prob", "logit"] = "prob",
        norm: Literal["l1", "l2", "sq"] = "l1",
        adapter: Literal["auto", "always"] = "auto",
        detach_prediction: bool = False,
    ) -> None:
        """The weight is that of two implementations, and so probably the paper's."""
        super().__init__()
        check_choice("pfi: score", score, ("prob", "logit"))
        check_choice("pfi: norm", norm, ("l1", "l2", "sq"))
        check_choice("pfi: adapter", adapter, ("auto", "always"))
        self.weights = {"map": weight}
        self.score, self.norm, self.detach_prediction = score, norm, detach_prediction
        self.make_adapter = projection if adapter == "always" else channel_adapter

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair, matches levels by stride and builds one adapter for all of them."""
        teacher = require_dense(teacher, "pfi", "teacher")
        student = require_dense(student, "pfi", "student")
        check_same_classes(student, teacher, "pfi")
        found, wanted = student.grid.per_location, teacher.grid.per_location
        if found != wanted:
            raise UserError(
                f"pfi compares class predictions anchor by anchor; the teacher {teacher.name} has "
                f"{wanted} per location, the student {student.name} {found}: choose a teacher with "
                f"{found}, or pkd, which compares features alone"
            )
        self.levels = match_levels(student.strides, teacher.strides, "pfi")
        self.adapter = self.make_adapter(student.pyramid_channels, teacher.pyramid_channels)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw term `map`."""
        assert step.teacher is not None
        losses = []
        for level, student_level in enumerate(self.levels):
            gap = self.prediction_gap(
                step.student.predictions.logits[student_level],
                step.teacher.predictions.logits[level],
            )
            found = self.adapter(step.student.pyramid[student_level])
            difference = (found.float() - step.teacher.pyramid[level].float()).square().mean(1)
            losses.append(self.norm_of(gap * difference))
        return {"map": torch.stack(losses).mean()}

    def prediction_gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """P: mean squared difference of two maps (B, A, K, H, W) of logits, as (B, H, W)."""
        if self.detach_prediction:
            student = student.detach()
        student, teacher = student.float(), teacher.float()
        if self.score == "prob":
            student, teacher = student.sigmoid(), teacher.sigmoid()
        return (student - teacher).square().mean((1, 2))

    def norm_of(self, product: Tensor) -> Tensor:
        """One level's loss from products (B, H, W), none negative."""
        if self.norm == "l2":
            # One implementation divides by the images twice; here their mean is taken once.
            lengths: Tensor = torch.linalg.vector_norm(product, dim=(1, 2))
            return lengths.sum() / product.numel()
        return (product.square() if self.norm == "sq" else product).mean()

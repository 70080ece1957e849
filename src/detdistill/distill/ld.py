"""LD, localization distillation (Zheng et al., arXiv 2102.12252, CVPR 2022).

A distribution over distances says where a side of a box is, and how sure that is. LD softens it
and teaches it as class scores are taught: at the positives and in a region of anchors that are
nearly positive. What the released configuration for GFL has beside, a term of the classes and one
of the features, is part of the method here.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.distill.adapters import (
    channel_adapter,
    check_same_anchors,
    check_same_classes,
    require_dense,
    same_bins,
    unequal_bins,
)
from detdistill.distill.method import METHODS, Method, Step
from detdistill.errors import UserError
from detdistill.parts.assigners import imitation_region, possible_iou, valuable_region
from detdistill.parts.losses import distribution_kl
from detdistill.registry import check_positive
from detdistill.structures import rows_of_maps

MAIN_DIVISOR, VLR_DIVISOR = 4, 16  # published; nothing else divides the two sums
IMAGES_PER_GPU = 2  # of the published configuration
Rows = tuple[Tensor, ...]
"""Image and row (M,) of some anchors."""


@METHODS.register("ld")
class LD(Method):
    """The distributions of GFL's boxes, near the objects; with classes and features as released.

    Terms: `ld/main`, KL(teacher || student) over the bins of each side at the positives, weighted
    by the student's best score; `ld/vlr`, the same in the valuable localization region (VLR),
    weighted by the anchor's IoU; `ld/cls`, KL over the classes at the positives; `ld/feature`, mean
    squared difference of the pyramids in FGFI's region (arXiv 1906.03609).

    Args:
        cls: compare the classes; False also takes a teacher of other classes.
        vlr: compare the boxes in the VLR.
        feature: compare the features.
        main_weight: factor of `ld/main`.
        vlr_weight: factor of `ld/vlr`.
        cls_weight: factor of `ld/cls`.
        feature_weight: factor of `ld/feature`.
        temperature: of the distributions.
        cls_temperature: of the softmax over the classes.
        gamma: DIoU at which the VLR of an object begins, as a share of the IoU that ATSS asks of
            its positives, where it ends.
    """

    def __init__(
        self,
        *,
        cls: bool = True,
        vlr: bool = True,
        feature: bool = True,
        main_weight: float = 0.25,
        vlr_weight: float = 0.25,
        cls_weight: float = 10.0,
        feature_weight: float = 2.0,
        temperature: Annotated[float, Gt(0)] = 10.0,
        cls_temperature: Annotated[float, Gt(0)] = 2.0,
        gamma: Annotated[float, Gt(0), Lt(1)] = 0.25,
    ) -> None:
        """The defaults are those of the released configuration for GFL."""
        super().__init__()
        check_positive("ld: temperature", temperature)
        check_positive("ld: cls_temperature", cls_temperature)
        if not 0 < gamma < 1:
            raise UserError(f"ld: gamma is {gamma}; expected a number between 0 and 1")
        wanted = {"main": True, "cls": cls, "vlr": vlr, "feature": feature}
        weights = {
            "main": main_weight,
            "cls": cls_weight,
            "vlr": vlr_weight,
            "feature": feature_weight,
        }
        self.weights = {term: weight for term, weight in weights.items() if wanted[term]}
        self.temperature, self.cls_temperature, self.gamma = temperature, cls_temperature, gamma

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair and builds one adapter for all levels where widths differ."""
        teacher = require_dense(teacher, "ld", "teacher")
        student = require_dense(student, "ld", "student")
        way_out = "choose two GFLs of one reg_max, or crosskd, which does not need them to agree"
        if not same_bins(student, teacher):
            raise unequal_bins(student, teacher, "ld", way_out)
        check_same_anchors(student, teacher, "ld")
        if "cls" in self.weights:
            check_same_classes(student, teacher, "ld")
            if student.num_classes == 1:
                raise UserError(
                    f"ld: {student.name} has 1 class, over which a softmax is always 1 and teaches "
                    f"nothing; set cls to false"
                )
        if "feature" in self.weights:
            self.adapter = channel_adapter(student.pyramid_channels, teacher.pyramid_channels)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw term `main`, and `vlr`, `cls` and `feature` as far as wanted."""
        assert step.teacher is not None
        assignment, anchors = step.teacher_assignment, step.teacher.anchors
        sizes = [len(level) for level in anchors]
        counts = [level.sum() for level in torch.split(assignment.positive, sizes, 1)]
        rows = assignment.positive.nonzero(as_tuple=True)
        logits = rows_of_maps(step.student.predictions.logits, *rows)
        own_best = logits.detach().sigmoid().amax(-1)
        terms = {"main": self._boxes(step, rows, own_best) / MAIN_DIVISOR}
        if "cls" in self.weights:
            target = rows_of_maps(step.teacher.predictions.logits, *rows)
            divergence = distribution_kl(logits, target, self.cls_temperature) / logits.shape[-1]
            # Published: the mean over the positives of a level, summed over the levels.
            shares = [1 / count.clamp(min=1) for count in counts]
            share = torch.cat([s.expand(size) for s, size in zip(shares, sizes, strict=True)])
            terms["cls"] = (divergence * share[rows[1]]).sum()
        if "vlr" not in self.weights and "feature" not in self.weights:
            return terms
        # ATSS ignores the cells beyond an image and no others.
        valid, targets = assignment.weights > 0, step.targets
        iou = possible_iou(torch.cat(anchors), valid, targets)
        if "vlr" in self.weights:
            weights = valuable_region(anchors, valid, targets, iou, gamma=self.gamma)
            rows = weights.nonzero(as_tuple=True)
            terms["vlr"] = self._boxes(step, rows, weights[rows]) / VLR_DIVISOR
        if "feature" in self.weights:
            regions = torch.split(imitation_region(iou), sizes, 1)
            terms["feature"] = self._features(step, regions, torch.stack(counts) > 0)
        return terms

    def _boxes(self, step: Step, rows: Rows, weights: Tensor) -> Tensor:
        """Weighted KL of the sides, mean over the bins, at anchors of weights (M,)."""
        assert step.teacher is not None
        found = rows_of_maps(step.student.predictions.boxes, *rows)
        wanted = rows_of_maps(step.teacher.predictions.boxes, *rows)
        sides = (-1, 4, found.shape[1] // 4)
        found, wanted = found.reshape(sides), wanted.reshape(sides)
        divergence = distribution_kl(found, wanted, self.temperature).sum(1) / sides[-1]
        # Published: the sum over the images of a GPU. This is as large, and does not grow with
        # the batch.
        images = len(step.targets.labels)
        total: Tensor = (divergence * weights).sum() * (IMAGES_PER_GPU / images)
        return total

    def _features(self, step: Step, regions: tuple[Tensor, ...], learns: Tensor) -> Tensor:
        """Mean squared difference in regions (B, H*W*A) of the levels that learn, summed."""
        assert step.teacher is not None
        losses = []
        pairs = zip(step.student.pyramid, step.teacher.pyramid, regions, strict=True)
        for student, teacher, region in pairs:
            difference = (self.adapter(student).float() - teacher.float()).square().mean(1)
            inside = region.reshape(*difference.shape, -1).any(-1)
            losses.append((difference * inside).sum() / inside.sum().clamp(min=1))
        # Published: a level without a positive anchor does not learn, whatever is in its region.
        return (torch.stack(losses) * learns).sum()

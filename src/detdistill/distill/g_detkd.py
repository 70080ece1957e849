"""G-DetKD (Yao et al., arXiv 2108.07482, ICCV 2021), with which HEAD's paper compares.

Regions of the student are matched with the teacher's, whatever the heads: SGFI, semantic-guided
feature imitation, fuses what all levels of the student's pyramid say of a box, and the contrastive
term tells the boxes apart by the vectors of the heads.

Its authors published no code. This is the form in which HEAD's authors, whose table has the
numbers, made it again: their development configurations and the losses of their library (todd).
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Annotated, cast

import torch
from annotated_types import Gt
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.roi_head import (
    RoIHead,
    Samples,
    indexed_boxes,
    pool_boxes,
    pool_level,
    sample_proposals,
)
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill.adapters import mean_square, projection, require_own_head
from detdistill.distill.contrast import Contrast, VectorMemory
from detdistill.distill.method import METHODS, Method, Step
from detdistill.distill.projectors import (
    PROJECTORS,
    Projector,
    boxes_of_student,
    cell_projector,
    shared_projector,
    shared_width,
)
from detdistill.errors import UserError
from detdistill.registry import AtLeastOne, check_choice, check_positive
from detdistill.structures import Proposals, Pyramid

POSITIVE_IOU = 0.5  # of a proposal with the ground truth, when boxes are drawn
SMALLEST_TAU = 0.01  # learned, it must not reach 0


@METHODS.register("g_detkd")
class GDetKD(Method):
    """Imitation of boxes over all levels, and their contrast; for heads of any kinds.

    Terms: `g_detkd/sgfi`, the mean squared difference between the teacher's pooled boxes and the
    student's, fused over its levels; `g_detkd/contrast`, which draws the student's vector of a box
    towards the teacher's and away from those of other boxes. The boxes are the student's own: of a
    dense one proposals without the ground truth, of a two-stage one those that it trains on.

    Args:
        sgfi: imitate the pooled boxes.
        contrast: contrast the vectors; None where the teacher is two-stage, else it has none.
        sgfi_weight: factor of `g_detkd/sgfi`.
        contrast_weight: factor of `g_detkd/contrast`.
        temperature: divides the cosines of the vectors.
        memory: steps whose vectors of the teacher count, the present one included.
        positive: the denominator of the contrast holds the pair of one box itself, as in InfoNCE;
            by default not, as in todd.
        projector: of a dense student's cells, "per_anchor", as None, or "single"; a two-stage
            student has one projection.
        proposals: of a dense student, per image.
        samples: of the proposals of an image, at most.
    """

    teacher_stage = "pyramid"

    def __init__(
        self,
        *,
        sgfi: bool = True,
        contrast: bool | None = None,
        sgfi_weight: float = 1.0,
        contrast_weight: float = 0.5,
        temperature: Annotated[float, Gt(0)] = 0.07,
        memory: AtLeastOne = 10,
        positive: bool = False,
        projector: Projector | None = None,
        proposals: AtLeastOne = 1000,
        samples: Samples = 512,
    ) -> None:
        """The defaults are those of the development configurations."""
        super().__init__()
        check_positive("g_detkd: temperature", temperature)
        check_positive("g_detkd: memory", memory)
        if projector is not None:
            check_choice("g_detkd: projector", projector, PROJECTORS)
        self.wanted = {"sgfi": sgfi, "contrast": contrast}
        self.given_weights = {"sgfi": sgfi_weight, "contrast": contrast_weight}
        self.temperature, self.length, self.positive = temperature, memory, positive
        self.projector, self.proposals, self.samples = projector, proposals, samples

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair and builds adapter, embedding, projector and memory."""
        assert teacher is not None
        for model in (student, teacher):
            require_own_head(model, "g_detkd")
        contrast, two_stage = self.wanted["contrast"], isinstance(teacher, TwoStageDetector)
        if contrast and not two_stage:
            raise UserError(
                f"g_detkd: contrast compares vectors of RoI heads, and the dense teacher "
                f"{teacher.name} has none; leave contrast out, or choose a teacher such as "
                f"faster_rcnn_r50"
            )
        wanted = {**self.wanted, "contrast": two_stage if contrast is None else contrast}
        self.weights = {term: self.given_weights[term] for term in wanted if wanted[term]}
        if not self.weights:
            why = "as asked for" if two_stage else f"since {teacher.name} has no RoI heads"
            raise UserError(f"g_detkd: sgfi is off, and so is contrast, {why}; set sgfi to true")
        if "sgfi" in self.weights:
            self.fusion = LevelFusion(student.pyramid_channels, teacher.pyramid_channels)
        if "contrast" in self.weights:
            width = shared_width(cast(TwoStageDetector, teacher).roi_heads[0])
            self.contrast = Contrast(
                _projector(student, width, self.projector),
                VectorMemory(self.length, width),
                self.temperature,
                positive=self.positive,
            )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw terms `sgfi` and `contrast` as far as wanted."""
        sample = partial(
            sample_proposals,
            num_classes=step.student_model.num_classes,
            samples=self.samples,
            iou_threshold=POSITIVE_IOU,
            add_truth=False,
        )
        rois = boxes_of_student(step, self.proposals, sample)
        pooled, vectors = self._of_teacher(step, rois)
        terms = {}
        if "sgfi" in self.weights:
            terms["sgfi"] = mean_square(self.fusion(step.student.pyramid, rois, pooled), pooled)
        if "contrast" in self.weights:
            terms["contrast"] = self.contrast(step, rois, vectors)
        return terms

    @torch.no_grad()
    def _of_teacher(self, step: Step, rois: Proposals) -> tuple[Tensor, Tensor | None]:
        """Its pooled boxes (R, C, 7, 7) and, for the contrast, their vectors (R, C')."""
        assert step.teacher is not None
        pyramid = step.teacher.pyramid
        if not isinstance(step.teacher_model, TwoStageDetector):
            return pool_boxes(pyramid, rois), None
        head = cast(RoIHead, step.teacher_model.roi_heads[0])
        pooled = head.pool(pyramid, rois)
        return pooled, head.shared_features(pooled)[-1] if "contrast" in self.weights else None


def _projector(student: FPNDetector, width: int, projector: Projector | None) -> nn.Module:
    if isinstance(student, DenseDetector):
        return cell_projector(student, width, projector or "per_anchor", bias=False)
    owner = cast(TwoStageDetector, student)
    return shared_projector(owner, width, projector, "g_detkd: projector")


class LevelFusion(nn.Module):
    """SGFI's soft choice of a level: what the student's levels say of each box, fused.

    Args:
        student_channels: of the student's pyramid.
        channels: of the teacher's.
    """

    def __init__(self, student_channels: int, channels: int) -> None:
        """One adapter for all levels, one embedding for student and teacher."""
        super().__init__()
        self.adapter = projection(student_channels, channels)
        layers: list[nn.Module] = []
        for widths in pairwise((channels, max(1, channels // 2), max(1, channels // 4))):
            conv = nn.Conv2d(*widths, 3, stride=2)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, conv.bias))
            layers += [conv, nn.ReLU()]
        self.embed = nn.Sequential(*layers)
        self.tau = nn.Parameter(torch.ones(()))

    def forward(self, pyramid: Pyramid, rois: Proposals, pooled: Tensor) -> Tensor:
        """The student's fused boxes, like the teacher's `pooled` (R, C, h, w), float32."""
        boxes, size = indexed_boxes(rois), pooled.shape[-2:]
        # Published: the adapter after RoIAlign. Both are linear and the boxes lie on the image, so
        # that the order changes nothing but the cost.
        levels = [
            pool_level(self.adapter(level), stride, boxes, size)
            for level, stride in zip(pyramid, pyramid.strides, strict=True)
        ]
        weights = self.level_weights(levels, pooled)[..., None, None, None]
        fused: Tensor = sum(  # type: ignore[assignment]
            weight * level for weight, level in zip(weights.unbind(1), levels, strict=True)
        )
        return fused

    def level_weights(self, levels: list[Tensor], pooled: Tensor) -> Tensor:
        """(R, L) that sum to 1: the levels whose boxes look most like the teacher's weigh most."""
        wanted = self.embed(pooled).float()
        alike = [(self.embed(level).float() * wanted).flatten(1).sum(1) for level in levels]
        # Over the levels, as the paper's abstract has it. A later revision of todd takes the
        # softmax over the boxes, which looks like a slip.
        # Held above 0, which todd does not do; its gradient goes on, so that it can come back.
        tau = self.tau + (self.tau.clamp(min=SMALLEST_TAU) - self.tau).detach()
        return (torch.stack(alike, 1) / tau).softmax(1)

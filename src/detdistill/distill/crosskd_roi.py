"""CrossKD for two-stage detectors (Wang et al., arXiv 2306.11369, the appendix's variant).

The cut is at the pyramid: the student's pyramid goes through the teacher's RoI head, on the boxes
that the student samples for its own loss, and what comes out mimics what that head says of the
teacher's pyramid. The facts are those of the released code, whose authors call this variant
untuned; no result of it is known.
"""

from __future__ import annotations

from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill.adapters import called, channel_adapter, check_same_classes, match_levels
from detdistill.distill.method import METHODS, Method, Step
from detdistill.errors import UserError
from detdistill.registry import check_positive
from detdistill.structures import Pyramid, RoIOutput


@METHODS.register("crosskd_roi")
class CrossKDRoI(Method):
    """Cross-head predictions of an RoI head; without arguments as released.

    Terms: `crosskd_roi/cls`, the KL divergence of the softened class scores per sampled box;
    `crosskd_roi/box`, L1 on the deltas of the class that the teacher thinks likeliest, weighted by
    its probability. The RPN is not distilled.

    Args:
        cls_weight: factor of `crosskd_roi/cls`.
        box_weight: factor of `crosskd_roi/box`.
        temperature: of the KL divergence.
    """

    teacher_stage = "pyramid"

    def __init__(
        self,
        *,
        cls_weight: float = 0.5,
        box_weight: float = 1.0,
        temperature: Annotated[float, Gt(0)] = 3.0,
    ) -> None:
        """The defaults are the released ones."""
        super().__init__()
        self.weights = {"cls": cls_weight, "box": box_weight}
        check_positive("crosskd_roi: temperature", temperature)
        self.temperature = temperature

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks that both have one RoI head, and builds the adapter where widths differ."""
        for role, model in (("student", student), ("teacher", teacher)):
            if not isinstance(model, TwoStageDetector) or len(model.roi_heads) != 1:
                raise UserError(
                    f"crosskd_roi needs a {role} with one RoI head, such as faster_rcnn; "
                    f"{called(model)} has none or several: use crosskd for dense heads, head for "
                    f"unlike ones"
                )
        assert teacher is not None
        check_same_classes(student, teacher, "crosskd_roi")
        self.levels = match_levels(student.strides, teacher.strides, "crosskd_roi")
        self.adapter = channel_adapter(student.pyramid_channels, teacher.pyramid_channels)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw terms `cls` and `box`."""
        assert step.teacher is not None
        model = cast(TwoStageDetector, step.teacher_model)
        rois = step.sampled_rois
        with torch.no_grad():
            target = model.roi(step.teacher.pyramid, rois)
        levels = [self.adapter(step.student.pyramid[level]) for level in self.levels]
        # With gradient: it flows through the teacher's frozen layers into the student.
        cross = model.roi(Pyramid(levels, model.strides), rois)
        return {
            "cls": self._classes(cross, target),
            "box": _boxes(model, cross, target),
        }

    def _classes(self, cross: RoIOutput, target: RoIOutput) -> Tensor:
        """KL(teacher || cross) of the softmax over classes and background, mean over the boxes."""
        found = (cross.logits.float() / self.temperature).log_softmax(-1)
        wanted = (target.logits.float() / self.temperature).log_softmax(-1)
        divergence = F.kl_div(found, wanted, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / max(1, len(found))


def _boxes(model: TwoStageDetector, cross: RoIOutput, target: RoIOutput) -> Tensor:
    """L1 on deltas, over the sum of the weights and the four of them."""
    likely, classes = target.logits.float().softmax(-1)[:, :-1].max(-1)
    rows = torch.arange(len(classes), device=classes.device)
    head = cast(RoIHead, model.roi_heads[0])
    found, wanted = (head.deltas_of(side.boxes, rows, classes) for side in (cross, target))
    # Released unclamped, which is NaN for a batch without boxes to look at.
    total = 4 * likely.sum().clamp(min=1e-6)
    return ((found - wanted).abs().sum(-1) * likely).sum() / total

"""What detectors with a centerness branch share: its target, its loss, its weight on boxes."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from detdistill.boxes import centerness, centers_xy
from detdistill.detectors.dense import DenseDetector
from detdistill.parts.losses import focal_loss_sum, mean_over_processes
from detdistill.structures import Assignment, DenseOutput, Targets


class CenternessDetector(DenseDetector):
    """Focal loss, a box loss weighted by centerness, and centerness itself (FCOS section 3.3).

    A subclass adds `box_losses` and says how small the sum of centerness may be that divides its
    box loss (`least_centerness`).
    """

    least_centerness: float

    def box_losses(self, boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
        """The loss of each of M positives: two (M, 4) to (M,)."""
        raise NotImplementedError

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment:
        """As every dense detector, with the centerness of each positive as `quality`."""
        assignment = super().assign(output, targets)
        image, row = assignment.positive.nonzero(as_tuple=True)
        points = centers_xy(self.flat_anchors(output.anchors)[row])
        quality = assignment.weights.new_zeros(assignment.weights.shape)
        quality[image, row] = centerness(assignment.boxes[image, row], points)
        return replace(assignment, quality=quality)

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Assignment | None = None
    ) -> dict[str, Tensor]:
        """`task/cls` and `task/quality` over the positives, `task/box` over their centerness."""
        assignment = assignment or self.assign(output, targets)
        assert assignment.quality is not None
        flat = output.predictions.flatten()
        assert flat.quality is not None
        image, row = assignment.positive.nonzero(as_tuple=True)
        central = assignment.quality[image, row]
        cls = focal_loss_sum(flat.logits, assignment.labels, assignment.weights)
        found = self.decode(flat.boxes[image, row], self.flat_anchors(output.anchors)[row])
        box = (self.box_losses(found, assignment.boxes[image, row]) * central).sum()
        quality = F.binary_cross_entropy_with_logits(
            flat.quality[image, row], central, reduction="sum"
        )
        total = mean_over_processes(central.sum(), self.reduce, at_least=self.least_centerness)
        return self.weighted(
            {
                "cls": cls / assignment.num_positive,
                "box": box / total,
                "quality": quality / assignment.num_positive,
            }
        )

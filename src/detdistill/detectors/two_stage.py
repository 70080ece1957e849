"""What two-stage detectors share: an RPN, then RoI heads, one or several after each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.proposals import NMS_THRESHOLD, propose
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.rpn import RPN
from detdistill.structures import (
    DenseOutput,
    Detections,
    Proposals,
    Pyramid,
    RoIOutput,
    Targets,
    TwoStageAssignment,
)

TRAINING_PER_LEVEL, TEST_PER_LEVEL = 2000, 1000


class TwoStageDetector(FPNDetector):
    """Backbone, FPN of P2..P6, RPN, and RoI heads on P2..P5.

    `head` runs the RPN alone. `assign` proposes and samples, since the images' sizes are known
    there; `loss` and `detect` run the RoI heads. With several, each looks at the boxes that the one
    before it moved (Cascade R-CNN, arXiv 1712.00726).

    A subclass builds `rpn` and `roi_heads`.
    """

    rpn: RPN
    roi_heads: nn.ModuleList
    training_proposals = 1000
    test_proposals = 1000

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """The RPN's predictions and anchors."""
        return self.rpn.head(pyramid, keep_pre_activation=keep_pre_activation)

    def propose(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        per_level: int = TEST_PER_LEVEL,
        max_per_image: int | None = None,
        nms_threshold: float = NMS_THRESHOLD,
        min_size: float = 0.0,
    ) -> Proposals:
        """The RPN's best boxes, as in testing by default; keywords as `proposals.propose`."""
        return propose(
            self.rpn,
            output,
            sizes,
            per_level=per_level,
            max_per_image=self.test_proposals if max_per_image is None else max_per_image,
            nms_threshold=nms_threshold,
            min_size=min_size,
        )

    def sample(self, proposals: Proposals, targets: Targets, stage: int = 0) -> Proposals:
        """Which proposals train a stage, and what they learn."""
        return self._stage(stage).sample(proposals, targets)

    def roi(self, pyramid: Pyramid, proposals: Proposals, stage: int = 0) -> RoIOutput:
        """What a stage says of the proposals."""
        return self._stage(stage).roi(pyramid, proposals)

    def _stage(self, stage: int) -> RoIHead:
        return self.roi_heads[stage]  # type: ignore[return-value]

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal to no other detector's: what is sampled depends on what was predicted."""
        return (id(self),)

    def assign(self, output: DenseOutput, targets: Targets) -> TwoStageAssignment:
        """The RPN's anchors, and sampled proposals for the first RoI head."""
        proposals = self.propose(
            output,
            targets.sizes,
            per_level=TRAINING_PER_LEVEL,
            max_per_image=self.training_proposals,
        )
        return TwoStageAssignment(self.rpn.assign(output, targets), self.sample(proposals, targets))

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: TwoStageAssignment | None = None
    ) -> dict[str, Tensor]:
        """`task/rpn_cls`, `task/rpn_box`, and `cls` and `box` of each RoI head.

        With several heads these are numbered from 1.
        """
        assignment = assignment or self.assign(output, targets)
        dense = self.rpn.loss(output, assignment.dense)
        terms = {f"rpn_{name}": value for name, value in dense.items()}
        rois = assignment.rois
        for stage in range(len(self.roi_heads)):
            found = self.roi(output.pyramid, rois, stage)
            number = f"_{stage + 1}" if len(self.roi_heads) > 1 else ""
            for name, value in self._stage(stage).loss(found, rois).items():
                terms[name + number] = value
            if stage + 1 < len(self.roi_heads):
                moved = self._stage(stage).refine(found, rois, targets.sizes)
                rois = self.sample(moved, targets, stage + 1)
        return self.weighted(terms)

    @torch.no_grad()
    def detect(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Proposals through all stages; boxes of the last, logits averaged over the stages."""
        rois = self.propose(output, sizes)
        found = self.roi(output.pyramid, rois)
        logits = [found.logits]
        for stage in range(1, len(self.roi_heads)):
            rois = self._stage(stage - 1).refine(found, rois, sizes)
            found = self.roi(output.pyramid, rois, stage)
            logits.append(found.logits)
        return self._stage(-1).detect(
            replace(found, logits=torch.stack(logits).mean(0)),
            rois,
            sizes,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )

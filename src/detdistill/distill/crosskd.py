"""CrossKD, cross-head knowledge distillation (Wang et al., arXiv 2306.11369, CVPR 2024).

The student's tower maps at some depth go through the rest of the frozen teacher's head, and these
cross-head predictions, not the student's own, mimic the teacher's. What the published code does
beyond the paper (alignment, normalisers, weights of the boxes) is followed by default and said
where it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, get_args

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import (
    activated,
    align_statistics,
    channel_adapter,
    check_same_classes,
    match_levels,
    require_dense,
)
from detdistill.distill.method import METHODS, Method, Step
from detdistill.distill.published import BoxLoss, published_for, settle
from detdistill.errors import UserError
from detdistill.parts.losses import (
    distribution_kl,
    giou_loss,
    log_iou_loss,
    mean_over_processes,
    soft_target_focal_sum,
)
from detdistill.registry import check_choice, check_positive
from detdistill.structures import Assignment, FlatPredictions

DECODED_LOSSES = {"giou": giou_loss, "iou": log_iou_loss}


@METHODS.register("crosskd")
class CrossKD(Method):
    """Cross-head distillation; without arguments as published for the teacher it meets.

    Terms: `crosskd/cls`, BCE towards the teacher's scores modulated by the gap (quality focal
    loss, exponent 1), `crosskd/box`, KL of the distance distributions (GFL), GIoU (RetinaNet,
    ATSS) or -log IoU (FCOS) of the decoded boxes, each weighted by the teacher's best score, and
    for ATSS `crosskd/quality`, BCE towards the teacher's centerness on the positives.

    Args:
        depth: teacher tower blocks that the student's map skips, 0 to the tower's depth.
        student_depth: where the student's map is taken; the same, or the end of a shorter tower.
        align: give the map the teacher's channel statistics first.
        align_on: maps after their activation (as the published code runs) or before it (as it
            reads; costs memory).
        cls: distil the classification branch.
        box: distil the box branch.
        quality: distil the quality branch; None as published, where its tower is distilled.
        cls_weight: factor of `crosskd/cls`.
        box_weight: factor of `crosskd/box`.
        quality_weight: factor of `crosskd/quality`; 1 where nothing is published.
        box_loss: "kl" needs a teacher with distributions, "giou" and "iou" (-log IoU) fit any.
        temperature: of the KL.
    """

    def __init__(
        self,
        *,
        depth: int | None = None,
        student_depth: int | None = None,
        align: bool = True,
        align_on: Literal["post_act", "pre_act"] = "post_act",
        cls: bool = True,
        box: bool = True,
        quality: bool | None = None,
        cls_weight: float | None = None,
        box_weight: float | None = None,
        quality_weight: float | None = None,
        box_loss: BoxLoss | None = None,
        temperature: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        """None means the published value for the teacher's family."""
        super().__init__()
        check_choice("crosskd: align_on", align_on, ("post_act", "pre_act"))
        self.depth, self.student_depth, self.align = depth, student_depth, align
        self.loss = PredictionLoss(
            "crosskd",
            {"cls": cls, "box": box, "quality": quality},
            {"cls": cls_weight, "box": box_weight, "quality": quality_weight},
            box_loss,
            temperature,
        )
        self.keep_pre_activation = align_on == "pre_act"
        self.adapters = nn.ModuleDict()

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair, fills in the published settings and builds adapters."""
        teacher = require_dense(teacher, "crosskd", "teacher")
        student = require_dense(student, "crosskd", "student")
        check_same_classes(student, teacher, "crosskd")
        self.levels = match_levels(student.strides, teacher.strides, "crosskd")
        self._choose_depths(student, teacher, published_for(teacher).depth)
        self.loss.settle(teacher, predictor=teacher)
        self.weights = self.loss.weights
        towers = [branch for term in self.weights for branch in teacher.towers_for(term)]
        self.branches = list(dict.fromkeys(towers))
        assert self.student_depth is not None and self.depth is not None
        for branch in self.branches:
            self.adapters[branch] = channel_adapter(
                student.tower_channels_at(self.student_depth), teacher.tower_channels_at(self.depth)
            )

    def _choose_depths(self, student: DenseDetector, teacher: DenseDetector, depth: int) -> None:
        if self.depth is None:
            self.depth = min(depth, teacher.tower_depth)
        if self.student_depth is None:
            self.student_depth = min(self.depth, student.tower_depth)
        for key, value, model in (
            ("depth", self.depth, teacher),
            ("student_depth", self.student_depth, student),
        ):
            if not 0 <= value <= model.tower_depth:
                raise UserError(
                    f"crosskd: {key} is {value}, but the towers of {model.name} have "
                    f"{model.tower_depth} blocks; choose 0 to {model.tower_depth}"
                )

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw terms `cls`, `box` and `quality` as far as wanted, summed over all levels."""
        assert self.depth is not None
        entered = {
            branch: [
                self._enter(branch, step, level, student_level)
                for level, student_level in enumerate(self.levels)
            ]
            for branch in self.branches
        }
        # With gradient: it flows through the teacher's frozen convolutions into the student.
        cross = step.dense_teacher.head_from(entered, self.depth).flatten()
        return self.loss(cross, step, step.dense_teacher.decode)

    def _enter(self, branch: str, step: Step, level: int, student_level: int) -> Tensor:
        """The student's map, made ready for the teacher's block after `depth`."""
        assert step.teacher is not None
        assert self.depth is not None and self.student_depth is not None
        entered = step.student.towers[branch][student_level][self.student_depth]
        teacher_map = step.teacher.towers[branch][level][self.depth]
        if step.pre_activation and not self.keep_pre_activation:
            entered = activated(entered, self.student_depth)
            teacher_map = activated(teacher_map, self.depth)
        entered = self.adapters[branch](entered)
        if self.align:
            entered = align_statistics(entered, teacher_map).to(entered.dtype)
        # Published: a ReLU follows the alignment, except on raw pyramid levels.
        return activated(entered, self.depth)


class PredictionLoss:
    """CrossKD's comparison of predictions with the teacher's; `mimic` shares it.

    The teacher's assignment says what counts and what divides.

    Args:
        method: its name, for messages.
        wanted: whether "cls", "box" and "quality" are compared; None as published.
        given_weights: factors of these terms; None as published.
        box_loss: None as published for the teacher.
        temperature: of the KL.

    Attributes:
        weights: factor of each term that there is, after `settle`.

    Raises:
        UserError: when nothing is wanted.
    """

    def __init__(
        self,
        method: str,
        wanted: Mapping[str, bool | None],
        given_weights: Mapping[str, float | None],
        box_loss: BoxLoss | None,
        temperature: float,
    ) -> None:
        """Settings as the user gave them."""
        if not any(wanted.values()):
            raise UserError(
                f"{method} with cls=False and box=False distils nothing; keep one branch"
            )
        if box_loss is not None:
            check_choice(f"{method}: box_loss", box_loss, get_args(BoxLoss))
        check_positive(f"{method}: temperature", temperature)
        self.method, self.wanted, self.given_weights = method, wanted, given_weights
        self.box_loss, self.temperature = box_loss, temperature
        self.weights: dict[str, float] = {}

    def settle(self, teacher: DenseDetector, predictor: DenseDetector) -> None:
        """Fills in what is published for the teacher, for predictions by a detector's head."""
        self.weights, self.box_loss, self.divide_by = settle(
            self.method, teacher, predictor, self.wanted, self.given_weights, self.box_loss
        )

    def __call__(
        self,
        found: FlatPredictions,
        step: Step,
        decode: Callable[[Tensor, Tensor], Tensor],
        choose: Callable[[Tensor], Tensor] = lambda of_teacher: of_teacher,
    ) -> dict[str, Tensor]:
        """Raw terms of predictions that learn from the teacher's, summed over all levels.

        Args:
            found: with gradient.
            step: the training step.
            decode: turns encodings (B, P, D) of `found`, on anchors (P, 4), to boxes (B, P, 4).
            choose: of what the teacher has, (B, P_teacher, ...), what the P of `found` are compared
                with; all where they stand on the teacher's anchors.
        """
        assert step.teacher is not None and self.box_loss is not None
        target = step.teacher.predictions.flatten()
        scores = choose(target.logits.sigmoid())
        assignment, normaliser = step.teacher_assignment, self._normaliser(step)
        counts = choose(assignment.weights)
        terms = {}
        if "cls" in self.weights:
            # CrossKD eq. for classification; published normaliser: positives, not all locations.
            total = soft_target_focal_sum(found.logits, scores, counts, 1)
            terms["cls"] = total / normaliser
        if "box" in self.weights:
            # Published: the teacher's best score; the paper weighs all anchors alike.
            best_score = scores.amax(-1) * counts
            if self.box_loss == "kl":
                terms["box"] = self._box_kl(found.boxes, choose(target.boxes), best_score)
            else:
                anchors = step.dense_teacher.flat_anchors(step.teacher.anchors)
                boxes = decode(found.boxes, anchors)
                target_boxes = choose(step.dense_teacher.decode(target.boxes, anchors))
                losses = DECODED_LOSSES[self.box_loss](boxes, target_boxes)
                terms["box"] = (losses * best_score).sum() / normaliser
        if "quality" in self.weights:
            terms["quality"] = _quality_sum(found, target, assignment) / assignment.num_positive
        return terms

    def _normaliser(self, step: Step) -> Tensor:
        """What divides the sums over all anchors."""
        assignment = step.teacher_assignment
        if self.divide_by == "positives" or assignment.quality is None:
            return assignment.num_positive
        total = mean_over_processes(assignment.quality.sum(), step.dense_teacher.reduce)
        # Published: at least 1e-6, so that a batch without boxes weighs a million times as much
        # and only gradient clipping saves the step. Here each image of such a batch counts as one,
        # as it does for the other families.
        return torch.where(total > 0, total, float(len(assignment.quality)))

    def _box_kl(self, found: Tensor, target: Tensor, best_score: Tensor) -> Tensor:
        """Of distributions (B, P, 4*(R+1)), weighted by the teacher's best score (B, P)."""
        sides = (*found.shape[:2], 4, -1)
        divergence = distribution_kl(found.reshape(sides), target.reshape(sides), self.temperature)
        # Mean over the sides, then over the weights; published unclamped, NaN at weight 0.
        total = best_score.sum().clamp(min=1e-6)
        return (divergence.mean(-1) * best_score).sum() / total


def _quality_sum(found: FlatPredictions, target: FlatPredictions, assignment: Assignment) -> Tensor:
    """BCE towards the teacher's quality, summed over the positives, as published."""
    assert found.quality is not None and target.quality is not None
    logits = found.quality[assignment.positive]
    wanted = target.quality[assignment.positive].sigmoid()
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")

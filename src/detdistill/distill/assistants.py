"""Assistants: heads of another kind that learn on the student's pyramid, for training alone.

HEAD (arXiv 2207.05345) trains a head of the teacher's kind on the student's pyramid, TF-HEAD heads
of other kinds without any teacher. What both need stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.fcos import FCOS
from detdistill.detectors.retinanet import RetinaNet
from detdistill.detectors.roi_head import RoIHead
from detdistill.distill.adapters import channel_adapter
from detdistill.distill.method import Method, Step
from detdistill.distill.projectors import boxes_of_student
from detdistill.distill.schedule import Schedule, silent
from detdistill.errors import UserError
from detdistill.structures import DenseOutput, Proposals, Pyramid, RoIOutput, Targets

T = TypeVar("T")
WARMUP = 2000  # steps, published


class AssistedMethod(Method):
    """A method with assistants, whose own losses the schedule leaves alone.

    `start` and `stop` act on what is distilled, never on what the assistants learn from the ground
    truth: they go on learning. The warm-up acts on that too where `assistant_warmup` says so. CKD
    may have of these what `ckd_timing` holds for itself. What rests is not computed.
    """

    schedule = Schedule(warmup=WARMUP)
    assistant_warmup = False
    truth_terms: frozenset[str] = frozenset()
    ckd_timing: Mapping[str, int] = {}

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """By which its terms go: CKD by one of its own, if it has; none where it would be idle."""
        own = {"ckd": self._schedule_of("ckd")} if self.ckd_timing else {}
        if any(term not in self.truth_terms and part_of(term) not in own for term in self.weights):
            return {"": self.schedule, **own}
        return {"": self._of_truth, **own} if self.assistant_warmup else own

    def _schedule_of(self, part: str) -> Schedule:
        if part != "ckd" or not self.ckd_timing:
            return self.schedule
        return Schedule(**{**vars(self.schedule), **self.ckd_timing})

    @property
    def _of_truth(self) -> Schedule:
        """By which the assistants learn from the ground truth."""
        return Schedule(warmup=self.schedule.warmup if self.assistant_warmup else 0)

    def factor(self, term: str, iteration: int) -> float:
        """Of a term's weight after `iteration` steps."""
        own = self._of_truth if term in self.truth_terms else self._schedule_of(part_of(term))
        return own.factor(iteration)

    def is_taught(self, iteration: int) -> bool:
        """Whether something is distilled after `iteration` steps, and by a teacher."""
        distilled = [f for t, f in self.factors(iteration).items() if t not in self.truth_terms]
        return self.needs_teacher and any(distilled)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw terms, as the class says; those that rest are 0."""
        factors = self.factors(step.iteration)
        acting = {part_of(term) for term, factor in factors.items() if factor}
        terms = self.acting_terms(step, acting)
        resting = [term for term in factors if term not in terms]
        if resting:
            idle = [p for name, p in self.named_parameters() if "assistant" not in name]
            terms |= silent(resting, nn.ParameterList(idle), step.student)
        return terms

    def acting_terms(self, step: Step, acting: Set[str]) -> dict[str, Tensor]:
        """Raw terms: the assistants' own losses and, where they are in `acting`, AKD and CKD."""
        raise NotImplementedError


class RoIAssistant(nn.Module):
    """One or more RoI heads, each on the boxes that the one before it moved.

    Args:
        heads: the RoI heads; they become this module's own and trainable.
        student_channels: of the student's pyramid.
        channels: of the pyramid that the heads were made for.
    """

    def __init__(self, heads: Iterable[nn.Module], student_channels: int, channels: int) -> None:
        """Adds an adapter where the widths differ, shared by all levels."""
        super().__init__()
        self.heads = nn.ModuleList(heads).requires_grad_(True)
        self.adapter = channel_adapter(student_channels, channels)

    def head(self, stage: int) -> RoIHead:
        """The RoI head of a stage."""
        return self.heads[stage]  # type: ignore[return-value]

    def boxes(self, step: Step, count: int) -> Proposals:
        """What it looks at; see `boxes_of_student`."""
        return boxes_of_student(step, count, self.head(0).sample)

    def forward(
        self, pyramid: Pyramid, rois: Proposals, targets: Targets
    ) -> list[tuple[Proposals, RoIOutput]]:
        """The boxes that each stage saw, and what it said of them.

        Args:
            pyramid: the student's.
            rois: sampled for the first stage.
            targets: ground truth, for the sampling of the later stages.
        """
        pyramid = Pyramid([self.adapter(level) for level in pyramid], pyramid.strides)
        seen = [(rois, self.head(0).roi(pyramid, rois))]
        for stage in range(1, len(self.heads)):
            rois, found = seen[-1]
            moved = self.head(stage - 1).refine(found, rois, targets.sizes)
            rois = self.head(stage).sample(moved, targets)
            seen.append((rois, self.head(stage).roi(pyramid, rois)))
        return seen

    def losses(self, seen: Sequence[tuple[Proposals, RoIOutput]]) -> dict[str, Tensor]:
        """Raw `cls` and `box`; of several stages numbered from 1, e.g. `cls_1`."""
        return {
            name + suffix: value
            for stage, ((rois, found), suffix) in enumerate(zip(seen, self.suffixes, strict=True))
            for name, value in self.head(stage).loss(found, rois).items()
        }

    @property
    def terms(self) -> list[str]:
        """The names of its own losses."""
        return [term + suffix for suffix in self.suffixes for term in ("cls", "box")]

    @property
    def suffixes(self) -> list[str]:
        """What follows the name of each stage's terms: nothing where there is but one."""
        many = len(self.heads) > 1
        return [f"_{stage + 1}" if many else "" for stage in range(len(self.heads))]


class DenseAssistant(nn.Module):
    """A dense head on the student's levels; levels that the student lacks are pooled from its last.

    Args:
        head: without backbone and pyramid (`head_only`).
        student_strides: of the student's pyramid.
        student_channels: of the student's pyramid.
        channels: of the pyramid that the head was made for.
        method: for messages.

    Raises:
        UserError: when the student's pyramid lacks other levels than the coarsest.
    """

    def __init__(
        self,
        head: DenseDetector,
        student_strides: Sequence[int],
        student_channels: int,
        channels: int,
        method: str,
    ) -> None:
        """Adds an adapter where the widths differ, shared by all levels."""
        super().__init__()
        self.head = head
        self.adapter = channel_adapter(student_channels, channels)
        pooled = [stride for stride in head.strides if stride not in student_strides]
        if any(stride // 2 not in (*student_strides, *pooled) for stride in pooled):
            raise UserError(
                f"{method}: an assistant {head.family} stands on levels of strides "
                f"{list(head.strides)}, the student's are {list(student_strides)}; choose a "
                f"student with these levels"
            )

    def forward(self, pyramid: Pyramid) -> DenseOutput:
        """The head's output on the student's pyramid."""
        levels: list[Tensor] = []
        by_stride = dict(zip(pyramid.strides, pyramid, strict=True))
        for stride in self.head.strides:
            if stride in by_stride:
                levels.append(self.adapter(by_stride[stride]))
            else:  # as two-stage detectors make their last level
                levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return self.head.head(Pyramid(levels, self.head.strides))

    @property
    def terms(self) -> list[str]:
        """The names of its own losses."""
        return list(self.head.loss_weights)

    def losses(self, output: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        """The head's own terms, raw."""
        weights, terms = self.head.loss_weights, self.head.loss(output, targets)
        named = {name.removeprefix("task/"): value for name, value in terms.items()}
        return {name: value / weights[name] for name, value in named.items()}


def part_of(term: str) -> str:
    """What a term is part of: "akd", "ckd", or the assistant whose own loss it is."""
    return term.split("_")[0]


def fresh_roi_assistant(
    num_classes: int, channels: int, width: int = 1024, samples: int = 512
) -> RoIAssistant:
    """An untrained RoI head as Faster R-CNN's, on a pyramid of `channels`."""
    head = RoIHead(num_classes, in_channels=channels, channels=width, samples=samples)
    return RoIAssistant([head], channels, channels)


def fresh_dense_head(
    family: Literal["fcos", "retinanet"], num_classes: int, c: int
) -> DenseDetector:
    """An untrained dense head of width `c` on a pyramid of the same; FCOS in its improved form."""
    if family == "retinanet":
        return RetinaNet(num_classes, base_channels=8, fpn_channels=c, tower_channels=c).head_only()
    return FCOS(
        num_classes,
        base_channels=8,
        fpn_channels=c,
        tower_channels=c,
        group_norm=True,
        center_sampling=True,
        norm_on_bbox=True,
        centerness_on_reg=True,
        box_loss="giou",
    ).head_only()


def prefixed(prefix: str, terms: Mapping[str, T]) -> dict[str, T]:
    """The same with `prefix` and an underscore before their names."""
    return {f"{prefix}_{name}": value for name, value in terms.items()}

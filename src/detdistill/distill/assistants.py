"""Assistants: heads of another kind that learn on the student's pyramid, for training alone.

HEAD (arXiv 2207.05345) trains a head of the teacher's kind on the student's pyramid, TF-HEAD heads
of other kinds without any teacher. What both need stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Literal, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.fcos import FCOS
from detdistill.detectors.retinanet import RetinaNet
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill.adapters import activated, channel_adapter
from detdistill.distill.method import Method, Step
from detdistill.distill.schedule import Schedule, silent
from detdistill.errors import UserError
from detdistill.structures import DenseOutput, Proposals, Pyramid, RoIOutput, Targets

T = TypeVar("T")
Projector = Literal["single", "per_anchor"]
PROJECTORS: tuple[Projector, ...] = get_args(Projector)
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


def require_own_head(model: FPNDetector | None, method: str) -> None:
    """Refuses a model whose heads can neither be copied nor read."""
    if model is not None and not isinstance(model, (DenseDetector, TwoStageDetector)):
        raise UserError(
            f"{method} copies heads or reads inside them, which {model.name} does not allow; "
            f"convert its weights to a detector of ours first"
        )


def boxes_of_student(
    step: Step, count: int, sample: Callable[[Proposals, Targets], Proposals]
) -> Proposals:
    """Sampled by `sample` of a dense student's `count` best proposals per image.

    A two-stage student has sampled for its own head; these are the boxes then.
    """
    if isinstance(step.student_model, TwoStageDetector):
        return step.sampled_rois
    student = cast(DenseDetector, step.student_model)  # `require_own_head` knows no others
    proposals = student.propose(step.student, step.targets.sizes, max_per_image=count)
    return sample(proposals, step.targets)


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


class CellProjector(nn.Module):
    """From the student's tower at the cell that a box came from to the features of that box.

    Args:
        in_channels: of the tower.
        out_channels: of the RoI head's shared layers.
        anchors: 1, or one projection for each of so many anchors of a cell.
        bias: of the projections.
    """

    def __init__(
        self, in_channels: int, out_channels: int, anchors: int, *, bias: bool = True
    ) -> None:
        """One linear layer holds all projections."""
        super().__init__()
        self.anchors = anchors
        self.linear = nn.Linear(in_channels, anchors * out_channels, bias=bias)

    def forward(self, cells: Tensor, anchor: Tensor) -> Tensor:
        """Cells (M, C) of anchors (M,) to (M, C_out)."""
        projected: Tensor = self.linear(cells)
        if self.anchors == 1:
            return projected
        rows = torch.arange(len(cells), device=cells.device)
        width = self.linear.out_features // self.anchors  # -1 cannot be told without cells
        return projected.reshape(len(cells), self.anchors, width)[rows, anchor]


def cell_projector(
    student: DenseDetector, out_channels: int, projector: Projector, *, bias: bool = True
) -> CellProjector:
    """The projector for a student's class tower."""
    anchors = student.grid.per_location if projector == "per_anchor" else 1
    width = student.tower_channels_at(student.tower_depth)
    return CellProjector(width, out_channels, anchors, bias=bias)


def shared_projector(
    student: TwoStageDetector, out_channels: int, projector: Projector | None, option: str
) -> nn.Linear:
    """The projector for the last shared layer of a student's first RoI head.

    Raises:
        UserError: for "per_anchor"; `option` names it, e.g. "head: ckd_projector".
    """
    if projector == "per_anchor":
        raise UserError(
            f"{option} 'per_anchor' needs to know which anchor of the student's own head each box "
            f"came from, and the boxes of {student.name} have moved on since; use 'single', or a "
            f"dense student such as retinanet_r18"
        )
    return nn.Linear(shared_width(student.roi_heads[0]), out_channels, bias=False)


def shared_width(head: nn.Module) -> int:
    """Width of the last shared layer of an RoI head."""
    return cast(nn.Linear, cast(RoIHead, head).shared[-1]).out_features


def projected_cells(
    project: CellProjector, student: DenseOutput, rois: Proposals
) -> tuple[Tensor, Tensor]:
    """The student's class tower where boxes came from, projected: (M, C) of the rows (R,) bool.

    Ground truth among the boxes came from no cell and is left out.
    """
    origin = torch.cat(rois.origin)
    own = ~torch.cat(rois.from_truth)
    tower = student.towers["cls"]
    cells = gather_cells([maps[-1] for maps in tower], rois.image_index[own], origin[own])
    cells = activated(cells, len(tower[0]) - 1)
    # Half precision is left to autocast, which a caller may have turned off.
    return project(cells.float(), origin[own, 3]), own


def cross_kind_loss(
    project: CellProjector, student: DenseOutput, rois: Proposals, features: Tensor
) -> Tensor:
    """CKD: the student's class tower, where each box came from, towards the box's features.

    Ground truth among the boxes is dropped. The mean over boxes and channels (HEAD's code); 0
    without boxes.

    Args:
        project: to the width of the features.
        student: a dense student's output.
        rois: with their origins on the student's levels.
        features: (R, C) of all the boxes, without gradient.
    """
    projected, own = projected_cells(project, student, rois)
    return mean_square(projected, features[own])


def gather_cells(levels: Sequence[Tensor], image: Tensor, origin: Tensor) -> Tensor:
    """(M, C): the cell of each box.

    Args:
        levels: maps (B, C, H, W).
        image: (M,) index into B.
        origin: (M, 4) level, y, x, anchor.
    """
    cells, order = [], []
    for i, level in enumerate(levels):
        [rows] = (origin[:, 0] == i).nonzero(as_tuple=True)
        # Also without rows, which ties every level to the loss.
        cells.append(level[image[rows], :, origin[rows, 1], origin[rows, 2]])
        order.append(rows)
    return torch.cat(cells)[torch.cat(order).argsort()]


def tower_maps(output: DenseOutput, branch: str, depth: int) -> list[Tensor]:
    """Activated maps of a tower at a depth, per level."""
    return [activated(maps[depth], depth) for maps in output.towers[branch]]


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference over all elements, float32; exactly 0 of empty tensors."""
    return (found.float() - wanted.float()).square().sum() / max(1, found.numel())


def mean_square_of_levels(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The sum over the levels of each level's mean squared difference."""
    pairs = zip(found, wanted, strict=True)
    return torch.stack([mean_square(*pair) for pair in pairs]).sum()


def prefixed(prefix: str, terms: Mapping[str, T]) -> dict[str, T]:
    """The same with `prefix` and an underscore before their names."""
    return {f"{prefix}_{name}": value for name, value in terms.items()}

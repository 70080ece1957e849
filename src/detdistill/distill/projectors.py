"""A student's vectors of boxes, and what projects them to those of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill.adapters import activated, mean_square
from detdistill.distill.method import Step
from detdistill.errors import UserError
from detdistill.structures import DenseOutput, Proposals, Targets

Projector = Literal["single", "per_anchor"]
PROJECTORS: tuple[Projector, ...] = get_args(Projector)


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


def student_vectors(project: nn.Module, step: Step, rois: Proposals) -> tuple[Tensor, Tensor]:
    """A student's vectors of boxes, projected.

    They are the cells of a dense student's class tower or the last shared layer of a two-stage
    one's first RoI head.

    Args:
        project: of `cell_projector` or `shared_projector`.
        step: of a student of the same kind.
        rois: with their origins on a dense student's levels.

    Returns:
        (M, C) and (R,) bool: of which boxes.
    """
    if not isinstance(step.student_model, TwoStageDetector):
        return projected_cells(cast(CellProjector, project), step.student, rois)
    head = cast(RoIHead, step.student_model.roi_heads[0])
    own = head.shared_features(head.pool(step.student.pyramid, rois))[-1]
    return project(own), own.new_ones(len(own), dtype=torch.bool)


def projected_cells(
    project: CellProjector, student: DenseOutput, rois: Proposals
) -> tuple[Tensor, Tensor]:
    """The student's class tower where boxes came from, projected.

    Returns:
        (M, C) and (R,) bool: of which boxes; ground truth among them came from no cell.
    """
    origin = torch.cat(rois.origin)
    own = ~torch.cat(rois.from_truth)
    tower = student.towers["cls"]
    cells = gather_cells([maps[-1] for maps in tower], rois.image_index[own], origin[own])
    cells = activated(cells, len(tower[0]) - 1)
    # Half precision is left to autocast, which a caller may have turned off.
    return project(cells.float(), origin[own, 3]), own


def cross_kind_loss(project: nn.Module, step: Step, rois: Proposals, features: Tensor) -> Tensor:
    """CKD: the student's vectors of boxes, projected, towards the features of these boxes.

    Ground truth among a dense student's boxes is dropped. The mean over boxes and channels (HEAD's
    code); 0 without boxes.

    Args:
        project: to the width of the features, of `cell_projector` or `shared_projector`.
        step: of a student of the same kind.
        rois: with their origins on a dense student's levels.
        features: (R, C) of all the boxes, without gradient.
    """
    found, own = student_vectors(project, step, rois)
    return mean_square(found, features[own])


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

"""How unequal students and teachers are made to meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.files import few
from detdistill.detectors.stages import DenseHead, Detector, RoIStages, lacking
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.errors import UserError
from detdistill.registry import nearest
from detdistill.structures import DenseOutput

EPSILON = 1e-6


def channel_adapter(student_channels: int, teacher_channels: int) -> nn.Module:
    """A trainable 1x1 convolution where the widths differ, nothing where they agree."""
    if student_channels == teacher_channels:
        return nn.Identity()
    return projection(student_channels, teacher_channels)


def projection(student_channels: int, teacher_channels: int) -> nn.Conv2d:
    """A trainable 1x1 convolution."""
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    nn.init.xavier_uniform_(adapter.weight)
    nn.init.zeros_(adapter.bias)  # type: ignore[arg-type]
    return adapter


def match_levels(
    student_strides: tuple[int, ...],
    teacher_strides: tuple[int, ...],
    method: str,
    way_out: str = "",
) -> list[int]:
    """For each teacher level the student's level of the same stride.

    `way_out` names the method's own option for such a pair, if it has one.

    Raises:
        UserError: when the student has no level of a teacher's stride.
    """
    absent = [stride for stride in teacher_strides if stride not in student_strides]
    if absent:
        raise UserError(
            f"{method}: the teacher's pyramid has levels at strides {list(teacher_strides)}, the "
            f"student's at {list(student_strides)}; every teacher level needs a student level of "
            f"its stride: choose a student or a teacher with the same levels"
            f"{way_out and f', or {way_out}'}"
        )
    return [student_strides.index(stride) for stride in teacher_strides]


def require_dense(model: FPNDetector | None, method: str, role: str) -> DenseDetector:
    """The model as the dense detector that a method needs as its `role`.

    A view of another framework's detector counts by the stages it shows, not by its class.

    Raises:
        UserError: it is none, or lacks a part of the contract (see `detectors.stages`).
    """
    absent = lacking(model, Detector, DenseHead)
    if isinstance(model, RoIStages):
        raise UserError(
            f"{method} needs a dense {role}; {called(model)} has no dense head: for RoI heads "
            f"there are crosskd_roi (alike) and head (unlike), for any pyramid pkd (with match "
            f"'order' where strides differ)"
        )
    if absent:
        raise UserError(
            f"{method} needs a dense {role}; {called(model)} lacks {few(absent)} of "
            f"detectors.stages.DenseHead: derive it from DenseDetector, or show a model of "
            f"torchvision with as_detector"
        )
    return cast(DenseDetector, model)


def require_own_head(model: FPNDetector | None, method: str) -> None:
    """Refuses a model whose heads can neither be copied nor read."""
    if model is not None and not isinstance(model, (DenseDetector, TwoStageDetector)):
        raise UserError(
            f"{method} copies heads or reads inside them, which {model.name} does not allow; "
            f"convert its weights to a detector of ours first"
        )


def called(model: object) -> str:
    """A detector's name; of anything else its class."""
    name = getattr(model, "name", None)
    return name if isinstance(name, str) else type(model).__name__


def check_same_classes(student: FPNDetector, teacher: FPNDetector, method: str) -> None:
    """Refuses a pair whose classes differ in number, name or order."""
    for model in (student, teacher):
        if model.classes and len(model.classes) != model.num_classes:
            raise UserError(
                f"{method}: {model.name} predicts {model.num_classes} classes, but its `classes` "
                f"name {len(model.classes)}; name each of its labels once, in their order"
            )
    own, known = list(student.classes or ()), list(teacher.classes or ())
    if own == known if own and known else student.num_classes == teacher.num_classes:
        return
    counts = (
        f"{method}: the teacher {teacher.name} has {teacher.num_classes} classes, the student "
        f"{student.name} {student.num_classes}"
    )
    if not own or not known:
        raise UserError(
            f"{counts}, and without names nothing tells which is which; say by class_map which "
            f"label each class has for the teacher, or train a teacher on the student's classes"
        )
    unknown = [name for name in own if name not in known]
    if not unknown:
        raise UserError(
            f"{counts}, all of which it knows; cut it to these, in their order: "
            f"detdistill.match_classes(teacher, student.classes)"
        )
    others = f", nor {len(unknown) - 1} more," if len(unknown) > 1 else ""
    raise UserError(
        f"{method}: the teacher {teacher.name} knows no class {unknown[0]!r}{others} among its "
        f"{teacher.num_classes}; say by class_map what it calls it, train a teacher on the "
        f"student's classes, or take a method that needs none in common, such as pkd; "
        f"{nearest(unknown[0], known)}"
    )


def check_same_anchors(
    student: DenseDetector, teacher: DenseDetector, method: str, way_out: str = ""
) -> None:
    """Refuses a pair whose predictions do not stand on the same anchors or points.

    `way_out` names the method's own option for such a pair, if it has one.
    """
    if (student.grid.key, student.strides) != (teacher.grid.key, teacher.strides):
        raise UserError(
            f"{method} compares the two detectors anchor by anchor, and the anchors or points of "
            f"the teacher {teacher.name} are not those of the student {student.name}; choose a "
            f"teacher with the student's, {way_out and f'{way_out}, '}or crosskd, which does not "
            f"need them to agree"
        )


def same_bins(student: DenseDetector, teacher: DenseDetector) -> bool:
    """Whether both predict distances as distributions over the same bins."""
    coded = {(model.box_coding, getattr(model, "reg_max", None)) for model in (student, teacher)}
    return len(coded) == 1 and teacher.box_coding == "distribution"


def unequal_bins(
    student: DenseDetector, teacher: DenseDetector, what: str, way_out: str
) -> UserError:
    """For a pair that is not `same_bins`; `what` needs it, `way_out` says what to do."""
    names = " and ".join(dict.fromkeys((teacher.name, student.name)))
    return UserError(
        f"{what} needs distance distributions over the same bins on both sides, not predicted "
        f"by {names}; {way_out}"
    )


def align_statistics(student: Tensor, teacher: Tensor) -> Tensor:
    """Gives each channel of the student's map the teacher's mean and deviation over the batch.

    Both are (B, C, H, W); statistics run in float32 over B, H and W with the unbiased deviation,
    and the student's carry gradient, as published (CrossKD's code; not in the paper as far as is
    known). A map of one element per channel has no deviation and passes unchanged.
    """
    if student.numel() == student.shape[1]:
        return student
    mean, deviation = channel_statistics(student)
    teacher_mean, teacher_deviation = channel_statistics(teacher)
    scale = teacher_deviation / (deviation + EPSILON)
    return student * scale + (teacher_mean - mean * scale)


def channel_statistics(level: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of a (B, C, H, W) map over B, H and W: (1, C, 1, 1), float32."""
    variance, mean = torch.var_mean(level.float(), (0, 2, 3), keepdim=True)
    # A channel that is constant over the batch (dead) has no finite gradient of its deviation.
    return mean, variance.clamp(min=EPSILON**2).sqrt()


def activated(tower_map: Tensor, depth: int) -> Tensor:
    """A map, or cells of it, after ReLU; depth 0 has no activation.

    Another method may have asked to keep the maps of towers before it; twice changes nothing.
    """
    return F.relu(tower_map) if depth else tower_map


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

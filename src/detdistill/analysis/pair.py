"""A teacher and a student, and what both make of one image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from detdistill.detectors import DenseDetector, FPNDetector
from detdistill.detectors.stages import DenseHead
from detdistill.distill.adapters import check_same_classes
from detdistill.structures import Batch, DenseOutput, Pyramid, Targets, flatten_maps

Place = tuple[str, str]  # the name of a stage; the stride of its map, or what else it stands on


@dataclass(frozen=True)
class View:
    """What one model makes of one image.

    Attributes:
        backbone: its maps (1, C, H, W) by stride; none where they cannot be told.
        pyramid: what its head runs on.
        output: its dense head's output; None where it has no such head.
    """

    backbone: dict[int, Tensor]
    pyramid: Pyramid
    output: DenseOutput | None

    @property
    def dense(self) -> DenseOutput:
        """The output, of which the pair has said that it is there."""
        assert self.output is not None
        return self.output


@dataclass(frozen=True)
class Sample:
    """One image with both views.

    Attributes:
        index: its place in the data set.
        image: (3, h, w) uint8 as both models saw it, without the padding.
        targets: its objects, labels as the models number them.
        areas: (N,) of the objects, pixels of the image file.
        teacher, student: the views.
    """

    index: int
    image: Tensor
    targets: Targets
    areas: Tensor
    teacher: View
    student: View

    @property
    def boxes_xyxy(self) -> Tensor:
        """(N, 4) of the objects, pixels of the image."""
        return self.targets.boxes[0][self.targets.present[0]]


class Pair:
    """Both models, frozen, and what they have in common.

    Attributes:
        teacher, student: on one device, in eval mode.
        strides: of the pyramid levels that both have.
        dense: whether both have a dense head.

    Raises:
        UserError: when their classes differ.
    """

    def __init__(self, teacher: FPNDetector, student: FPNDetector) -> None:
        """Checks the pair."""
        check_same_classes(student, teacher, "analyze")
        self.teacher, self.student = (
            model.requires_grad_(False).eval() for model in (teacher, student)
        )
        self.strides = [stride for stride in student.strides if stride in teacher.strides]
        self.dense = all(isinstance(model, DenseHead) for model in (teacher, student))

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """Of each common stride the level's place in the teacher's and in the student's pyramid."""
        teacher, student = self.teacher.strides, self.student.strides
        return [(teacher.index(stride), student.index(stride)) for stride in self.strides]

    @property
    def same_anchors(self) -> bool:
        """Whether both dense heads predict at the same anchors or points."""
        teacher, student = self.dense_models
        return teacher.grid.key == student.grid.key and teacher.strides == student.strides

    @property
    def dense_models(self) -> tuple[DenseDetector, DenseDetector]:
        """Teacher and student, of which `dense` has said that they are dense."""
        assert self.dense
        return cast(DenseDetector, self.teacher), cast(DenseDetector, self.student)

    @torch.no_grad()
    def look(self, batch: Batch) -> tuple[View, View]:
        """The teacher's and the student's view of a batch of one image."""
        return view(self.teacher, batch), view(self.student, batch)


def view(model: FPNDetector, batch: Batch) -> View:
    """Runs a model on a batch of one image."""
    images = model.normalize(batch)
    backbone: dict[int, Tensor] = {}
    if hasattr(model, "fpn"):
        maps = model.backbone(images)
        # Batches are padded to a multiple of every backbone stride.
        backbone = {images.shape[-1] // m.shape[-1]: m for m in maps}
        pyramid = model.fpn(maps)
    else:  # a view of a torchvision model, which does not tell the two apart
        pyramid = model.pyramid(images)
    output = model.head(pyramid) if isinstance(model, DenseHead) else None
    return View(backbone, pyramid, output)


def places_of(view: View, *, ends: bool) -> dict[Place, Tensor]:
    """All maps (1, C, H, W) of one model by place: "backbone", "pyramid" and its towers."""
    maps = {("backbone", str(stride)): level for stride, level in view.backbone.items()}
    for stride, level in zip(view.pyramid.strides, view.pyramid, strict=True):
        maps["pyramid", str(stride)] = level
    return maps if view.output is None else maps | tower_places(view.output, ends=ends)


def tower_places(
    output: DenseOutput, *, prefix: str = "", ends: bool = False
) -> dict[Place, Tensor]:
    """The maps of the towers by place: "cls 1" for the first block, with `ends` also "cls end"."""
    maps: dict[Place, Tensor] = {}
    for branch, levels in output.towers.items():
        for stride, depths in zip(output.pyramid.strides, levels, strict=True):
            for depth, level in enumerate(depths[1:], 1):
                maps[f"{prefix}{branch} {depth}", str(stride)] = level
            if ends:
                maps[f"{prefix}{branch} end", str(stride)] = depths[-1]
    return maps


def split_levels(values: Tensor, output: DenseOutput) -> list[Tensor]:
    """(P, ...) over all anchors to one piece per level."""
    return list(torch.split(values, [len(level) for level in output.anchors]))


def level_scores(output: DenseOutput, level: int) -> Tensor:
    """(H*W*A, K) scores of a level, 0..1, of the one image, in the order of the anchors."""
    return flatten_maps([output.predictions.logits[level]])[0].sigmoid()


def best_of_cell(values: Tensor, per_cell: int) -> Tensor:
    """(H*W*A, ...) to (H*W, ...): the greatest of the A anchors of each cell."""
    return values.reshape(-1, per_cell, *values.shape[1:]).amax(1)


def evenly(count: int, most: int, seed: int) -> Tensor:
    """At most `most` different numbers below `count`, drawn by the seed alone, ascending."""
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most].sort()[0]

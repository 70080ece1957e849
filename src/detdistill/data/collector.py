"""What the readers of all formats share: boxes checked against the size of their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from detdistill.data.dataset import DetectionDataset, ImageRecord
from detdistill.data.files import in_threads
from detdistill.data.images import read_header

Box = tuple[float, float, float, float]
Row = tuple[Box, Box, int, bool, float]  # clipped xyxy, stated xywh, label, crowd, area

TOLERANCE = 1.0
"""Pixels that a box may poke out of its image before that counts as a fault."""

_MIN_SIDE = 1e-3  # pixels; what is thinner has no area left in float32


@dataclass(frozen=True)
class ImageFile:
    """An image as the annotations speak of it.

    Attributes:
        path: the file.
        where: how a fault names the image.
        stated: (h, w) of the annotations, None where they give no usable one.
    """

    path: Path
    where: str
    stated: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Sized:
    path: Path
    height: int
    width: int


class BoxCollector:
    """Collects the usable boxes of every image and the faults of the others.

    Attributes:
        faults: what was dropped or corrected; a reader adds those of its format.
    """

    def __init__(self, images: Mapping[int, ImageFile]) -> None:
        """Looks at every image file.

        Args:
            images: by image id, in the order of the records.

        Raises:
            UserError: when an image is missing or cannot be read.
        """
        self.faults: list[str] = []
        self._images: dict[int, _Sized] = {}
        self._rows: dict[int, list[Row]] = {number: [] for number in images}
        headers = in_threads(read_header, [image.path for image in images.values()])
        for (number, image), header in zip(images.items(), headers, strict=True):
            height, width = header.frame(image.stated)
            if image.stated is not None and image.stated != (height, width):
                self.faults.append(
                    f"{image.where}: the file says {image.stated[1]}x{image.stated[0]}, "
                    f"{image.path.name} is {width}x{height} (the image's own size is used)"
                )
            self._images[number] = _Sized(image.path, height, width)

    def __contains__(self, image_id: int) -> bool:
        """Whether there is such an image."""
        return image_id in self._images

    def size(self, image_id: int) -> tuple[int, int]:
        """(h, w) of an image in the frame of its boxes."""
        image = self._images[image_id]
        return image.height, image.width

    def add(
        self,
        image_id: int,
        where: str,
        stated_xywh: Box,
        label: int,
        *,
        crowd: bool = False,
        area: float | None = None,
    ) -> None:
        """Files one box under its image, clipped, or notes why not.

        Args:
            image_id: one of the images.
            where: how a fault names the box.
            stated_xywh: finite pixels, width and height above 0.
            label: 0..K-1.
            crowd: whether the region stands for many objects.
            area: pixels, that of the box if not given.
        """
        height, width = self.size(image_id)
        x, y, w, h = stated_xywh
        corners = (max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height))
        left, top, right, bottom = corners
        if min(right - left, bottom - top) < _MIN_SIDE:
            self.faults.append(
                f"{where}: box {_shown(stated_xywh)} has no area inside its {width}x{height} "
                "image (dropped)"
            )
            return
        if max(-x, -y, x + w - width, y + h - height) > TOLERANCE:
            self.faults.append(
                f"{where}: box {_shown(stated_xywh)} pokes out of its {width}x{height} "
                "image (clipped)"
            )
            stated_xywh = (left, top, right - left, bottom - top)
            area = None if area is None else min(area, stated_xywh[2] * stated_xywh[3])
        if area is None:
            area = stated_xywh[2] * stated_xywh[3]
        self._rows[image_id].append((corners, stated_xywh, label, crowd, area))

    def dataset(
        self, classes: Sequence[str], category_ids: Sequence[int], split: str, source: Path
    ) -> DetectionDataset:
        """The checked split; see `DetectionDataset` for what is given."""
        rows = [row for image in self._rows.values() for row in image]
        counts = [len(image) for image in self._rows.values()]
        corners = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
        stated = torch.tensor([row[1] for row in rows], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
        crowd = torch.tensor([row[3] for row in rows], dtype=torch.bool)
        areas = torch.tensor([row[4] for row in rows], dtype=torch.float64)
        columns = [torch.split(column, counts) for column in (corners, labels, crowd, areas)]
        pieces = zip(self._images.items(), *columns, strict=True)
        records = [
            ImageRecord(number, image.path, image.height, image.width, *tensors)
            for (number, image), *tensors in pieces
        ]
        return DetectionDataset(
            records, list(classes), list(category_ids), split, source, self.faults, stated
        )


def _shown(box_xywh: Box) -> list[float]:
    """Pixels to hundredths: computed ones have long tails."""
    return [round(side, 2) for side in box_xywh]

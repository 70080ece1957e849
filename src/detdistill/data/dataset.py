"""A checked split of any format: what the readers of COCO, YOLO and Pascal VOC data give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detdistill.data.images import read_image
from detdistill.errors import UserError

Json = dict[str, Any]


WITHOUT = {
    "val": "`detdistill data split` cuts it from the training images",
    "test": "`eval --split val` does without, `detdistill data split` cuts it from the training "
    "images",
}
"""What to do where a split is missing, whatever the format."""


class MissingSplitError(UserError):
    """The data set is there; this split of it is not."""


@dataclass(frozen=True)
class ImageRecord:
    """One image and its ground truth.

    Attributes:
        image_id: id in the annotation file; 1, 2, ... where the format has none.
        path: the image file.
        height: pixels, in the frame of the boxes (upright where EXIF turns the image).
        width: pixels.
        boxes_xyxy: (N, 4) float32 pixels, clipped to the image.
        labels: (N,) int64, 0..K-1.
        crowd: (N,) bool: regions that stand for many objects.
        areas: (N,) float64 pixels, as the file states them, else those of the box; of a clipped box
            no more than what is left of it.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes_xyxy: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor


@dataclass(frozen=True)
class DetectionDataset:
    """A checked split.

    Attributes:
        records: one per image, in the order of the file or of the list, else by path.
        classes: K names, by ascending category id.
        category_ids: K ids, ascending; label i is `category_ids[i]`.
        split: train, val or test.
        source: the annotation file; of YOLO `data.yaml`, of VOC the list or folder of the split.
        faults: what was dropped or corrected, each naming the image, or the file and line.
        stated_xywh: (sum of N, 4) float64: all boxes as the file states them, for the evaluator.
    """

    records: list[ImageRecord]
    classes: list[str]
    category_ids: list[int]
    split: str
    source: Path
    faults: list[str]
    stated_xywh: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.records)

    def subset(self, images: Sequence[int]) -> DetectionDataset:
        """These images alone, by their place, with all that belongs to them; all faults stay."""
        stated = torch.split(self.stated_xywh, [len(record.labels) for record in self.records])
        return replace(
            self,
            records=[self.records[index] for index in images],
            stated_xywh=torch.cat([stated[index] for index in images]),
        )

    def read(self, index: int) -> Tensor:
        """(3, h, w) uint8 RGB of one image, in the frame of its boxes."""
        record = self.records[index]
        image = read_image(record.path, (record.height, record.width))
        if image.shape[1:] != (record.height, record.width):
            raise UserError(
                f"{record.path}: the image is {image.shape[2]}x{image.shape[1]} now and was "
                f"{record.width}x{record.height} before; leave the data alone during a run"
            )
        return image

    def ground_truth(self) -> Json:
        """This split as a COCO dict, crowds included and faulty annotations left out."""
        images: list[Json] = []
        annotations: list[Json] = []
        stated = iter(self.stated_xywh.tolist())
        for record in self.records:
            images.append(
                {
                    "id": record.image_id,
                    "file_name": record.path.name,
                    "height": record.height,
                    "width": record.width,
                }
            )
            rows = (record.labels.tolist(), record.areas.tolist(), record.crowd.tolist())
            for label, area, crowd in zip(*rows, strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # 0 means "unmatched" to COCO's evaluator
                        "image_id": record.image_id,
                        "category_id": self.category_ids[label],
                        "bbox": next(stated),
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        pairs = zip(self.category_ids, self.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        return {"images": images, "annotations": annotations, "categories": categories}

    def fault_summary(self) -> str:
        """One line about the faults; empty when there are none."""
        if not self.faults:
            return ""
        shown = "; ".join(self.faults[:3])
        more = f"; and {len(self.faults) - 3} more" if len(self.faults) > 3 else ""
        noun = "fault" if len(self.faults) == 1 else "faults"
        return f"{self.source}: {len(self.faults)} {noun}: {shown}{more}"


def require_same_classes(train: DetectionDataset, other: DetectionDataset) -> None:
    """`UserError` when two splits differ in their classes."""
    if other.classes != train.classes:
        raise UserError(
            f"{other.source}: classes {other.classes} differ from those of {train.source}: "
            f"{train.classes}; all splits need the same categories"
        )


SplitReader = Callable[[], DetectionDataset]
"""Reads and checks a split that was found; a reader of a format gives one."""

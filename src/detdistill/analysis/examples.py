"""What is kept of the few images that are drawn in the end."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from detdistill.analysis.pair import Sample
from detdistill.boxes import centers_xy
from detdistill.structures import DenseOutput

T = TypeVar("T")


@dataclass(frozen=True)
class HeatMap:
    """Values over the cells of one level.

    Attributes:
        values: (H, W) on the CPU.
        stride: pixels from cell to cell.
        origin: (x, y) of the first cell's upper left corner, pixels of the image.
    """

    values: Tensor
    stride: int
    origin: tuple[float, float]


@dataclass(frozen=True)
class MapExample:
    """An image with maps to be laid over it.

    Attributes:
        index: of the image in the data set.
        image: (3, h, w) uint8.
        boxes_xyxy: (N, 4) of its objects, pixels.
        maps: levels of each map, by its name.
        count: of what there is much here.
    """

    index: int
    image: Tensor
    boxes_xyxy: Tensor
    maps: dict[str, list[HeatMap]]
    count: float


def map_example(sample: Sample, maps: dict[str, list[HeatMap]], count: float) -> MapExample:
    """Of an image that has just been measured."""
    return MapExample(sample.index, sample.image, sample.boxes_xyxy.cpu(), maps, count)


def heat_map(values: Tensor, output: DenseOutput, level: int) -> HeatMap:
    """A map of (H*W*A,) values in the order of a level's anchors; of a cell's the greatest counts.

    A cell lies around the centre of its anchors.
    """
    stride, (height, width) = output.pyramid.strides[level], output.pyramid[level].shape[-2:]
    x, y = centers_xy(output.anchors[level][0]).tolist()
    cells = values.float().cpu().reshape(height, width, -1).amax(-1)
    return HeatMap(cells, stride, (x - stride / 2, y - stride / 2))


class Foremost(Generic[T]):
    """The items with the greatest scores of a stream, however long; of equal ones the earliest."""

    def __init__(self, most: int) -> None:
        """Keeps at most `most` items."""
        self.most, self._seen = most, 0
        self._heap: list[tuple[float, int, T]] = []

    def offer(self, score: float, make: Callable[[], T]) -> None:
        """Keeps the item, and only then makes it, if its score is above 0 and among the best."""
        self._seen += 1
        entry = (score, -self._seen)
        if score <= 0 or self.most < 1:
            return
        if len(self._heap) < self.most:
            heapq.heappush(self._heap, (*entry, make()))
        elif entry > self._heap[0][:2]:
            heapq.heapreplace(self._heap, (*entry, make()))

    def items(self) -> list[T]:
        """Greatest score first."""
        return [item for *_, item in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]

"""Anchors of dense heads and which of them lie on an image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from detdistill.structures import PADDED_TO, Pyramid


class AnchorGrid:
    """Anchors on the grid points x*stride, y*stride, as MMDetection places them (no half cell).

    Args:
        scales: sizes in units of the stride.
        ratios: height / width.
    """

    def __init__(self, scales: Sequence[float], ratios: Sequence[float]) -> None:
        """A = len(scales) * len(ratios) anchors per location, ratio-major."""
        self.scales, self.ratios = tuple(scales), tuple(ratios)
        self.per_location = len(self.scales) * len(self.ratios)

    @property
    def key(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Equal for grids that give equal anchors."""
        return self.scales, self.ratios

    def __call__(self, pyramid: Pyramid) -> list[Tensor]:
        """Per level (H*W*A, 4) float32, xyxy pixels; location-major, anchors fastest."""
        return [
            _level_anchors(self.key, stride, (level.shape[-2], level.shape[-1]), level.device)
            for level, stride in zip(pyramid, pyramid.strides, strict=True)
        ]


class PointGrid:
    """One point per location.

    Args:
        offset: of the points from the anchors' grid points, in strides: 0.5 is the middle of the
            cell (FCOS), 0 the grid point itself (RepPoints).
    """

    per_location = 1

    def __init__(self, offset: float = 0.5) -> None:
        """A = 1."""
        self.offset = offset

    @property
    def key(self) -> tuple[str, float]:
        """Equal for grids that give equal points."""
        return "points", self.offset

    def __call__(self, pyramid: Pyramid) -> list[Tensor]:
        """Per level (H*W, 4) float32 pixels; both corners are the point."""
        return [
            _level_points(self.offset, stride, (level.shape[-2], level.shape[-1]), level.device)
            for level, stride in zip(pyramid, pyramid.strides, strict=True)
        ]


@lru_cache(maxsize=256)
def _level_points(
    offset: float, stride: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    rows, columns = ((torch.arange(side, device=device) + offset) * stride for side in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y, x, y), -1).reshape(-1, 4)


@lru_cache(maxsize=256)
def _level_anchors(
    key: tuple[tuple[float, ...], tuple[float, ...]],
    stride: int,
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    scales, ratios = (torch.tensor(part, dtype=torch.float32, device=device) for part in key)
    heights = (stride * scales[None, :] * ratios.sqrt()[:, None]).flatten()
    widths = (stride * scales[None, :] / ratios.sqrt()[:, None]).flatten()
    base = torch.stack((-widths, -heights, widths, heights), -1) / 2
    y, x = torch.meshgrid(
        torch.arange(size[0], device=device) * stride,
        torch.arange(size[1], device=device) * stride,
        indexing="ij",
    )
    shifts = torch.stack((x, y, x, y), -1).reshape(-1, 1, 4)
    return (shifts + base).reshape(-1, 4)


def cells_on_image(pyramid: Pyramid, sizes: Sequence[tuple[int, int]], per_location: int) -> Tensor:
    """(B, P) bool: False for anchors of cells beyond the image padded to `PADDED_TO`.

    The published heads give such cells no label and no distillation.
    """
    device = pyramid[0].device
    padded = torch.tensor(
        [[-(-side // PADDED_TO) * PADDED_TO for side in size] for size in sizes], device=device
    )
    levels = []
    for level, stride in zip(pyramid, pyramid.strides, strict=True):
        rows, columns = (
            torch.arange(length, device=device) * stride < limit[:, None]
            for length, limit in zip(level.shape[-2:], padded.T, strict=True)
        )
        inside = rows[:, :, None] & columns[:, None, :]
        levels.append(inside.flatten(1).repeat_interleave(per_location, 1))
    return torch.cat(levels, 1)

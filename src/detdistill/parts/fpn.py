"""Feature pyramid network (Lin et al., arXiv 1612.03144) with extra coarse levels."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detdistill.parts.heads import normalisation
from detdistill.structures import Pyramid

ExtraFrom = Literal["c5", "p5"]


class FPN(nn.Module):
    """C3, C4, C5 to P3..P7.

    Args:
        in_channels: channels of C3, C4, C5.
        channels: channels of every pyramid level.
        extra: the two coarse levels start from the backbone's C5 or from P5.
        relu_before_extra: P7 is computed from P6 after ReLU; P6 itself stays as it is (FCOS).
        group_norm: GroupNorm after each convolution, which then has no bias (RepPoints).
    """

    strides = (8, 16, 32, 64, 128)

    def __init__(
        self,
        in_channels: list[int],
        channels: int,
        extra: ExtraFrom,
        relu_before_extra: bool = False,
        group_norm: bool = False,
    ) -> None:
        """Builds lateral 1x1, output 3x3 and strided extra convolutions (Xavier uniform)."""
        super().__init__()
        self.channels = channels
        self.extra, self.relu_before_extra = extra, relu_before_extra
        bias = not group_norm
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1, bias=bias) for c in in_channels)
        first = in_channels[-1] if extra == "c5" else channels
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=bias) for _ in in_channels
        )
        for c in (first, channels):
            self.output.append(nn.Conv2d(c, channels, 3, stride=2, padding=1, bias=bias))
        self.lateral_norm, self.output_norm = (
            nn.ModuleList(normalisation(channels, group_norm) for _ in convs)
            for convs in (self.lateral, self.output)
        )
        _initialize(self)

    def forward(self, features: list[Tensor]) -> Pyramid:
        """Backbone maps, fine to coarse, to the pyramid."""
        merged = _merge(
            [
                n(conv(f))
                for conv, n, f in zip(self.lateral, self.lateral_norm, features, strict=True)
            ]
        )
        *own, sixth, seventh = self.output
        *own_norms, sixth_norm, seventh_norm = self.output_norm
        levels = [n(conv(m)) for conv, n, m in zip(own, own_norms, merged, strict=True)]
        levels.append(sixth_norm(_halve(sixth, features[-1] if self.extra == "c5" else levels[-1])))
        start = F.relu(levels[-1]) if self.relu_before_extra else levels[-1]
        levels.append(seventh_norm(_halve(seventh, start)))
        return Pyramid(levels, self.strides)


class PooledFPN(nn.Module):
    """C2, C3, C4, C5 to P2..P6, as two-stage detectors take them; P6 is P5 at every second place.

    Args:
        in_channels: channels of C2..C5.
        channels: channels of every pyramid level.
    """

    strides = (4, 8, 16, 32, 64)

    def __init__(self, in_channels: list[int], channels: int) -> None:
        """Builds lateral 1x1 and output 3x3 convolutions (Xavier uniform)."""
        super().__init__()
        self.channels = channels
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        _initialize(self)

    def forward(self, features: list[Tensor]) -> Pyramid:
        """Backbone maps, fine to coarse, to the pyramid."""
        merged = _merge([conv(f) for conv, f in zip(self.lateral, features, strict=True)])
        levels = [conv(m) for conv, m in zip(self.output, merged, strict=True)]
        levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return Pyramid(levels, self.strides)


def _merge(merged: list[Tensor]) -> list[Tensor]:
    """The way down, in place of the list: each map plus the coarser one, enlarged to its size."""
    for fine in range(len(merged) - 1, 0, -1):
        size = merged[fine - 1].shape[-2:]
        merged[fine - 1] = merged[fine - 1] + F.interpolate(merged[fine], size=size)
    return merged


def _initialize(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _halve(conv: nn.Module, features: Tensor) -> Tensor:
    """The strided convolution; over a map one column wide, its columns unstrided.

    That computes the same map, and keeps away from oneDNN's bfloat16 weight gradient for this
    one shape (stride 2, width 1, CPUs with AVX-512 BF16), which returns uninitialised memory.
    """
    assert isinstance(conv, nn.Conv2d)
    stride = (conv.stride[0], 1) if features.shape[-1] == 1 else conv.stride
    return F.conv2d(features, conv.weight, conv.bias, stride, conv.padding)

"""The stacked convolutions of a dense head, which can be entered at any depth."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class GroupNorm(nn.GroupNorm):
    """PyTorch's own, for maps of one element per group too (a 1x1 level of a small image).

    `nn.GroupNorm` refuses them; their normalised value is 0, so they become the bias.
    """

    def forward(self, level: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        settings = (self.num_groups, self.weight, self.bias, self.eps)
        if level.device.type != "cpu" or not level.is_contiguous(memory_format=torch.channels_last):
            return torch.group_norm(level, *settings)
        # torch's kernel takes up to 20 times as long on channels_last bfloat16 there. The map goes
        # back, so that what follows, and its gradient, need no copies of their own.
        normalised = torch.group_norm(level.contiguous(), *settings)
        return normalised.contiguous(memory_format=torch.channels_last)


def normalisation(channels: int, group_norm: bool) -> nn.Module:
    """GroupNorm, or nothing."""
    return GroupNorm(_groups(channels), channels) if group_norm else nn.Identity()


def with_outputs(layer: Layer, rows: Sequence[int]) -> Layer:
    """A copy of a predictor with these of its outputs alone, in this order."""
    kept = copy.deepcopy(layer)
    for name, parameter in layer.named_parameters():
        chosen = parameter.detach()[list(rows)].clone()
        setattr(kept, name, nn.Parameter(chosen, requires_grad=parameter.requires_grad))
    width = "out_channels" if isinstance(layer, nn.Conv2d) else "out_features"
    setattr(kept, width, len(rows))
    return kept


class TowerBlock(nn.Module):
    """3x3 convolution, then GroupNorm or nothing; the activation is the tower's."""

    def __init__(self, in_channels: int, channels: int, group_norm: bool) -> None:
        """A convolution followed by GroupNorm has no bias."""
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=not group_norm)
        self.norm = normalisation(channels, group_norm)
        # Normalisation undoes any factor.
        nn.init.normal_(self.conv.weight, std=0.01 if group_norm else _hidden_std(in_channels))
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, level: Tensor) -> Tensor:
        """(B, C_in, H, W) to the map before the activation, (B, C, H, W)."""
        return self.norm(self.conv(level))  # type: ignore[no-any-return]


class Tower(nn.Module):
    """`depth` blocks with ReLU, shared by all pyramid levels."""

    def __init__(self, in_channels: int, channels: int, depth: int, group_norm: bool) -> None:
        """All blocks are `channels` wide; a tower of depth 0 passes the level through."""
        super().__init__()
        self.blocks = nn.ModuleList(
            TowerBlock(in_channels if i == 0 else channels, channels, group_norm)
            for i in range(depth)
        )
        self.in_channels = in_channels
        self.out_channels = channels if depth else in_channels

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def channels_at(self, depth: int) -> int:
        """Channels of the map at a depth: what `resume` expects there."""
        return self.out_channels if depth else self.in_channels

    def forward(self, level: Tensor, keep_pre_activation: bool) -> tuple[Tensor, list[Tensor]]:
        """(B, C_in, H, W) to the final activated map and the maps at depth 0..D.

        THE place that says what a depth means: depth 0 is the level itself, depth d the output of
        block d after ReLU (what CrossKD's published code compares, because its ReLU works in
        place), or before ReLU on request, which keeps a second copy of every map.
        """
        maps = [level]
        for block in self.blocks:
            before = block(level)
            # Neither convolution nor GroupNorm needs its own output for the backward pass.
            level = F.relu(before, inplace=not keep_pre_activation)
            maps.append(before if keep_pre_activation else level)
        return level, maps

    def resume(self, activated: Tensor, depth: int) -> Tensor:
        """Runs the blocks after the first `depth` on an activated map."""
        for block in self.blocks[depth:]:
            activated = F.relu(block(activated), inplace=True)
        return activated


class PointConv(nn.Module):
    """A 3x3 deformable convolution (arXiv 1703.06211) whose taps look at nine given points.

    It runs in float32: torchvision's has no half-precision kernel on a CPU.
    """

    taps: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Without bias, as published."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.normal_(self.weight, std=_hidden_std(in_channels))
        y, x = torch.meshgrid(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0), indexing="ij")
        taps = torch.stack((y, x), -1).reshape(1, -1, 1, 1)  # where they look by themselves
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, level: Tensor, points: Tensor) -> Tensor:
        """(B, C_in, H, W) and points (B, 18, H, W), y and x from the cell in cells, to a map."""
        offsets = points.float() - self.taps
        found = deform_conv2d(level.float(), offsets, self.weight.float(), padding=1)
        return found.to(level.dtype)  # type: ignore[no-any-return]


class Scale(nn.Module):
    """One learnable factor per pyramid level, starting at 1."""

    def __init__(self) -> None:
        """A scalar parameter."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, level: Tensor) -> Tensor:
        """The map times the factor."""
        return level * self.scale


def predictor(
    in_channels: int, out_channels: int, prior: float | None = None, kernel: int = 3
) -> nn.Conv2d:
    """The last convolution; `prior` is the initial score of every class (focal loss paper)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=0.01)
    bias = 0.0 if prior is None else -math.log((1 - prior) / prior)
    nn.init.constant_(conv.bias, bias)  # type: ignore[arg-type]
    return conv


def hidden_conv(channels: int) -> nn.Conv2d:
    """A 3x3 convolution before the last, which nothing normalises; its ReLU is the caller's."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    nn.init.normal_(conv.weight, std=_hidden_std(channels))
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _hidden_std(in_channels: int) -> float:
    """0.01, as published for 256 channels; narrower convolutions get more.

    With 0.01 one of 16 channels passes a twelfth of its input on, one of 256 a third: a few narrow
    ones after each other leave nothing to learn from.
    """
    return 0.01 * math.sqrt(256 / in_channels)


def _groups(channels: int) -> int:
    """32 groups as published, fewer only where 32 do not divide the channels."""
    return next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)

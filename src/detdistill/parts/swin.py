"""Swin (Liu et al., arXiv 2103.14030) from timm, as MMDetection runs it on images of any size."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor

PATCH = 4  # pixels of a side


def is_swin(name: str) -> bool:
    """Whether a timm model is a Swin of the first kind, which detectors normalise per stage."""
    return name.startswith("swin_")


def in_patches(name: str) -> bool:
    """Whether a timm model is a Swin of any kind, which refuses images of half patches."""
    return name.startswith(("swin_", "swinv2_"))


def swin_options(name: str) -> dict[str, Any]:
    """What `timm.create_model` needs for images of any size; nothing for other models."""
    if not in_patches(name):
        return {}
    if not is_swin(name):
        return {"strict_img_size": False}
    # timm leaves a stage unshifted where one window covers it at 224 pixels; the images of a
    # detector are larger. The drop path rate is MMDetection's.
    return {"strict_img_size": False, "always_partition": True, "drop_path_rate": 0.2}


class PaddedBlock(SwinTransformerBlock):
    """Pads the map to whole windows before it shifts them, as published.

    timm shifts first, which moves the padding into other windows. Both agree where windows divide
    the map, as they do at 224 pixels.
    """

    def _attn(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        height, width = tokens.shape[1:3]
        down, right = -height % self.window_size[0], -width % self.window_size[1]
        padded = F.pad(tokens, (0, 0, 0, right, 0, down))
        attended: Tensor = super()._attn(padded)  # type: ignore[no-untyped-call]
        return attended[:, :height, :width]


def pad_blocks(body: Any) -> None:
    """Turns the blocks of a timm Swin into `PaddedBlock`s, which have the same state."""
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = PaddedBlock


def pad_to_patches(images: Tensor) -> Tensor:
    """(B, 3, H, W) with zeros at the right and the bottom, so that whole patches cover it."""
    height, width = images.shape[-2:]
    if height % PATCH or width % PATCH:
        images = F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
    return images

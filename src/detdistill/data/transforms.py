"""The only place of geometry: what is done to the pixels is done to the boxes, on uint8.

`draw` decides everything about a sample from its own generator; `apply` carries it out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from detdistill.boxes import keep_ratio_size
from detdistill.recipe import Recipe

MIN_SIDE = 1.0
"""Pixels that a side of a cropped box must keep."""

MIN_VISIBLE = 0.1
"""Share of its area that a cropped box must keep."""


@dataclass(frozen=True)
class Crop:
    """A window in pixels of the resized image."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ColorShift:
    """Factors, 1 = unchanged."""

    brightness: float
    contrast: float
    saturation: float


@dataclass(frozen=True)
class Transform:
    """All that happens to one sample, in this order.

    Attributes:
        height: pixels after resizing.
        width: pixels after resizing.
        crop: window of the resized image, or None.
        flip: mirror left and right.
        color: or None.
    """

    height: int
    width: int
    crop: Crop | None = None
    flip: bool = False
    color: ColorShift | None = None


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """The generator of one sample; equal keys give equal draws in any process."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def eval_size(recipe: Recipe) -> tuple[int, int]:
    """(short, long) for evaluation: the largest that training uses before jitter."""
    return max(recipe.resize_short), recipe.resize_long


def out_of_reach(recipe: Recipe) -> tuple[str, str] | None:
    """What is wrong with a shorter side above the longer one's limit, and what to do about it."""
    short, long = eval_size(recipe)
    if short <= long:
        return None
    found = f"resize_short {short} is never reached, since resize_long is {long}"
    return found, f"--set resize_long={short * 5 // 3}"


def draw(recipe: Recipe, height: int, width: int, generator: torch.Generator) -> Transform:
    """Draws a training transform for an image of the given size."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sizes = recipe.resize_short
    if recipe.resize_mode == "range":
        short = integer(min(sizes), max(sizes))
    else:
        short = sizes[integer(0, len(sizes) - 1)]
    long = recipe.resize_long
    factor = uniform(*recipe.scale_jitter) if recipe.scale_jitter else 1.0
    new_h, new_w = keep_ratio_size((height, width), short * factor, long * factor)
    crop = None
    if recipe.crop:
        # The window lies as the image does, so that grouping by aspect still helps.
        window = (short, long) if width >= height else (long, short)
        crop_h, crop_w = min(new_h, window[0]), min(new_w, window[1])
        crop = Crop(integer(0, new_h - crop_h), integer(0, new_w - crop_w), crop_h, crop_w)
    flip = uniform(0, 1) < recipe.flip
    color = None
    if recipe.color_jitter > 0:
        low, high = 1 - recipe.color_jitter, 1 + recipe.color_jitter
        color = ColorShift(uniform(low, high), uniform(low, high), uniform(low, high))
    return Transform(new_h, new_w, crop, flip, color)


def apply(
    transform: Transform, image: Tensor, boxes_xyxy: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms one sample.

    Args:
        transform: what to do.
        image: (3, h, w) uint8.
        boxes_xyxy: (N, 4) pixels of that image.
        labels: (N,).

    Returns:
        Image, boxes and labels; fewer boxes where a crop left nearly nothing of some.
    """
    height, width = image.shape[1:]
    factors = (transform.width / width, transform.height / height)
    image = resize(image, transform.height, transform.width)
    boxes_xyxy = boxes_xyxy * boxes_xyxy.new_tensor(factors * 2)
    if transform.crop is not None:
        image = crop_image(image, transform.crop)
        boxes_xyxy, kept = crop_boxes(boxes_xyxy, transform.crop)
        boxes_xyxy, labels = boxes_xyxy[kept], labels[kept]
    if transform.flip:
        image = image.flip(2)
        boxes_xyxy = flip_boxes(boxes_xyxy, image.shape[2])
    if transform.color is not None:
        image = shift_color(image, transform.color)
    return image, boxes_xyxy, labels


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(3, h, w) uint8 to (3, height, width), bilinear with anti-aliasing."""
    if image.shape[1:] == (height, width):
        return image
    resized: Tensor = tvf.resize(image, [height, width], antialias=True)
    return resized


def crop_image(image: Tensor, crop: Crop) -> Tensor:
    """The window of an image."""
    rows = slice(crop.top, crop.top + crop.height)
    return image[:, rows, crop.left : crop.left + crop.width]


def crop_boxes(boxes_xyxy: Tensor, crop: Crop) -> tuple[Tensor, Tensor]:
    """(N, 4) boxes clipped to the window, in its pixels, and (N,) bool: which to keep."""
    moved = boxes_xyxy - boxes_xyxy.new_tensor([crop.left, crop.top] * 2)
    limits = boxes_xyxy.new_tensor([crop.width, crop.height] * 2)
    clipped = torch.minimum(moved.clamp(min=0), limits)
    sides_before, sides = moved[:, 2:] - moved[:, :2], clipped[:, 2:] - clipped[:, :2]
    untouched = (clipped == moved).all(1)  # a box that was tiny before the crop stays
    share = sides.prod(1) / sides_before.prod(1).clamp(min=1e-6)
    return clipped, untouched | ((sides >= MIN_SIDE).all(1) & (share >= MIN_VISIBLE))


def flip_boxes(boxes_xyxy: Tensor, width: int) -> Tensor:
    """(N, 4) boxes of an image of that width, mirrored left and right."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


def shift_color(image: Tensor, color: ColorShift) -> Tensor:
    """(3, h, w) uint8 with other brightness, contrast and saturation."""
    image = tvf.adjust_brightness(image, color.brightness)
    image = tvf.adjust_contrast(image, color.contrast)
    shifted: Tensor = tvf.adjust_saturation(image, color.saturation)
    return shifted

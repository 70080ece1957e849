"""Boxes drawn on images, for predictions and for the gallery of a report."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from detdistill.structures import Detections
from detdistill.writing import written

READABLE = 400
"""Images whose longer side is shorter than this many pixels are enlarged before drawing."""

Colour = tuple[int, int, int]
Point = tuple[float, float]


def class_colours(count: int) -> list[Colour]:
    """One colour per class; neighbours differ by the golden angle, so they never look alike."""
    colours = []
    for index in range(count):
        hue = (0.02 + 0.618034 * index) % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if index % 2 else 0.7, 0.95)
        colours.append((int(255 * red), int(255 * green), int(255 * blue)))
    return colours


def draw_boxes(
    image: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    scores: Tensor | None = None,
) -> Tensor:
    """Boxes with class names (and scores) on a copy of an image.

    Args:
        image: (3, h, w) uint8.
        boxes_xyxy: (N, 4) pixels of the image.
        labels: (N,) 0..K-1.
        classes: K names.
        scores: (N,) 0..1; the best box is drawn last, on top.

    Returns:
        (3, H, W) uint8, enlarged by a whole factor where the image is too small to be read.
    """
    canvas, factor = _enlarged(image)
    if not len(boxes_xyxy):
        return canvas
    order = torch.arange(len(labels)) if scores is None else scores.cpu().argsort(stable=True)
    limit = torch.tensor([canvas.shape[2], canvas.shape[1]] * 2) - 1
    boxes = torch.minimum((boxes_xyxy.cpu()[order] * factor).clamp(min=0), limit)
    palette = class_colours(len(classes))
    chosen = [int(label) for label in labels.cpu()[order]]
    colours = [palette[label] for label in chosen]
    texts = [classes[label] for label in chosen]
    if scores is not None:
        values = scores.cpu()[order].tolist()
        texts = [f"{text} {value:.2f}" for text, value in zip(texts, values, strict=True)]
    width = max(2, round(max(canvas.shape[1:]) / 320))
    # Clamping can leave a box without area, which the drawing function refuses.
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2])
    drawn = draw_bounding_boxes(canvas, boxes, colors=list(colours), width=width)
    return _write_labels(drawn, boxes, texts, colours)


def draw_detections(
    image: Tensor, detections: Detections, classes: Sequence[str], score_threshold: float = 0.3
) -> Tensor:
    """The detections at or above a score, drawn on a copy of the image; see `draw_boxes`."""
    keep = detections.scores >= score_threshold
    return draw_boxes(
        image,
        detections.boxes_xyxy[keep],
        detections.labels[keep],
        classes,
        detections.scores[keep],
    )


@dataclass(frozen=True)
class Layer:
    """Boxes of one meaning: (N, 4) pixels, their colour, and whether the lines are dashed."""

    boxes_xyxy: Tensor
    colour: str
    dashed: bool = False


def draw_layers(image: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Boxes without names on a dark rim, readable on any picture; later layers lie on top.

    Args:
        image: (3, h, w) uint8.
        layers: in the order of drawing.

    Returns:
        (3, H, W) uint8, enlarged like that of `draw_boxes`.
    """
    enlarged, factor = _enlarged(image)
    canvas = to_pil(enlarged)
    draw = ImageDraw.Draw(canvas)
    width = max(3, round(max(canvas.size) / 130))
    for layer in layers:
        for box in (layer.boxes_xyxy.cpu() * factor).tolist():
            for start, end in _edges(box, canvas.size, 4.0 * width if layer.dashed else None):
                draw.line((*start, *end), fill="black", width=width + 2)
            for start, end in _edges(box, canvas.size, 4.0 * width if layer.dashed else None):
                draw.line((*start, *end), fill=layer.colour, width=width)
    return from_pil(canvas)


def save_png(image: Tensor, path: Path) -> None:
    """Writes a (3, h, w) uint8 image; the file appears whole or not at all."""
    with written(path) as file:
        to_pil(image).save(file, format="PNG")


def jpeg_data_uri(image: Tensor, longest: int = 480) -> str:
    """A (3, h, w) uint8 image as text that a page can embed, shrunk to `longest` pixels."""
    picture = to_pil(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    memory = io.BytesIO()
    picture.save(memory, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(memory.getvalue()).decode()


def _enlarged(image: Tensor) -> tuple[Tensor, int]:
    """A copy, enlarged by a whole factor (also returned) where it is too small to be read."""
    factor = max(1, -(-READABLE // max(image.shape[1:])))
    copy = image.cpu().repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return copy, factor


def _edges(
    box_xyxy: list[float], size: tuple[int, int], dash: float | None
) -> Iterator[tuple[Point, Point]]:
    """The four sides of a box as lines inside the picture, cut into dashes if asked."""
    x1, y1, x2, y2 = box_xyxy
    x1, x2 = (min(max(x, 1), size[0] - 2) for x in (x1, x2))
    y1, y2 = (min(max(y, 1), size[1] - 2) for y in (y1, y2))
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for (ax, ay), (bx, by) in pairwise(corners):
        length = abs(bx - ax) + abs(by - ay)
        pieces = 1 if dash is None else 2 * max(1, round(length / dash)) - 1
        for piece in range(0, pieces, 2):
            start, end = piece / pieces, (piece + 1) / pieces
            yield (
                (ax + (bx - ax) * start, ay + (by - ay) * start),
                (ax + (bx - ax) * end, ay + (by - ay) * end),
            )


def _write_labels(
    image: Tensor, boxes_xyxy: Tensor, texts: list[str], colours: list[Colour]
) -> Tensor:
    """Names on a filled strip above each box, or inside it at the upper edge of the image."""
    canvas = to_pil(image)
    draw = ImageDraw.Draw(canvas)
    font = _font(max(11, round(max(image.shape[1:]) / 42)))
    for (x, y, _, _), text, colour in zip(boxes_xyxy.tolist(), texts, colours, strict=True):
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 4, bottom - top + 4
        x = max(0, min(x, canvas.width - width))
        y = y - height if y >= height else y
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        ink = "black" if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 128 else "white"
        draw.text((x + 2 - left, y + 2 - top), text, font=font, fill=ink)
    return from_pil(canvas)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib ships, so that no system font is needed."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def to_pil(image: Tensor) -> Image.Image:
    """A (3, h, w) uint8 image for Pillow."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """An RGB picture of Pillow as (3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

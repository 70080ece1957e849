"""Maps laid over images, and the candidates of an object as coloured dots."""

from __future__ import annotations

import matplotlib
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detdistill.analysis.examples import HeatMap, MapExample
from detdistill.analysis.ranks import RankExample
from detdistill.analysis.statistics import average_ranks
from detdistill.drawing.page import Panel
from detdistill.drawing.pictures import Layer, draw_layers, from_pil, jpeg_data_uri, to_pil

OBJECT, OWN, TEACHERS = "#5db2ff", "#ff6a1f", "#00c78b"
HEAT, RANK = "inferno", "viridis"
COARSE = 4  # levels whose cells are larger than this part of the image would hide all others
MARGIN = 0.25  # of an object's size around it
SHOWN = 400  # pixels of the longer side of an object's picture


def merged(levels: list[HeatMap], size: tuple[int, int]) -> Tensor:
    """The greatest value of the levels at each of (h, w) pixels; a cell fills its square.

    Levels whose cells are larger than a quarter of the longer side are left out, unless no other
    is there.
    """
    fine = [level for level in levels if level.stride * COARSE <= max(size)] or levels[:1]
    painted = [_paint(level, size) for level in fine]
    return torch.stack(painted).amax(0)


def _paint(level: HeatMap, size: tuple[int, int]) -> Tensor:
    rows, columns = (
        ((torch.arange(side) + 0.5 - start) / level.stride).floor().long().clamp(0, cells - 1)
        for side, start, cells in zip(size, reversed(level.origin), level.values.shape, strict=True)
    )
    return level.values[rows][:, columns]


def overlay(image: Tensor, heat: Tensor, top: float) -> Tensor:
    """A map (h, w) over a grey (3, h, w) uint8 image; `top` is as bright as it gets."""
    strength = (heat / top).clamp(0, 1) if top > 0 else torch.zeros_like(heat)
    colours = matplotlib.colormaps[HEAT](strength.numpy())[..., :3]
    colour = torch.from_numpy(255 * colours).permute(2, 0, 1).float()
    grey = 0.7 * image.float().mean(0, keepdim=True)
    alpha = 0.25 + 0.6 * strength.sqrt()
    return (grey * (1 - alpha) + colour * alpha).round().to(torch.uint8)


def map_panels(
    example: MapExample, title: str, captions: dict[str, str], stride: int | None = None
) -> list[Panel]:
    """The image with its objects, then one panel per map.

    Args:
        example: what to draw.
        title: of the first panel.
        captions: of the maps by name, in their order.
        stride: draw this level alone, each map up to its own greatest value; None draws all levels
            together, values of 1 brightest.
    """
    size = (example.image.shape[1], example.image.shape[2])
    objects = [Layer(example.boxes_xyxy, OBJECT)]
    panels = [Panel(title, _objects(len(example.boxes_xyxy)), _uri(example.image, objects))]
    for name, caption in captions.items():
        levels = example.maps[name]
        if stride is not None:
            levels = [level for level in levels if level.stride == stride]
        if not levels:
            continue
        heat = merged(levels, size)
        top = 1.0 if stride is None else float(heat.max())
        text = caption if stride is None else f"{caption}, up to {top:.2g}"
        panels.append(Panel(name, text, _uri(overlay(example.image, heat, top), objects)))
    return panels


def rank_panels(example: RankExample, title: str) -> list[Panel]:
    """An object, its candidates by both models' ranks, and the boxes that come of them."""
    window = _window(example)
    shift = example.box_xyxy.new_tensor([window[0], window[1]])
    left, top, right, bottom = window
    image = example.image[:, top:bottom, left:right]
    factor = max(1, round(SHOWN / max(image.shape[1:])))
    points = (example.points - shift) * factor
    row = example.row(0)
    object_box = (example.box_xyxy[None] - shift.repeat(2)) * factor
    where = _uri(_larger(image, factor), [Layer(object_box, OBJECT)])
    panels = [Panel(title, f"tau {example.tau:.2f}, {len(points)} candidates", where)]
    for name, scores, best in (
        ("teacher's order", example.teacher, example.best[0]),
        ("student's order", example.student, example.best[1]),
    ):
        caption = f"best score {float(scores.max()):.2f}"
        dots = _dots(image, factor, points, scores, best)
        panels.append(Panel(name, caption, jpeg_data_uri(dots)))
    chosen = example.boxes[1, list(example.best)]
    boxes = torch.cat((object_box, (chosen - shift.repeat(2)) * factor))
    layers = [Layer(boxes[i : i + 1], c) for i, c in enumerate((OBJECT, TEACHERS, OWN))]
    caption = f"IoU {row.iou_own:.2f} at its own best, {row.iou_teachers:.2f} at the teacher's"
    panels.append(Panel("student's box", caption, _uri(_larger(image, factor), layers)))
    return panels


def _dots(image: Tensor, factor: int, points: Tensor, scores: Tensor, kept: int) -> Tensor:
    """Candidates at (n, 2) points of the enlarged image, coloured by rank; a ring at `kept`."""
    enlarged = _larger(image, factor)
    canvas = to_pil((enlarged.float().mean(0, keepdim=True) * 0.7).expand(3, -1, -1).byte())
    draw = ImageDraw.Draw(canvas)
    ranks = average_ranks(scores)
    colours = matplotlib.colormaps[RANK](((ranks - 1) / max(1, len(ranks) - 1)).numpy())
    radius = max(canvas.size) / 45
    for place in scores.argsort(stable=True).tolist():  # the best lies on top
        x, y = points[place].tolist()
        red, green, blue = (round(255 * part) for part in colours[place][:3])
        best = place == kept
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            fill=(red, green, blue),
            outline="#ffffff" if best else "#000000",
            width=round(radius / 2) if best else 1,
        )
    return from_pil(canvas)


def _window(example: RankExample) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is shown: the object and its candidates with a margin."""
    low = torch.minimum(example.box_xyxy[:2], example.points.amin(0))
    high = torch.maximum(example.box_xyxy[2:], example.points.amax(0))
    margin = MARGIN * (high - low).max()
    limit = low.new_tensor([example.image.shape[2], example.image.shape[1]])
    low = (low - margin).floor().clamp(min=0)
    high = torch.minimum((high + margin).ceil(), limit)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _larger(image: Tensor, factor: int) -> Tensor:
    height, width = image.shape[1:]
    size = (width * factor, height * factor)
    return from_pil(to_pil(image).resize(size, Image.Resampling.BILINEAR))


def _uri(image: Tensor, layers: list[Layer]) -> str:
    return jpeg_data_uri(draw_layers(image, layers))


def _objects(count: int) -> str:
    return "1 object" if count == 1 else f"{count} objects"

"""Outlines and surfaces of the generated data set.

A class is a family of outlines, never one drawing: proportions, corners, holes, rotation, squash
and slant are drawn anew for each object, and its surface says nothing about its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float32]

SUPERSAMPLING = 4
"""Masks are drawn this much larger and averaged down, for soft edges at true positions."""


@dataclass(frozen=True)
class Shape:
    """Closed outlines: (P, 2) points (x, y) around 0; the second, if any, is a hole."""

    outer: Floats
    hole: Floats | None = None

    def moved(self, matrix: Floats, offset: Floats) -> Shape:
        """Each point times a (2, 2) matrix, plus an offset."""
        hole = None if self.hole is None else self.hole @ matrix.T + offset
        return Shape(self.outer @ matrix.T + offset, hole)


@dataclass(frozen=True)
class Mask:
    """Coverage 0..1 of the pixels of a rectangle whose corner is at (left, top)."""

    left: int
    top: int
    coverage: Floats


def _polar(radii: Floats | float, angles: Floats) -> Floats:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1).astype(np.float32)


def _circle(radius: float, start: float = 0.0, turn: float = 2 * np.pi, points: int = 40) -> Floats:
    return _polar(radius, np.linspace(start, start + turn, points, dtype=np.float32))


def _even(corners: int) -> Floats:
    return (np.arange(corners) * (2 * np.pi / corners)).astype(np.float32)


def _points(*pairs: tuple[float, float]) -> Floats:
    return np.array(pairs, dtype=np.float32)


def _perhaps_hollow(outer: Floats, rng: Generator) -> Shape:
    """One in three has a hole of its own form."""
    if rng.random() > 0.33:
        return Shape(outer)
    center = outer.mean(0)
    return Shape(outer, (outer - center) * np.float32(rng.uniform(0.4, 0.65)) + center)


def _disc(rng: Generator) -> Shape:
    return Shape(_circle(1.0))


def _ring(rng: Generator) -> Shape:
    return Shape(_circle(1.0), _circle(rng.uniform(0.4, 0.75)))


def _triangle(rng: Generator) -> Shape:
    angles = _even(3) + rng.uniform(-0.35, 0.35, 3).astype(np.float32)
    return _perhaps_hollow(_polar(1.0, angles), rng)


def _square(rng: Generator) -> Shape:
    side = rng.uniform(0.75, 1.0)
    return _perhaps_hollow(_points((-1, -side), (1, -side), (1, side), (-1, side)), rng)


def _hexagon(rng: Generator) -> Shape:
    radii = rng.uniform(0.92, 1.08, 6).astype(np.float32)
    return _perhaps_hollow(_polar(radii, _even(6)), rng)


def _star(rng: Generator) -> Shape:
    tips = int(rng.integers(4, 8))
    radii = np.ones(2 * tips, dtype=np.float32)
    radii[1::2] = rng.uniform(0.35, 0.6)
    return _perhaps_hollow(_polar(radii, _even(2 * tips)), rng)


def _cross(rng: Generator) -> Shape:
    a, b = rng.uniform(0.2, 0.4), rng.uniform(0.2, 0.4)
    quarter = [(b, 1.0), (b, a), (1.0, a)]
    right = quarter + [(x, -y) for x, y in reversed(quarter)]
    return _perhaps_hollow(_points(*right, *[(-x, y) for x, y in reversed(right)]), rng)


def _crescent(rng: Generator) -> Shape:
    """The unit disc without a disc of radius `bite` around (shift, 0)."""
    bite = rng.uniform(0.82, 1.0)
    shift = rng.uniform(max(0.35, 2.1 - 2 * bite), 0.75) + bite - 1
    tip_x = (1 - bite**2 + shift**2) / (2 * shift)  # where the two circles meet
    tip_y = np.sqrt(1 - tip_x**2)
    outer, inner = np.arctan2(tip_y, tip_x), np.arctan2(tip_y, tip_x - shift)
    edge = _circle(bite, inner, 2 * (np.pi - inner))[::-1] + _points((shift, 0))
    return Shape(np.concatenate([_circle(1.0, outer, 2 * (np.pi - outer)), edge]))


def _half_disc(rng: Generator) -> Shape:
    return _perhaps_hollow(_circle(1.0, rng.uniform(-0.25, 0.0), np.pi), rng)


def _arrow(rng: Generator) -> Shape:
    shaft, neck, head = rng.uniform(0.15, 0.35), rng.uniform(-0.3, 0.4), rng.uniform(0.6, 0.9)
    upper = [(-1.0, shaft), (neck, shaft), (neck - rng.uniform(0, 0.3), head)]
    return Shape(_points(*upper, (1.0, 0.0), *[(x, -y) for x, y in reversed(upper)]))


CLASSES: dict[str, Callable[[Generator], Shape]] = {
    "disc": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "square": _square,
    "hexagon": _hexagon,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "half_disc": _half_disc,
    "arrow": _arrow,
}


def blob(rng: Generator) -> Shape:
    """An irregular closed outline that belongs to no class."""
    angles = _even(48)
    radii = np.ones(48, dtype=np.float32)
    for wave in (2, 3, 4, 5):
        radii += np.float32(rng.uniform(0, 0.22)) * np.cos(wave * angles + rng.uniform(0, 6.3))
    return Shape(_polar(radii.clip(0.15), angles))


def stroke(rng: Generator) -> Shape:
    """A bent band: a line, a zigzag or a wave, open at both ends."""
    count = int(rng.integers(2, 7))
    middle = np.stack([np.linspace(-1, 1, count), rng.uniform(-0.5, 0.5, count)], 1)
    across = np.array([0, rng.uniform(0.03, 0.12)])
    return Shape(np.concatenate([middle - across, (middle + across)[::-1]]).astype(np.float32))


def arc(rng: Generator) -> Shape:
    """A piece of a ring, at most half of it."""
    start, turn = rng.uniform(0, 6.3), rng.uniform(0.8, 3.0)
    inner = _circle(rng.uniform(0.7, 0.9), start, turn, 20)
    return Shape(np.concatenate([_circle(1.0, start, turn, 20), inner[::-1]]))


DISTRACTORS = (blob, stroke, arc)


def pose(shape: Shape, longest: float, rng: Generator) -> Shape:
    """Turned, squashed and slanted at random; the longest side of its box is `longest` pixels.

    The box's corner is at 0.
    """
    angle, slant = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2)
    cos, sin = np.cos(angle), np.sin(angle)
    squash = np.array([[1, slant], [0, rng.uniform(0.72, 1.0)]])
    matrix = np.array([[cos, -sin], [sin, cos]]) @ squash
    turned = shape.moved(matrix.astype(np.float32), np.zeros(2, dtype=np.float32))
    low, high = turned.outer.min(0), turned.outer.max(0)
    scale = np.float32(longest / (high - low).max())
    return turned.moved(np.eye(2, dtype=np.float32) * scale, -low * scale)


def rasterize(shape: Shape) -> Mask:
    """Coverage of the pixels; pixel i spans [i, i + 1]."""
    low = np.floor(shape.outer.min(0)).astype(int)
    high = np.ceil(shape.outer.max(0)).astype(int) + 1
    size = (high - low) * SUPERSAMPLING
    image = Image.new("L", (int(size[0]), int(size[1])))
    draw = ImageDraw.Draw(image)
    for points, fill in ((shape.outer, 255), (shape.hole, 0)):
        if points is not None:
            # Pillow's coordinates are those of pixel centres.
            draw.polygon(((points - low) * SUPERSAMPLING - 0.5).ravel().tolist(), fill=fill)
    coverage = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)
    return Mask(int(low[0]), int(low[1]), coverage)


def smooth_noise(rng: Generator, height: int, width: int, cells: int) -> Floats:
    """(h, w) values 0..1 that change over about 1/cells of the longer side."""
    longest = max(height, width)
    rows, columns = (max(2, round(cells * side / longest)) for side in (height, width))
    grid = Image.fromarray(rng.integers(0, 256, (rows, columns), dtype=np.uint8))
    smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / np.float32(255)


PATTERNS = 6


def surface(
    rng: Generator, height: int, width: int, color: Floats, kind: int | None = None
) -> Floats:
    """(h, w, 3) colours 0..255: a pattern (0..5, random if None) from one colour to another."""
    other = color + rng.normal(0, 45, 3).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 14)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
    kind = int(rng.integers(0, PATTERNS)) if kind is None else kind
    if kind == 0:
        pattern = np.zeros((height, width), dtype=np.float32)
    elif kind == 1:
        pattern = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    elif kind == 2:
        pattern = (np.sin(along * (2 * np.pi / period)) > rng.uniform(-0.5, 0.5)) * 1.0
    elif kind == 3:
        pattern = ((along // period + across // period) % 2).astype(np.float32)
    elif kind == 4:
        waves = np.sin(along * (2 * np.pi / period)) * np.sin(across * (2 * np.pi / period))
        pattern = (waves > 0.45) * 1.0
    else:
        pattern = smooth_noise(rng, height, width, int(rng.integers(2, 9)))
    return (color + pattern[..., None] * (other - color)).astype(np.float32)

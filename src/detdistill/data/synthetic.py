"""The built-in data set: cluttered scenes of shapes, drawn by seed, any number of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from detdistill.data import shapes
from detdistill.data.files import new_folder
from detdistill.errors import UserError

VERSION = 1
"""Of the drawing; another version draws other images from the same seed."""

MIN_VISIBLE = 0.5
"""Share of an object's pixels that stays uncovered and inside the image."""

TYPICAL = 0.6
"""Share of objects in their class's typical colour, and of those with its typical pattern."""

_SPLITS = {"train": 0, "val": 1, "test": 2}
_JPEG_QUALITY = 92
_SMALLEST, _LARGEST = 8.0, 100.0  # longest side of an object's box in pixels
_PIXELS_PER_OBJECT = 64 * 64
_TRIES = 6


@dataclass(frozen=True)
class Scene:
    """A drawn image.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        boxes_xyxy: full extent of each object, clipped to the image, in pixels.
        labels: 0..K-1, the order of `shapes.CLASSES`.
    """

    image: NDArray[np.uint8]
    boxes_xyxy: list[tuple[float, float, float, float]]
    labels: list[int]


def generate_dataset(
    folder: str | Path,
    *,
    seed: int = 0,
    train: int = 2000,
    val: int = 400,
    test: int = 1000,
    size: int = 192,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a COCO folder of generated scenes and returns it.

    Image i of a split depends on (seed, split, i, size) alone, so a longer split begins with the
    shorter one. The folder appears only when complete; one from the same arguments stays as it is.

    Args:
        folder: where to.
        seed: other seeds give other images.
        train: number of images.
        val: number of images.
        test: number of images.
        size: height and width in pixels.
        progress: called with (images done, all).
    """
    folder = Path(folder)
    info = _info(seed, {"train": train, "val": val, "test": test}, size)
    if not _is_same(folder, info):
        with new_folder(folder) as unfinished:
            _write(unfinished, info, progress or (lambda done, total: None))
    return folder


def _info(seed: int, counts: dict[str, int], size: int) -> dict[str, Any]:
    """What identifies a data set; stored in each of its annotation files."""
    if min(counts.values()) < 1 or size < 64 or seed < 0:
        raise UserError(
            f"generated data: need at least 1 image a split, a size of at least 64 px and a seed "
            f"of at least 0; found {counts}, size {size}, seed {seed}"
        )
    return {
        "description": "detdistill shapes",
        "generator_version": VERSION,
        "seed": seed,
        "size": size,
        "counts": counts,
    }


def _is_same(folder: Path, info: dict[str, Any]) -> bool:
    try:
        data = json.loads((folder / "annotations" / "test.json").read_text(encoding="utf-8"))
        return bool(data["info"] == info)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(folder: Path, info: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    total = sum(info["counts"].values())
    done = 0
    names = enumerate(shapes.CLASSES, 1)
    categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in names]
    for split, count in info["counts"].items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = draw_scene(info["seed"], split, index, info["size"])
            name = f"{split}_{index:06d}.jpg"
            Image.fromarray(scene.image).save(folder / "images" / name, quality=_JPEG_QUALITY)
            side = info["size"]
            images.append({"id": done + 1, "file_name": name, "height": side, "width": side})
            annotations += _annotations(scene, done + 1, len(annotations) + 1)
            done += 1
            progress(done, total)
        data = {
            "info": info,
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        text = json.dumps(data)
        (folder / "annotations" / f"{split}.json").write_text(text, encoding="utf-8")


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    entries = []
    for i, (box, label) in enumerate(zip(scene.boxes_xyxy, scene.labels, strict=True)):
        left, top, right, bottom = (round(side, 2) for side in box)
        width, height = round(right - left, 2), round(bottom - top, 2)
        entries.append(
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [left, top, width, height],
                "area": round(width * height, 2),
                "iscrowd": 0,
            }
        )
    return entries


def draw_scene(seed: int, split: str, index: int, size: int = 192) -> Scene:
    """One scene; equal arguments give equal pixels."""
    rng = np.random.default_rng([VERSION, seed, _SPLITS[split], index])
    canvas = _background(rng, size)
    for _ in range(rng.poisson(size * size / _PIXELS_PER_OBJECT * 0.6)):
        _paint(canvas, _distractor(rng, size), rng)
    objects = _Objects(size)
    for _ in range(1 + rng.poisson(max(0.0, size * size / _PIXELS_PER_OBJECT - 1))):
        mask = objects.place(rng)
        if mask is not None:
            _paint(canvas, mask, rng, objects.labels[-1])
    for _ in range(rng.poisson(1)):  # thin strokes may also cross the objects
        _paint(canvas, _distractor(rng, size, shapes.stroke), rng)
    return Scene(_photograph(canvas, rng), objects.boxes_xyxy, objects.labels)


class _Objects:
    """The objects of a scene and who is seen at which pixel."""

    def __init__(self, size: int) -> None:
        self.boxes_xyxy: list[tuple[float, float, float, float]] = []
        self.labels: list[int] = []
        self._size = size
        self._owner = np.full((size, size), -1, dtype=np.int16)
        self._pixels: list[int] = []

    def place(self, rng: Generator) -> shapes.Mask | None:
        """Adds an object where enough of it and of all others is seen; None if no place is."""
        label = int(rng.integers(len(shapes.CLASSES)))
        largest = min(_LARGEST, self._size * 0.55)
        longest = _SMALLEST + (largest - _SMALLEST) * float(rng.random()) ** 1.2
        outline = list(shapes.CLASSES.values())[label](rng)
        posed = shapes.pose(outline, longest, rng)
        extent = posed.outer.max(0)
        for _ in range(_TRIES):
            offset = rng.uniform(-0.3 * extent, self._size - 0.7 * extent).astype(np.float32)
            moved = posed.moved(np.eye(2, dtype=np.float32), offset)
            mask = shapes.rasterize(moved)
            if self._claim(mask):
                low, high = moved.outer.min(0), moved.outer.max(0)
                box = np.concatenate([low, high]).clip(0, self._size).tolist()
                self.boxes_xyxy.append((box[0], box[1], box[2], box[3]))
                self.labels.append(label)
                return mask
        return None

    def _claim(self, mask: shapes.Mask) -> bool:
        solid = mask.coverage > 0.5
        rows, columns, inside = _overlap(mask, self._size)
        window = self._owner[rows, columns]
        new = solid[inside]
        if new.sum() < MIN_VISIBLE * solid.sum():
            return False
        for number in np.unique(window[new]):
            if number >= 0:
                left = (self._owner == number).sum() - (window[new] == number).sum()
                if left < MIN_VISIBLE * self._pixels[number]:
                    return False
        window[new] = len(self._pixels)
        self._pixels.append(int(solid.sum()))
        return True


def _overlap(mask: shapes.Mask, size: int) -> tuple[slice, slice, tuple[slice, slice]]:
    """Rows and columns of the canvas under a mask, and the same part of the mask."""
    height, width = mask.coverage.shape
    top, bottom = max(mask.top, 0), max(min(mask.top + height, size), 0)
    left, right = max(mask.left, 0), max(min(mask.left + width, size), 0)
    inside = (slice(top - mask.top, bottom - mask.top), slice(left - mask.left, right - mask.left))
    return slice(top, bottom), slice(left, right), inside


def _background(rng: Generator, size: int) -> shapes.Floats:
    """(size, size, 3): colours that drift, with finer structure on top."""
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = rng.uniform(40, 215, 3)
    for cells, strength in ((3, 60), (9, 45), (int(rng.integers(20, 60)), 40)):
        noise = shapes.smooth_noise(rng, size, size, cells)[..., None] - np.float32(0.5)
        canvas += noise * rng.normal(0, strength, 3).astype(np.float32)
    return canvas


def _distractor(
    rng: Generator, size: int, kind: Callable[[Generator], shapes.Shape] | None = None
) -> shapes.Mask:
    """Something that is no object."""
    if kind is None:
        kind = shapes.DISTRACTORS[int(rng.integers(len(shapes.DISTRACTORS)))]
    longest = float(np.exp(rng.uniform(np.log(_SMALLEST), np.log(size * 0.7))))
    posed = shapes.pose(kind(rng), longest, rng)
    offset = rng.uniform(-longest / 2, size - longest / 2, 2).astype(np.float32)
    return shapes.rasterize(posed.moved(np.eye(2, dtype=np.float32), offset))


def _paint(
    canvas: shapes.Floats, mask: shapes.Mask, rng: Generator, label: int | None = None
) -> None:
    """Covers the canvas with a surface that differs a little from what is below.

    As with real things, a class has a typical colour and a typical pattern, which only some of its
    members show; anything else is random.
    """
    rows, columns, inside = _overlap(mask, len(canvas))
    below = canvas[rows, columns]
    if below.size == 0:
        return
    coverage = mask.coverage[inside][..., None] * np.float32(rng.uniform(0.9, 1.0))
    away, kind = rng.normal(0, 1, 3), None
    if label is not None and rng.random() < TYPICAL:
        hue = 2 * np.pi * (label / len(shapes.CLASSES) + np.array([0, 1 / 3, 2 / 3]))
        away = 128 + 110 * np.cos(hue) - below.mean((0, 1)) + rng.normal(0, 25, 3)
    if label is not None and rng.random() < TYPICAL:
        kind = label % shapes.PATTERNS
    away *= rng.uniform(80, 180) / max(float(np.linalg.norm(away)), 1e-6)
    color = (below.mean((0, 1)) + away).astype(np.float32)
    painted = shapes.surface(rng, below.shape[0], below.shape[1], color, kind)
    below += coverage * (painted - below)


def _photograph(canvas: shapes.Floats, rng: Generator) -> NDArray[np.uint8]:
    """Contrast, brightness, blur and noise of a poor camera."""
    contrast, brightness = rng.uniform(0.55, 1.1), rng.uniform(-30, 30)
    canvas = (canvas - 128) * np.float32(contrast) + np.float32(128 + brightness)
    if rng.random() < 0.4:
        blurred = Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(rng.uniform(0.4, 1.0))
        )
        canvas = np.asarray(blurred, dtype=np.float32)
    sigma = np.float32(rng.uniform(0, 9))
    canvas = canvas + rng.standard_normal(canvas.shape, dtype=np.float32) * sigma
    return canvas.clip(0, 255).astype(np.uint8)

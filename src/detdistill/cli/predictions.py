"""Predictions as a file and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detdistill.cli.checks import make_folder
from detdistill.data import read_image
from detdistill.detectors import FPNDetector
from detdistill.drawing.pictures import draw_detections, save_png
from detdistill.engine.checkpoint import write_text
from detdistill.errors import UserError
from detdistill.progress import Advance
from detdistill.structures import Detections

LOWEST_SCORE = 0.05
LONGEST = 50  # characters of an image's name in that of its picture


def write_predictions(
    detector: FPNDetector,
    images: list[Path],
    out: Path,
    score: float,
    advance: Advance,
) -> int:
    """Writes `predictions.json` and one picture per image.

    The file holds all boxes from `LOWEST_SCORE` on (from `score` on, if that is lower), the
    pictures those from `score` on.

    Returns:
        The number of boxes in the file.
    """
    found = []
    for path in images:
        # Only boxes are kept, not pixels: thousands of pictures need not fit into memory.
        found += detector.predict([read_image(path)], score_threshold=min(score, LOWEST_SCORE))
        advance(1)
    # Nothing is written before every image was read, so that a bad one leaves no half result.
    pictures = [out / f"{i:04d}_{path.stem[:LONGEST]}.png" for i, path in enumerate(images)]
    for picture in pictures:
        if picture.exists():
            raise UserError(f"{picture}: already exists; choose another --out")
    make_folder(out)
    try:
        records = _draw(detector, images, found, pictures, score)
        write_text(out / "predictions.json", json.dumps(records, indent=1) + "\n")
    except BaseException:
        for picture in pictures:
            picture.unlink(missing_ok=True)
        raise
    return sum(len(detections) for detections in found)


def _draw(
    detector: FPNDetector,
    images: list[Path],
    found: list[Detections],
    pictures: list[Path],
    score: float,
) -> list[dict[str, Any]]:
    """Saves a picture per image; returns what `predictions.json` says."""
    names, records = _class_names(detector), []
    for path, detections, picture in zip(images, found, pictures, strict=True):
        pixels = read_image(path)
        save_png(draw_detections(pixels, detections, names, score), picture)
        records.append(
            {
                "image": str(path),
                "height": pixels.shape[1],
                "width": pixels.shape[2],
                "picture": picture.name,
                "detections": _plain(detections, names),
            }
        )
    return records


def _class_names(detector: FPNDetector) -> list[str]:
    return detector.classes or [str(label) for label in range(detector.num_classes)]


def _plain(detections: Detections, names: list[str]) -> list[dict[str, Any]]:
    """Best first; boxes in pixels of the image file as it is shown upright."""
    rows = zip(
        detections.boxes_xyxy.tolist(),
        detections.scores.tolist(),
        detections.labels.tolist(),
        strict=True,
    )
    return [
        {"class": names[label], "label": label, "score": score, "box_xyxy": box}
        for box, score, label in rows
    ]

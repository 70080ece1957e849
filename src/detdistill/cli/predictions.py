"""Predictions as a file and as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detdistill.cli.checks import make_folder
from detdistill.data import read_image
from detdistill.detectors import FPNDetector
from detdistill.drawing.pictures import draw_detections, save_png
from detdistill.engine.checkpoint import write_text
from detdistill.structures import Detections

LOWEST_SCORE = 0.05


def write_predictions(
    detector: FPNDetector,
    images: list[Path],
    out: Path,
    score: float,
    advance: Callable[[], None],
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
        advance()
    # Nothing is written before every image was read, so that a bad one leaves no half result.
    names = _class_names(detector)
    make_folder(out)
    records = []
    for index, (path, detections) in enumerate(zip(images, found, strict=True)):
        pixels = read_image(path)
        picture = f"{index:04d}_{path.stem}.png"
        save_png(draw_detections(pixels, detections, names, score), out / picture)
        records.append(
            {
                "image": str(path),
                "height": pixels.shape[1],
                "width": pixels.shape[2],
                "picture": picture,
                "detections": _plain(detections, names),
            }
        )
    write_text(out / "predictions.json", json.dumps(records, indent=1) + "\n")
    return sum(len(detections) for detections in found)


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

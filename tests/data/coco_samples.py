"""A small COCO data set, and its annotation file written anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detdistill.recipe import Recipe

Json = dict[str, Any]


def coco_dict() -> Json:
    """Three images of 40x30 pixels (the last one empty), two classes with sparse ids."""
    names = ("a.png", "b.png", "c.png")
    return {
        "images": [
            {"id": number, "file_name": name, "width": 40, "height": 30}
            for number, name in zip((11, 5, 20), names, strict=True)
        ],
        "annotations": [
            {"id": 1, "image_id": 11, "category_id": 90, "bbox": [2, 3, 10, 8], "area": 70.5},
            {"id": 2, "image_id": 11, "category_id": 7, "bbox": [20.25, 5.5, 12, 20]},
            {"id": 3, "image_id": 5, "category_id": 7, "bbox": [0, 0, 40, 30], "iscrowd": 1},
            {"id": 4, "image_id": 5, "category_id": 7, "bbox": [1, 1, 5, 5], "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
    }


def rewrite(folder: Path, data: Json, split: str = "train") -> Recipe:
    """Replaces the annotation file alone."""
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(data))
    return Recipe(data=str(folder))

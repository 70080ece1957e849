"""A small COCO folder that a test may change before it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.coco_samples import Json, coco_dict

WriteFolder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Writes `images/` and `annotations/<split>.json`; random pixels."""

    def write(data: Json | None = None, split: str = "train") -> Path:
        data = data or coco_dict()
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        pixels = np.random.default_rng(0)
        for entry in data["images"]:
            shape = (entry["height"], entry["width"], 3)
            image = Image.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8))
            image.save(tmp_path / "images" / entry["file_name"])
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(data))
        return tmp_path

    return write

"""COCO folders written as others lay data out, and small data of these formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from detdistill.data import DetectionDataset, open_dataset
from detdistill.recipe import Recipe

SPLITS = ("train", "val", "test")


def picture(path: Path, width: int = 40, height: int = 30, **options: object) -> Path:
    """Random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def text(path: Path, lines: Iterable[str]) -> Path:
    """A text file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def opened(data: Path, split: str = "train", **options: object) -> DetectionDataset:
    return open_dataset(Recipe(data=str(data), **options), split)


def xml(objects: str = "", size: tuple[int, int] | None = (40, 30)) -> str:
    """A VOC file; size is (width, height)."""
    sides = "" if size is None else f"<width>{size[0]}</width><height>{size[1]}</height>"
    return f"<annotation><size>{sides}</size>{objects}</annotation>"


def voc_object(name: str, *corners: object, difficult: object = 0) -> str:
    pairs = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in pairs)
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<bndbox>{sides}</bndbox></object>"
    )


def write_yolo(coco: Path, out: Path) -> Path:
    """`images/<split>`, `labels/<split>` and `data.yaml`; six digits, as YOLO tools write."""
    for split in SPLITS:
        dataset = opened(coco, split)
        for record in dataset.records:
            image = out / "images" / split / record.path.name
            image.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(record.path, image)
            lines = []
            for label, box in zip(record.labels.tolist(), record.boxes_xyxy.tolist(), strict=True):
                left, top, right, bottom = box
                x, w = (left + right) / 2 / record.width, (right - left) / record.width
                y, h = (top + bottom) / 2 / record.height, (bottom - top) / record.height
                lines.append(f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}")
            text(out / "labels" / split / f"{image.stem}.txt", lines)
    names = [f"  {number}: {name}" for number, name in enumerate(dataset.classes)]
    text(out / "data.yaml", [f"{s}: images/{s}" for s in SPLITS] + ["names:", *names])
    return out


def write_voc(coco: Path, out: Path) -> Path:
    """`VOC2007` with its lists."""
    for split in SPLITS:
        dataset = opened(coco, split)
        for record in dataset.records:
            image = out / "VOC2007" / "JPEGImages" / record.path.name
            image.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(record.path, image)
            objects = ""
            for label, box in zip(record.labels.tolist(), record.boxes_xyxy.tolist(), strict=True):
                corners = (box[0] + 1, box[1] + 1, box[2], box[3])
                objects += voc_object(dataset.classes[label], *corners)
            content = xml(objects, (record.width, record.height))
            text(out / "VOC2007" / "Annotations" / f"{image.stem}.xml", [content])
        stems = [record.path.stem for record in dataset.records]
        text(out / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt", stems)
    text(out / "VOC2007" / "classes.txt", dataset.classes)
    return out


def write_devkit(out: Path) -> Path:
    """What VOC's archives unpack to, in small: two years, and a public test in the first alone."""
    sizes = {
        "VOC2007": {"train": 5, "val": 5, "test": 4},
        "VOC2012": {"train": 6, "val": 6},
    }
    for year, splits in sizes.items():
        stems = {
            split: [f"{'2008_' * (year == 'VOC2012')}{split}{i}" for i in range(count)]
            for split, count in splits.items()
        }
        for stem in (stem for names in stems.values() for stem in names):
            picture(out / year / f"JPEGImages/{stem}.jpg")
            objects = voc_object("dog", 1, 1, 20, 20) + voc_object("cat", 11, 6, 40, 30)
            text(out / year / f"Annotations/{stem}.xml", [xml(objects)])
        for split, names in (stems | {"trainval": stems["train"] + stems["val"]}).items():
            text(out / year / f"ImageSets/Main/{split}.txt", names)
    return out


def write_roboflow(coco: Path, out: Path) -> Path:
    """A folder a split, the JSON file beside the images, and a category that groups the others."""
    for split, name in zip(SPLITS, ("train", "valid", "test"), strict=True):
        data = opened(coco, split).ground_truth()
        for entry in data["categories"]:
            entry["supercategory"] = "shapes"
        data["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        (out / name).mkdir(parents=True)
        (out / name / "_annotations.coco.json").write_text(json.dumps(data))
        for entry in data["images"]:
            shutil.copy(coco / "images" / entry["file_name"], out / name)
    return out

"""Small detectors and batches that tests share."""

import inspect
import json
from pathlib import Path

import torch
from PIL import Image

from detdistill import Batch, create_detector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import split_name
from detdistill.detectors.registry import FAMILIES
from detdistill.parts.backbones import PLAIN_RESNETS

NARROW = {"base_channels": 8, "fpn_channels": 16}
FAMILIES_R18 = [f"{family}_r18" for family in FAMILIES.names()]
DENSE_R18 = [
    name for name in FAMILIES_R18 if issubclass(FAMILIES.get(name[: -len("_r18")]), DenseDetector)
]
TWO_STAGE_R18 = [name for name in FAMILIES_R18 if name not in DENSE_R18]
NARROW_HEADS = {"tower_channels": 16, "roi_channels": 32}


BROKEN = "broken.png: the image is damaged"


def break_an_image(folder, split):
    """Spoils the middle of an image of a COCO folder, which looks whole; returns its file."""
    source = folder / "annotations" / f"{split}.json"
    values = json.loads(source.read_text())
    entry = values["images"][len(values["images"]) // 2]
    image = Image.open(folder / "images" / entry["file_name"])
    file = folder / "images" / "broken.png"  # of a JPEG no decoder would tell
    image.save(file)
    entry["file_name"] = file.name
    source.write_text(json.dumps(values))
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes(99) + content[middle + 99 :])
    return file


def narrow_options(name):
    """`NARROW` and the width of the head that the named detector has; only ResNets narrow."""
    family, options = split_name(name, {})
    known = inspect.signature(FAMILIES.get(family)).parameters
    widths = {**NARROW, **{key: width for key, width in NARROW_HEADS.items() if key in known}}
    if options.get("backbone", "resnet18").removesuffix("_caffe") not in PLAIN_RESNETS:
        del widths["base_channels"]
    return widths


def narrow(name="gfl_r18", num_classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return create_detector(name, num_classes, **{**narrow_options(name), **options})


def make_batch(counts=(2, 1), size=(64, 96), num_classes=3, seed=0):
    """Random uint8 images with the given numbers of boxes; the last image is smaller."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    images = torch.randint(0, 256, (len(counts), 3, height, width), generator=generator)
    sizes = [(height, width)] * (len(counts) - 1) + [(height - 24, width - 33)]
    targets = []
    for count, (h, w) in zip(counts, sizes, strict=True):
        low = torch.rand(count, 2, generator=generator) * torch.tensor([w / 2, h / 2])
        side = torch.rand(count, 2, generator=generator) * 20 + 10
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        targets.append({"boxes": torch.cat((low, low + side), 1), "labels": labels})
    return Batch(images.to(torch.uint8), sizes, targets, list(range(len(counts))))


def is_alive(pid):
    """Whether a process, given by its number as text, still runs."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

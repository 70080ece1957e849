"""Each detector learns eight images by heart: a check that it learns at all, no measure of it."""

import math
from itertools import count, islice

import pytest
import torch

from detdistill import Batch
from detdistill.data.shapes import CLASSES
from detdistill.data.synthetic import draw_scene
from detdistill.evaluation.coco import coco_metrics
from tests.helpers import DENSE_R18, FAMILIES_R18, narrow

IMAGES, SIZE = 8, 128
SMALLEST = 20  # pixels: anchors of 32 and cells of 8 reach such a side
# Narrow, but wide enough to hold the 21 objects: with 16 channels boxes stay inexact.
DENSE = {"fpn_channels": 64, "tower_channels": 64}
TWO_STAGE = {"fpn_channels": 32, "roi_channels": 256, "roi_samples": 64}
# Most need 100 to 300 steps; FCOS, whose towers have no normalisation, 800.
STEPS, LOOK_EVERY, WARM_UP, RATE = 1000, 50, 20, 4e-3


def eight_images():
    """The first of the built-in images that hold no object smaller than `SMALLEST`."""
    scenes = (draw_scene(0, "train", index, SIZE) for index in count())
    chosen = list(islice((scene for scene in scenes if least_side(scene) >= SMALLEST), IMAGES))
    return Batch(
        torch.stack([torch.tensor(scene.image).permute(2, 0, 1) for scene in chosen]),
        [(SIZE, SIZE)] * IMAGES,
        [
            {"boxes": torch.tensor(scene.boxes_xyxy), "labels": torch.tensor(scene.labels)}
            for scene in chosen
        ],
    )


def least_side(scene):
    return min(min(right - x, bottom - y) for x, y, right, bottom in scene.boxes_xyxy)


def coco_box(box_xyxy):
    x, y, right, bottom = box_xyxy
    return {"bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y), "iscrowd": 0}


def average_precision(detector, batch):
    """AP on the images of a batch, 0..100."""
    boxes = [
        {"image_id": image, "category_id": label, **coco_box(box)}
        for image, target in enumerate(batch.targets)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
    ]
    truth = {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(IMAGES)],
        "annotations": [{"id": i, **box} for i, box in enumerate(boxes, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
    }
    found = [
        {"image_id": image, "category_id": label, "score": score, **coco_box(box)}
        for image, one in enumerate(detector.predict(batch.images))
        for box, score, label in zip(
            one.boxes_xyxy.tolist(), one.scores.tolist(), one.labels.tolist(), strict=True
        )
    ]
    return 100 * coco_metrics(truth, found).numbers["AP"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES_R18)
def test_overfits_eight_images(name):
    widths = DENSE if name in DENSE_R18 else TWO_STAGE
    detector, batch = narrow(name, len(CLASSES), **widths).train(), eight_images()
    targets = batch.padded_targets()
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0.0)
    reached = []
    for step in range(STEPS):
        rate = RATE * min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = sum(detector.loss(detector(batch), targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        if (step + 1) % LOOK_EVERY == 0:
            reached.append(average_precision(detector, batch))
            if reached[-1] >= 90:
                return
    pytest.fail(f"{name}: AP after each {LOOK_EVERY} steps: {[round(ap, 1) for ap in reached]}")

"""Times the COCO evaluation of 5,000 images with 100 detections each.

python benchmarks/evaluator.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import numpy as np

from detdistill.evaluation.coco import coco_metrics

CLASSES = 80
OBJECTS_PER_IMAGE = 7


def random_boxes(random: np.random.Generator, count: int) -> list[list[float]]:
    corner = random.random((count, 2)) * [400, 300]
    return np.concatenate([corner, random.random((count, 2)) * 150 + 5], 1).tolist()


def make_case(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    random = np.random.default_rng(0)
    boxes = random_boxes(random, images * OBJECTS_PER_IMAGE)
    labels = random.integers(1, CLASSES + 1, len(boxes)).tolist()
    truth = {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(images)],
        "annotations": [
            {
                "id": i,
                "image_id": i // OBJECTS_PER_IMAGE,
                "category_id": label,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (box, label) in enumerate(zip(boxes, labels, strict=True))
        ],
        "categories": [{"id": k, "name": str(k)} for k in range(1, CLASSES + 1)],
    }
    boxes = random_boxes(random, images * detections)
    labels = random.integers(1, CLASSES + 1, len(boxes)).tolist()
    scores = random.random(len(boxes)).tolist()
    results = [
        {"image_id": i // detections, "category_id": label, "bbox": box, "score": score}
        for i, (box, label, score) in enumerate(zip(boxes, labels, scores, strict=True))
    ]
    return truth, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    truth, results = make_case(arguments.images, arguments.detections)
    seconds = []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        coco_metrics(truth, results)
        seconds.append(time.perf_counter() - start)
    print(
        f"{arguments.images} images x {arguments.detections} detections: "
        f"{statistics.median(seconds):.2f} s (median of {arguments.repeats}) on "
        f"{platform.processor() or platform.machine()}"
    )


if __name__ == "__main__":
    main()

"""Whether two openings of a data set are of the same data."""

from __future__ import annotations

import hashlib

import torch

from detdistill.data.dataset import DetectionDataset


def fingerprint(dataset: DetectionDataset) -> str:
    """Hexadecimal; of classes, images and boxes, not of pixels (which would take minutes)."""
    images = [(r.image_id, r.path.name, r.height, r.width) for r in dataset.records]
    digest = hashlib.sha256(repr((dataset.classes, dataset.category_ids, images)).encode())
    for name in ("boxes_xyxy", "labels", "crowd", "areas"):
        digest.update(torch.cat([getattr(r, name) for r in dataset.records]).numpy().tobytes())
    # Which box belongs to which image is not in the columns above.
    digest.update(repr([len(r.labels) for r in dataset.records]).encode())
    return digest.hexdigest()

from pathlib import Path

import pytest
import torch

from detdistill.data import DetectionDataset, ImageRecord, generate_dataset, open_dataset
from detdistill.recipe import Recipe


def levels(findings):
    return [finding.level for finding in findings]


def dataset_of(
    boxes, labels=None, split="train", classes=("cat", "dog"), size=(100, 200), faults=()
):
    """A split of one record per list of xyxy boxes; all labels 0 if not given."""
    records = []
    for i, image_boxes in enumerate(boxes):
        found = torch.tensor(image_boxes, dtype=torch.float32).reshape(-1, 4)
        own = [0] * len(found) if labels is None else labels[i]
        records.append(
            ImageRecord(
                image_id=i,
                path=Path(f"{split}_{i}.png"),
                height=size[0],
                width=size[1],
                boxes_xyxy=found,
                labels=torch.tensor(own, dtype=torch.int64),
                crowd=torch.zeros(len(found), dtype=torch.bool),
                areas=(found[:, 2:] - found[:, :2]).prod(1).double(),
            )
        )
    stated = torch.cat([r.boxes_xyxy for r in records]).double()
    stated[:, 2:] -= stated[:, :2]
    ids = list(range(1, len(classes) + 1))
    source = Path(f"{split}.json")
    return DetectionDataset(records, list(classes), ids, split, source, list(faults), stated)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "shapes"
    return generate_dataset(folder, train=8, val=4, test=2, size=64)


@pytest.fixture
def recipe(shapes):
    small = {"resize_short": [64], "resize_long": 64, "workers": 0, "batch_size": 2}
    return Recipe(data=str(shapes), student="gfl_r18", epochs=100, **small)


@pytest.fixture(scope="session")
def val(shapes):
    settings = Recipe(data=str(shapes), resize_short=[64], resize_long=64, workers=0)
    return open_dataset(settings, "val")

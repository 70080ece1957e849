"""From a detector's boxes to COCO results in pixels of the original images."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from detdistill.errors import UserError
from detdistill.evaluation.coco import NUMBERS
from detdistill.evaluation.run import detect_dataset, evaluate, evaluate_dataset
from detdistill.evaluation.speed import count_parameters, latency_ms
from detdistill.recipe import Recipe
from detdistill.structures import Detections

SIZES = {11: (60, 90), 12: (80, 40), 13: (200, 100)}  # image id -> (h, w)
BOXES = {11: (3, [9.0, 6, 45, 30]), 12: (8, [4.0, 8, 30, 60]), 13: (8, [10.0, 20, 90, 180])}


@pytest.fixture
def folder(tmp_path):
    """Three images of unlike sizes, category ids 3 and 8."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    images, annotations = [], []
    for image_id, (height, width) in SIZES.items():
        Image.new("RGB", (width, height), (image_id, 0, 0)).save(
            tmp_path / "images" / f"{image_id}.png"
        )
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
        )
        category, (x1, y1, x2, y2) = BOXES[image_id]
        bbox = [x1, y1, x2 - x1, y2 - y1]
        annotations.append(
            {
                "id": image_id,
                "image_id": image_id,
                "category_id": category,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
            }
        )
    categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations" / "test.json").write_text(json.dumps(data))
    return tmp_path


class KnowsAll(nn.Module):
    """Reads the image's id from its red channel and answers with the truth in batch pixels."""

    num_classes = 2
    input_size = None

    def __init__(self, classes=None, grow=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.classes, self.grow = classes, grow

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        return batch.images[:, 0, 0, 0].tolist()

    def detect(self, output, sizes):
        return [self._answer(image_id, size) for image_id, size in zip(output, sizes, strict=True)]

    def _answer(self, image_id, size):
        category, box = BOXES[image_id]
        height, width = SIZES[image_id]
        boxes = torch.tensor([box]) + torch.tensor([-1, -1, 1, 1]) * self.grow
        scale = torch.tensor([size[1] / width, size[0] / height] * 2)
        label = (self.classes or ["cat", "dog"]).index({3: "cat", 8: "dog"}[category])
        return Detections(boxes * scale, torch.tensor([0.9]), torch.tensor([label]))


def settings(folder, **changes):
    values = {"data": str(folder), "resize_short": [64], "resize_long": 96, "workers": 0}
    return Recipe(**values, eval_batch=2, **changes)


def open_test(folder):
    from detdistill.data import open_dataset

    return open_dataset(settings(folder), "test")


def test_boxes_return_to_original_pixels(folder):
    detector = KnowsAll().train()
    seen = []
    results = detect_dataset(detector, open_test(folder), settings(folder), "cpu", seen.append)
    assert detector.training, "the mode must be restored"
    assert sum(seen) == 3 and len(seen) == 2
    assert [result["image_id"] for result in results] == [11, 12, 13]
    for result in results:
        category, (x1, y1, x2, y2) = BOXES[result["image_id"]]
        assert result["category_id"] == category
        assert result["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
        assert result["score"] == pytest.approx(0.9)


def test_boxes_are_clipped_to_the_original_image(folder):
    dataset = open_test(folder)
    for result in detect_dataset(KnowsAll(grow=500.0), dataset, settings(folder), "cpu"):
        height, width = SIZES[result["image_id"]]
        assert result["bbox"] == [0, 0, width, height]


def test_classes_are_matched_by_name(folder):
    dataset = open_test(folder)
    turned = KnowsAll(classes=["dog", "cat"])
    metrics = evaluate_dataset(turned, dataset, settings(folder), "cpu")
    assert metrics.numbers["AP"] == pytest.approx(1.0)
    assert metrics.per_class == pytest.approx({"cat": 1.0, "dog": 1.0})


def test_other_classes_are_refused(folder):
    dataset = open_test(folder)
    with pytest.raises(UserError, match=r"class 'bird' is not among .*test\.json"):
        detect_dataset(KnowsAll(classes=["bird", "cat"]), dataset, settings(folder), "cpu")
    detector = KnowsAll()
    detector.num_classes = 80
    with pytest.raises(UserError, match=r"80 classes, but .*test\.json has 2"):
        detect_dataset(detector, dataset, settings(folder), "cpu")


def test_a_failure_leaves_every_module_in_its_mode(folder):
    detector = KnowsAll()
    detector.train()
    detector.detect = None
    with pytest.raises(TypeError):
        detect_dataset(detector, open_test(folder), settings(folder), "cpu")
    assert detector.training


def test_public_evaluate(folder):
    numbers = evaluate(KnowsAll(), folder, resize_short=64, resize_long=96)
    assert tuple(numbers) == NUMBERS
    assert numbers["AP"] == pytest.approx(1.0) and numbers["APl"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"resize_short": 0}, r"evaluate: resize_short\.0"),
        ({"resize_short": 800}, "evaluate: resize_short 800 is never reached.*give both"),
        ({"batch_size": 0}, "evaluate: eval_batch"),
    ],
)
def test_public_evaluate_refuses_in_a_sentence(folder, given, message):
    with pytest.raises(UserError, match=message):
        evaluate(KnowsAll(), folder, **given)


class Seen(nn.Module):
    """Notes what it is asked to predict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("running", torch.zeros(7))
        self.images = []

    def predict(self, images):
        assert not self.training
        self.images.extend(images)


def test_latency_runs_predict_one_image_at_a_time():
    detector = Seen().train()
    assert latency_ms(detector, 48, 80, "cpu", repeats=4) > 0
    assert detector.training and len(detector.images) == 7
    assert {tuple(image.shape) for image in detector.images} == {(3, 48, 80)}
    given = torch.zeros((3, 5, 6), dtype=torch.uint8)
    latency_ms(detector, 5, 6, "cpu", repeats=1, image=given)
    assert torch.equal(detector.images[-1], given)


def test_count_parameters_leaves_buffers_out():
    assert count_parameters(Seen()) == 8

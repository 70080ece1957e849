"""Drawn boxes: where, in which colour, and on which size of picture."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from detdistill.drawing.pictures import (
    Layer,
    class_colours,
    draw_boxes,
    draw_detections,
    draw_layers,
    jpeg_data_uri,
    save_png,
)
from detdistill.structures import Detections

CLASSES = ["cat", "dog"]


def grey(height, width):
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def test_boxes_have_the_colour_of_their_class():
    image = grey(480, 640)
    boxes = torch.tensor([[100.0, 100, 300, 200], [400, 300, 500, 400]])
    drawn = draw_boxes(image, boxes, torch.tensor([0, 1]), CLASSES)
    cat, dog = (torch.tensor(colour, dtype=torch.uint8) for colour in class_colours(2))
    assert drawn.shape == image.shape
    assert torch.equal(drawn[:, 200, 200], cat)
    assert torch.equal(drawn[:, 400, 450], dog)
    assert torch.equal(drawn[:, 150, 200], image[:, 150, 200])
    assert (image == 128).all(), "the given image must stay as it was"


def test_small_images_are_enlarged_by_a_whole_factor():
    drawn = draw_boxes(
        grey(64, 100), torch.tensor([[10.0, 30, 50, 60]]), torch.tensor([0]), CLASSES
    )
    assert drawn.shape == (3, 256, 400)
    cat = torch.tensor(class_colours(1)[0], dtype=torch.uint8)
    assert torch.equal(drawn[:, 180, 40], cat)


def test_only_confident_detections_are_drawn():
    image = grey(400, 400)
    boxes = torch.tensor([[50.0, 50, 90, 90], [200, 200, 300, 300]])
    found = Detections(boxes, torch.tensor([0.1, 0.1]), torch.tensor([0, 1]))
    assert torch.equal(draw_detections(image, found, CLASSES), image)
    assert not torch.equal(draw_detections(image, found, CLASSES, score_threshold=0.05), image)


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [399, 399, 410, 410], [-5, -5, 1000, 1000]])
def test_boxes_at_and_beyond_the_border(box):
    boxes = torch.tensor([box], dtype=torch.float32)
    drawn = draw_boxes(grey(400, 400), boxes, torch.tensor([1]), CLASSES, torch.tensor([0.9]))
    assert drawn.shape == (3, 400, 400)


def test_colours_of_eighty_classes_differ():
    assert len(set(class_colours(80))) == 80


def test_png_and_data_uri(tmp_path):
    image = grey(300, 600)
    save_png(image, tmp_path / "a.png")
    stored = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(stored, image.permute(1, 2, 0).numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    kind, data = jpeg_data_uri(image, longest=200).split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (200, 100)


def test_layers_are_drawn_in_order_with_their_colours():
    image = grey(400, 400)
    box = torch.tensor([[100.0, 100, 300, 300]])
    drawn = draw_layers(image, [Layer(box, "#ff0000"), Layer(box, "#00ff00")])
    assert drawn[:, 100, 200].tolist() == [0, 255, 0]
    assert drawn[:, 200, 200].tolist() == [128, 128, 128]
    assert torch.equal(draw_layers(image, []), image)


def test_dashes_leave_gaps_and_keep_the_corners():
    box = torch.tensor([[100.0, 100, 300, 300]])
    drawn = draw_layers(grey(400, 400), [Layer(box, "#00ff00", dashed=True)])
    side = drawn[:, 100, 100:301].T.tolist()
    assert side[0] == side[-1] == [0, 255, 0]
    assert 20 < side.count([128, 128, 128]) < 120


def test_layers_beyond_the_border_stay_visible():
    drawn = draw_layers(grey(400, 400), [Layer(torch.tensor([[-50.0, -50, 900, 900]]), "#00ff00")])
    assert drawn[:, 1, 200].tolist() == [0, 255, 0]
    assert drawn[:, 200, 398].tolist() == [0, 255, 0]

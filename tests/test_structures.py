"""Records: what can be read from them in two ways agrees."""

import warnings

import pytest
import torch
from torchvision.tv_tensors import BoundingBoxes

from detdistill import Batch, Distiller, UserError, UserNotice
from detdistill.structures import flatten_maps, rows_of_maps
from tests.helpers import narrow


def test_rows_of_maps_are_those_of_the_flattened_maps():
    maps = [torch.randn(2, 3, 5, h, w) for h, w in ((4, 6), (2, 3), (1, 1))]
    rows = sum(3 * h * w for h, w in ((4, 6), (2, 3), (1, 1)))
    image, row = torch.ones(2, rows, dtype=torch.bool).nonzero(as_tuple=True)
    order = torch.randperm(len(row))
    image, row = image[order], row[order]
    found = rows_of_maps(maps, image, row)
    assert torch.equal(found, flatten_maps(maps)[image, row])


def test_no_rows_keep_the_maps_gradient():
    level = torch.randn(2, 1, 3, 2, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    found = rows_of_maps([level], none, none)
    found.sum().backward()
    assert found.shape == (0, 3) and not level.grad.any()


def batch_of(*targets, images=1, sizes=1):
    return Batch(torch.zeros(images, 3, 64, 64), [(64, 64)] * sizes, targets)


def target(boxes, labels):
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}


BOX = [1.0, 1.0, 20.0, 30.0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (batch_of(target([BOX], [0]), sizes=2), "has 1 images, 2 sizes and 1 targets"),
        (batch_of(), "has 1 images, 1 sizes and 0 targets"),
        (batch_of(target([BOX, BOX], [0])), r"boxes \(2, 4\) and labels \(1,\)"),
        (batch_of(target(BOX, [0, 1, 2, 1])), r"boxes \(4,\) and labels \(4,\)"),
        (batch_of(target([BOX], [3])), "label 3; the student has classes 0 to 2"),
        (batch_of(target([BOX, BOX], [1, -1])), "a label below 0; the student has"),
        (batch_of(target([[1, 1, 9, float("nan")]], [0])), "expected finite x1, y1, x2, y2"),
        (batch_of(target([[1, 1, 9, float("inf")]], [0])), "expected finite x1, y1, x2, y2"),
        (
            batch_of(
                target([BOX], [0]), target([BOX, [40.0, 40, 20, 20]], [0, 1]), images=2, sizes=2
            ),
            r"target 1 of the batch holds the box \[40.0, 40.0, 20.0, 20.0\]; .* x1 < x2",
        ),
        (batch_of(target([[5, 5, 5, 9]], [0])), r"the box \[5.0, 5.0, 5.0, 9.0\]"),
        (batch_of(target([BOX], [1.5])), r"labels of torch.float32; expected whole numbers"),
        (batch_of(images=0, sizes=0), "has 0 images"),
        (
            Batch(torch.zeros(1, 3, 64, 96), [(96, 64)], [target([BOX], [0])]),
            r"64 x 96 pixels and sizes \[\(96, 64\)\]; expected \(h, w\)",
        ),
        (
            batch_of(
                {
                    **target([BOX], [0]),
                    "boxes": BoundingBoxes([BOX], format="XYWH", canvas_size=(64, 64)),
                }
            ),
            "boxes of format XYWH; expected XYXY",
        ),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(batch, message):
    with pytest.raises(UserError, match=message):
        Distiller(narrow())(batch)


def test_targets_may_hold_more_than_boxes_and_labels():
    given = {**target([BOX], [0]), "image_id": 3}
    given["boxes"] = BoundingBoxes(given["boxes"], format="XYXY", canvas_size=(64, 64))
    moved = batch_of(given).to("cpu")
    assert set(moved.targets[0]) == {"boxes", "labels"}
    assert moved.padded_targets().boxes.tolist() == [[BOX]]


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 40, 50), [torch.zeros(4, 40, 50)], [torch.zeros(3, 0, 5)], [None]]
)
def test_predict_says_which_images_it_takes(images):
    with pytest.raises(UserError, match=r"expected tensors \(3, h, w\), RGB, in a list"):
        narrow().predict(images)


def test_images_of_any_sizes_make_a_batch():
    images = [
        torch.full((3, 33, 20), 7, dtype=torch.uint8),
        torch.full((3, 10, 32), 9, dtype=torch.uint8),
    ]
    targets = [target([BOX], [0]), target([BOX, BOX], [1, 2])]
    batch = Batch.from_images(images, targets, [5, 6])
    padded = batch.images
    assert padded.shape == (2, 3, 64, 32) and padded.dtype == torch.uint8
    assert (padded[0, :, :33, :20] == 7).all() and padded[0].sum() == 3 * 33 * 20 * 7
    assert (padded[1, :, :10, :32] == 9).all() and padded[1].sum() == 3 * 10 * 32 * 9
    assert (batch.sizes, batch.image_ids) == ([(33, 20), (10, 32)], [5, 6])
    terms = Distiller(narrow())(batch)
    assert sum(terms.values()).isfinite()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "was given no image;"),
        ([torch.zeros(3, 8, 8), torch.zeros(8, 8, 3)], r"a Tensor of shape \(8, 8, 3\)"),
        ([torch.zeros(3, 8, 8).numpy()], r"a ndarray of shape \(3, 8, 8\); expected tensors"),
        ([torch.zeros(3, 0, 8)], r"a Tensor of shape \(3, 0, 8\)"),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
            "images of torch.float32 and torch.uint8",
        ),
    ],
)
def test_images_that_make_no_batch_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        Batch.from_images(images)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (torch.rand(3, 40, 50), True),
        (torch.rand(3, 40, 50) * 255, False),
        (torch.zeros(3, 40, 50), False),
        (torch.ones(3, 40, 50, dtype=torch.uint8), False),
    ],
)
def test_predict_tells_of_images_that_are_0_to_1(image, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(2):
            narrow().predict([image, image])
    sentences = [str(one.message) for one in found if issubclass(one.category, UserNotice)]
    assert len(sentences) == told
    assert all("images are 0..255" in sentence for sentence in sentences)

import pytest
import torch

from detdistill.doctor.sizes import (
    Reach,
    box_sides,
    check_reach,
    check_sizes,
    enlarge,
    measure_reach,
    size_numbers,
)
from detdistill.recipe import Recipe
from detdistill.structures import Batch
from tests.doctor.conftest import dataset_of
from tests.helpers import DENSE_R18, TWO_STAGE_R18, narrow

CPU = torch.device("cpu")
STRIDES = (8, 16, 32, 64, 128)


def batch_of(boxes, size=128):
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(found), dtype=torch.int64)
    return Batch(images, [(size, size)], [{"boxes": found, "labels": labels}], [1])


def test_sides_are_those_after_the_resize():
    split = dataset_of([[[0, 0, 40, 10]], [[0, 0, 10, 10]]], size=(100, 200))
    sides = box_sides(split, Recipe(resize_short=[25, 50], resize_long=1000))
    assert sides.tolist() == pytest.approx([10.0, 5.0])


def test_large_and_small_boxes():
    recipe = Recipe(resize_short=[320], resize_long=544)
    [found] = check_sizes(torch.full((50,), 40.0), STRIDES, recipe)
    assert found.level == "ok" and "0.0% are smaller" in found.text
    sides = torch.cat((torch.full((10,), 4.0), torch.full((40,), 40.0)))
    [found] = check_sizes(sides, STRIDES, recipe)
    assert found.level == "warning" and "20.0% are smaller" in found.text
    assert "resize_short=[960]" in found.advice and "resize_long=1632" in found.advice


def test_beyond_a_certain_size_tiles_are_better():
    tiny = torch.full((10,), 1.0)
    assert "tiles" in enlarge(tiny, 12.0, Recipe(resize_short=[320]))


@pytest.mark.parametrize("name", DENSE_R18 + TWO_STAGE_R18)
def test_every_assigner_reaches_large_boxes(name):
    student = narrow(name)
    batches = [batch_of([[10, 10, 80, 90], [60, 50, 120, 110]]), batch_of([])]
    assert measure_reach(student, batches, CPU) == Reach(2)
    assert student.training


def test_a_two_stage_student_is_measured_before_it_draws():
    """784 anchors fit these 196 boxes, of which the RPN trains on 128."""
    boxes = [[x, y, x + 48, y + 48] for x in range(4, 788, 56) for y in range(4, 788, 56)]
    assert measure_reach(narrow("faster_rcnn_r18"), [batch_of(boxes, 800)], CPU) == Reach(196)


def test_boxes_between_the_points_are_missed():
    """Points of stride 8 stand at 4, 12, 20, ...: the first box holds one, the second none."""
    reach = measure_reach(narrow("fcos_r18"), [batch_of([[2, 2, 6, 6], [5, 5, 11, 11]])], CPU)
    assert reach == Reach(2, (6.0,))
    assert reach.share == 0.5


@pytest.mark.parametrize(("missed", "level"), [(1, "ok"), (5, "warning"), (40, "problem")])
def test_the_share_of_missed_boxes_decides(missed, level):
    student, sides = narrow("fcos_r18"), torch.full((100,), 6.0)
    [found] = check_reach(Reach(100, (5.0,) * missed), sides, student, Recipe())
    assert found.level == level and f"{missed} of 100 boxes" in found.text
    assert level == "ok" or "resize_short=[640]" in found.advice


def test_images_are_enlarged_until_what_was_missed_would_be_found():
    """An RPN's anchors start at 32 px: boxes of 16 px are lost at its stride of 4, too."""
    sides, student = torch.tensor([8.0] * 10 + [40.0] * 90), narrow("faster_rcnn_r18")
    [found] = check_reach(Reach(100, (16.0,) * 10), sides, student, Recipe())
    assert "resize_short=[640]" in found.advice


def test_numbers():
    numbers = size_numbers(torch.tensor([4.0, 12.0]), Reach(2, (4.0,)), STRIDES)
    assert numbers["below_finest_stride"] == 0.5
    assert numbers["boxes_without_positive"] == 1

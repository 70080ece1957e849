"""Assignment worked by hand on a few anchors."""

import torch

from detdistill.parts.assigners import (
    BACKGROUND,
    IGNORED,
    assign_atss,
    assign_max_iou,
    assign_nearest_point,
    assign_points,
)
from detdistill.structures import Batch


def targets(*boxes_per_image):
    empty = torch.zeros(0, 4)
    return Batch(
        torch.zeros(len(boxes_per_image), 3, 1, 1),
        [(64, 64)] * len(boxes_per_image),
        [
            {
                "boxes": torch.tensor(boxes).float() if boxes else empty,
                "labels": torch.arange(len(boxes)),
            }
            for boxes in boxes_per_image
        ],
    ).padded_targets()


ANCHORS = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],  # IoU with the box: 1
        [0.0, 0.0, 10.0, 4.5],  # 0.45: ignored
        [0.0, 0.0, 10.0, 6.0],  # 0.6: positive
        [0.0, 0.0, 10.0, 2.0],  # 0.2: background
        [30.0, 30.0, 40.0, 40.0],  # 0
    ]
)
ALL = torch.ones(1, len(ANCHORS), dtype=torch.bool)


def test_max_iou_thresholds():
    matched = assign_max_iou(ANCHORS, ALL, targets([[0, 0, 10, 10]]))
    assert matched.tolist() == [[0, IGNORED, 0, BACKGROUND, BACKGROUND]]


def test_max_iou_takes_the_best_anchor_of_a_box_that_fits_none():
    # IoU 0.04 with anchor 4 only; a low-quality match.
    matched = assign_max_iou(ANCHORS, ALL, targets([[0, 0, 10, 10], [38, 38, 50, 50]]))
    assert matched[0, 4] == 1


def test_max_iou_a_later_box_wins_a_forced_anchor():
    matched = assign_max_iou(ANCHORS, ALL, targets([[30, 30, 42, 42], [30, 30, 43, 43]]))
    assert matched[0, 4] == 1


def test_max_iou_without_forced_matches():
    boxes = targets([[0, 0, 10, 10], [38, 38, 50, 50]])
    for forced, wanted in ((0.0, 1), (0.01, 1), (0.1, BACKGROUND), (None, BACKGROUND)):
        assert assign_max_iou(ANCHORS, ALL, boxes, forced=forced)[0, 4] == wanted


def test_max_iou_with_anchors_of_each_image():
    boxes = targets([[0, 0, 10, 10]], [[30, 30, 40, 40]])
    both = torch.stack((ANCHORS, ANCHORS.flip(0)))
    matched = assign_max_iou(both, ALL.expand(2, -1), boxes)
    assert matched[0].tolist() == [0, IGNORED, 0, BACKGROUND, BACKGROUND]
    assert matched[1].tolist() == [0, *[BACKGROUND] * 4]


def test_max_iou_a_box_that_touches_no_anchor_takes_none():
    matched = assign_max_iou(ANCHORS, ALL, targets([[50, 50, 60, 60]]))
    assert (matched == BACKGROUND).all()


def test_max_iou_leaves_invalid_anchors_alone():
    valid = ALL.clone()
    valid[0, 0] = False
    matched = assign_max_iou(ANCHORS, valid, targets([[0, 0, 10, 10]]))
    assert matched.tolist() == [[IGNORED, IGNORED, 0, BACKGROUND, BACKGROUND]]


def test_images_of_a_batch_do_not_mix():
    valid = ALL.expand(3, -1)
    one, two = [[0, 0, 10, 10]], [[30, 30, 40, 40], [0, 0, 10, 6]]
    together = assign_max_iou(ANCHORS, valid, targets(one, two, []))
    for i, boxes in enumerate((one, two, [])):
        assert together[i].tolist() == assign_max_iou(ANCHORS, ALL, targets(boxes))[0].tolist()
    assert (together[2] == BACKGROUND).all()


def test_max_iou_with_boxes_of_each_image():
    shifted = torch.stack((ANCHORS, ANCHORS + 30))
    both = targets([[0, 0, 10, 10]], [[30, 30, 40, 40]])
    found = assign_max_iou(shifted, ALL.expand(2, -1), both)
    assert found.tolist() == [[0, IGNORED, 0, BACKGROUND, BACKGROUND]] * 2


def grid(stride, count, size):
    centers = torch.arange(count) * stride
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    points = torch.stack((x, y), -1).reshape(-1, 2).float()
    return torch.cat((points - size / 2, points + size / 2), 1)


def atss_by_definition(anchors, valid, boxes, top_k):
    """Algorithm 1 of the paper, one box and one level at a time."""
    flat = torch.cat(anchors)
    best, owner = torch.full((len(flat),), -1.0), torch.full((len(flat),), BACKGROUND)
    for n, box in enumerate(torch.tensor(boxes).float().reshape(-1, 4)):
        candidates, start = [], 0
        for level in anchors:
            inside = [start + i for i in range(len(level)) if valid[start + i]]
            center = (box[:2] + box[2:]) / 2
            distance = {i: float(((flat[i, :2] + flat[i, 2:]) / 2 - center).norm()) for i in inside}
            candidates += sorted(inside, key=distance.__getitem__)[:top_k]
            start += len(level)
        low = torch.maximum(flat[candidates, :2], box[:2])
        high = torch.minimum(flat[candidates, 2:], box[2:])
        overlap = (high - low).clamp(min=0).prod(1)
        areas = (flat[candidates, 2:] - flat[candidates, :2]).prod(1)
        iou = overlap / (areas + (box[2:] - box[:2]).prod() - overlap)
        threshold = iou.mean() + iou.std()
        for i, value in zip(candidates, iou, strict=True):
            point = (flat[i, :2] + flat[i, 2:]) / 2
            centered = (point > box[:2] + 0.01).all() and (point < box[2:] - 0.01).all()
            if value >= threshold and centered and value > best[i]:
                best[i], owner[i] = value, n
    return torch.where(valid, owner, IGNORED)


def test_atss_equals_its_definition():
    anchors = [grid(8, 8, 32), grid(16, 4, 48)]
    valid = torch.ones(80, dtype=torch.bool)
    valid[50:64] = False
    images = [[[3.3, 5.1, 30.7, 41.9], [20.2, 22.6, 61.3, 57.5]], [[1.2, 2.4, 61.5, 60.3]], []]
    found = assign_atss(anchors, valid[None].expand(3, -1), targets(*images), top_k=5)
    for i, boxes in enumerate(images):
        assert found[i].tolist() == atss_by_definition(anchors, valid, boxes, 5).tolist()
    assert {0, 1} <= set(found[0].tolist())
    assert 0 in found[1]


POINTS = torch.tensor([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [28.0, 4.0]])
WHOLE = [(-1, float("inf"))]


def by_points(*boxes, ranges=WHOLE, radius=None):
    [found] = assign_points(
        [POINTS], targets([*boxes]), strides=[8], ranges=ranges, radius=radius
    ).tolist()
    return found


def test_points_learn_the_smallest_box_around_them():
    large, small = [0, 0, 32, 32], [10, 0, 24, 8]
    assert by_points(large, small) == [0, 1, 1, 0]
    assert by_points(small, large) == [1, 0, 0, 1]
    assert by_points() == [BACKGROUND] * 4


def test_a_point_on_a_side_is_outside():
    assert by_points([12, 0, 30, 8]) == [BACKGROUND, BACKGROUND, 0, 0]


def test_points_learn_boxes_that_suit_their_level():
    # Farthest sides of the box from the points: 28, 20, 20, 28.
    assert by_points([0, 0, 32, 8], ranges=[(-1, 20)]) == [BACKGROUND, 0, 0, BACKGROUND]
    assert by_points([0, 0, 32, 8], ranges=[(21, 64)]) == [0, BACKGROUND, BACKGROUND, 0]


def test_center_sampling_keeps_the_middle():
    # Centre 16; within 8 pixels (one stride), and inside the box itself.
    assert by_points([0, 0, 32, 8], radius=1.0) == [BACKGROUND, 0, 0, BACKGROUND]
    assert by_points([13, 0, 19, 8], radius=1.0) == [BACKGROUND] * 4
    assert by_points([0, 0, 32, 8], radius=1.6) == [0, 0, 0, 0]


def test_points_of_levels_and_images_do_not_mix():
    both = targets([[0, 0, 32, 8]], [], [[0, 0, 32, 8], [10, 0, 24, 8]])
    found = assign_points(
        [POINTS, POINTS[1:2] + 2], both, strides=[8, 16], ranges=[(-1, 20), (18, 64)]
    )
    no = BACKGROUND
    assert found.tolist() == [[no, 0, 0, no, 0], [no] * 5, [no, 1, 1, no, 0]]


# Points at x = 0, 8, 16, 24 of stride 8 and x = 0, 16 of stride 16; y is 0.
ROWS = [torch.tensor([[0.0, 0], [8, 0], [16, 0], [24, 0]]), torch.tensor([[0.0, 0], [16, 0]])]


def by_nearest(*boxes, valid=None):
    valid = torch.ones(1, 6, dtype=torch.bool) if valid is None else torch.tensor([valid])
    [found] = assign_nearest_point(ROWS, valid, targets([*boxes]), strides=[8, 16]).tolist()
    return found


def test_nearest_point_is_one_per_box():
    no = BACKGROUND
    assert by_nearest([0, -8, 20, 8]) == [no, 0, no, no, no, no]  # centre 10, level 3
    assert by_nearest() == [no] * 6


def test_nearest_point_takes_the_level_that_suits_the_box():
    no = BACKGROUND
    # Mean of log2(side / 4): 3 for 32 x 32, 4 for 64 x 64, 3.98 (rounded to 3) for 63 x 63.
    for side, level in ((32, 0), (63, 0), (64, 1), (2, 0), (500, 1)):
        box = [16 - side / 2, -side / 2, 16 + side / 2, side / 2]
        wanted = [no, no, 0, no, no, no] if level == 0 else [no, no, no, no, no, 0]
        assert by_nearest(box) == wanted, side
    # 16 x 128: log2 of the sides is 2 and 5, which makes 3.5 and level 3.
    assert by_nearest([8, -64, 24, 64]) == [no, no, 0, no, no, no]


def test_nearest_point_goes_to_the_nearest_box_in_units_of_its_sides():
    no = BACKGROUND
    small, large = [9, -8, 25, 8], [0, -15, 28, 15]  # centres 17 and 14
    # 1 / 16 of the small box, 2 / 28 of the large one, in either order.
    assert by_nearest(small, large) == [no, no, 0, no, no, no]
    assert by_nearest(large, small) == [no, no, 1, no, no, no]
    # Nearer in pixels, yet farther in sides.
    assert by_nearest([9, -8, 25, 8], [-12, -24, 48, 24]) == [no, no, 1, no, no, no]
    # Equally near: the earlier.
    assert by_nearest(small, small) == [no, no, 0, no, no, no]


def test_nearest_point_leaves_invalid_points_alone():
    no, off = BACKGROUND, IGNORED
    valid = [True, False, True, True, True, True]
    assert by_nearest([0, -8, 20, 8], valid=valid) == [no, off, 0, no, no, no]

"""Proposals of a dense head, worked by hand on two small levels."""

import torch

from detdistill.detectors.proposals import propose
from detdistill.structures import DenseOutput, Predictions, Pyramid


class Shifting:
    """A head whose encodings are offsets of its anchors."""

    def decode(self, boxes, anchors):
        return anchors + boxes


FINE = [[0, 0, 8, 8], [0, 0, 16, 16], [8, 0, 16, 8], [8, 0, 30, 16]]  # (x, anchor), one row
COARSE = [[0, 0, 16, 16], [40, 40, 48, 48]]


def output(fine=(0, 1, 2, 3), coarse=(4, 5), classes=1):
    """Levels of 1 x 2 cells with two anchors and 1 x 1 cells with two; logits by position."""
    maps = [torch.full((1, 2, classes, 1, width), -9.0) for width in (2, 1)]
    for values, level in zip((fine, coarse), maps, strict=True):
        for i, value in enumerate(values):
            level[0, i % 2, -1, 0, i // 2] = value
    anchors = [torch.tensor(level).float() for level in (FINE, COARSE)]
    boxes = [torch.zeros(1, 2, 4, 1, width) for width in (2, 1)]
    pyramid = Pyramid([torch.zeros(1, 1, 1, width) for width in (2, 1)], (8, 16))
    return DenseOutput(Predictions(maps, boxes), {}, anchors, pyramid)


def run(found=None, size=(64, 64), **options):
    proposals = propose(Shifting(), found or output(), [size], **options)
    return [part[0] for part in (proposals.boxes_xyxy, proposals.scores, proposals.origin)]


def test_best_first_with_scores_and_origins():
    boxes, scores, origin = run()
    assert boxes.tolist() == [COARSE[1], COARSE[0], FINE[3], FINE[2], FINE[1], FINE[0]]
    torch.testing.assert_close(scores, torch.tensor([5.0, 4, 3, 2, 1, 0]).sigmoid())
    assert origin.tolist() == [
        [1, 0, 0, 1],
        [1, 0, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
    ]


def test_overlap_counts_within_a_level_only():
    found = output()
    found.anchors[0][0] = torch.tensor(
        FINE[1]
    ).float()  # equal to its neighbour and to a coarse one
    boxes, _, origin = run(found)
    assert boxes.tolist().count(FINE[1]) == 2
    assert [0, 0, 0, 0] not in origin.tolist()


def test_the_best_of_all_classes_counts():
    found = output(classes=3)
    found.predictions.logits[0][0, 0, 1, 0, 0] = 7.0
    _, scores, origin = run(found)
    assert origin[0].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(scores[0], torch.tensor(7.0).sigmoid())


def test_logits_rank_where_scores_have_reached_one():
    found = output(fine=(40, 60, 50, 30), coarse=())
    _, scores, origin = run(found, max_per_image=3)
    assert (scores == 1).all()
    assert origin[:, 2:].tolist() == [[0, 1], [1, 0], [0, 0]]
    _, _, origin = run(found, per_level=1)
    assert origin[0, 2:].tolist() == [0, 1]


def test_limits_per_level_and_per_image():
    assert len(run(per_level=1)[0]) == 2
    assert run(max_per_image=3)[1].tolist() == run()[1][:3].tolist()


def test_boxes_are_clipped_and_what_lies_beyond_is_dropped():
    boxes, _, origin = run(size=(12, 12))
    assert COARSE[1] not in boxes.tolist()
    assert (boxes <= 12).all()
    assert len(boxes) == len(origin) == 5
    assert len(run(min_size=8)[0]) == 3  # 8 pixels are not above 8


def test_gradients_stop_and_batches_may_leave_nothing():
    found = output()
    found.predictions.boxes[0].requires_grad_()
    assert not run(found)[0].requires_grad
    boxes, scores, origin = run(min_size=100)
    assert (boxes.shape, scores.shape, origin.shape) == ((0, 4), (0,), (0, 4))

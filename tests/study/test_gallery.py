"""Which pictures are shown, and what counts as found on them."""

import pytest
import torch

from detdistill.evaluation.coco import Matches
from detdistill.study.gallery import Outcome, best_score, choose_images, outcomes, xywh_to_xyxy


def outcome(correct, false=0, missed=0):
    return Outcome(*(torch.zeros(count, 4) for count in (correct, false, missed)))


def test_images_with_the_largest_rise_come_first():
    before = {1: outcome(1), 2: outcome(0), 3: outcome(2, false=2), 4: outcome(3), 5: outcome(2)}
    after = {1: outcome(2), 2: outcome(3), 3: outcome(3), 4: outcome(1), 5: outcome(2)}
    assert choose_images(before, after, 9) == [2, 3, 1]
    assert choose_images(before, after, 2) == [2, 3]
    assert choose_images(after, before, 9) == [4]


def test_ties_go_to_the_lower_id():
    before, after = {k: outcome(0) for k in (9, 4, 7)}, {k: outcome(1) for k in (9, 4, 7)}
    assert choose_images(before, after, 2) == [4, 7]


def scored(*scores):
    return [{"score": score} for score in scores]


@pytest.mark.parametrize(
    ("scores", "correct", "truths", "limit"),
    [
        ((0.9, 0.8, 0.3, 0.2), [True, True, False, False], 2, 0.8),
        ((0.9, 0.2, 0.8, 0.5), [True, True, False, True], 3, 0.2),
        ((0.9, 0.95), [True, None], 4, 0.9),
        ((0.9, 0.8), [False, False], 4, 1.0),
        ((), [], 4, 1.0),
    ],
)
def test_best_score_maximises_f1(scores, correct, truths, limit):
    assert best_score(scored(*scores), Matches(correct, [None] * truths)) == limit


def test_outcomes_by_hand():
    def annotation(number, image_id, box, crowd=0):
        values = {"id": number, "image_id": image_id, "category_id": 5, "bbox": box}
        return {**values, "area": box[2] * box[3], "iscrowd": crowd}

    truth = {
        "images": [{"id": i, "width": 99, "height": 99} for i in (1, 2)],
        "annotations": [
            annotation(1, 1, [10, 10, 20, 20]),
            annotation(2, 1, [50, 50, 20, 20]),
            annotation(3, 2, [0, 0, 90, 90], crowd=1),
        ],
        "categories": [{"id": 5, "name": "cat"}],
    }
    results = [
        {"image_id": 1, "category_id": 5, "bbox": [10, 10, 20, 22], "score": 0.9},
        {"image_id": 1, "category_id": 5, "bbox": [70, 10, 9, 9], "score": 0.95},
        {"image_id": 1, "category_id": 5, "bbox": [80, 80, 9, 9], "score": 0.1},
        {"image_id": 2, "category_id": 5, "bbox": [5, 5, 30, 30], "score": 0.99},
    ]
    found = outcomes(truth, results)
    assert found[1].correct.tolist() == [[10, 10, 30, 32]]
    assert found[1].false.tolist() == [[70, 10, 79, 19]]
    assert found[1].missed.tolist() == [[50, 50, 70, 70]]
    assert found[1].points == 0
    assert [len(part) for part in (found[2].correct, found[2].false, found[2].missed)] == [0, 0, 0]


def test_no_boxes_keep_their_shape():
    assert xywh_to_xyxy([]).shape == (0, 4)

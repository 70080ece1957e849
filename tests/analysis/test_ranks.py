"""Rank disagreement of candidates, by hand and on models with a known order."""

import math

import pytest
import torch

from detdistill.analysis.ranks import (
    RankExample,
    Ranks,
    best_differs,
    candidates_of,
    size_of,
    summarise,
)

BOX = torch.tensor([0.0, 0, 10, 10])


def example(teacher, student, boxes=None, finals=None):
    teacher, student = torch.tensor(teacher), torch.tensor(student)
    points = torch.zeros(len(teacher), 2)
    boxes = BOX.expand(2, len(teacher), 4) if boxes is None else torch.tensor(boxes)
    finals = torch.stack((teacher, student)) if finals is None else torch.tensor(finals)
    image = torch.zeros(3, 20, 20)
    return RankExample(0, image, BOX, points, teacher, student, finals, boxes, tau=0.25)


def test_candidates_are_the_anchors_of_an_object():
    rows = candidates_of(torch.tensor([-1, 0, 2, 0, -1, 2, 2]), 3)
    assert [row.tolist() for row in rows] == [[1, 3], [], [2, 5, 6]]


@pytest.mark.parametrize(
    ("teacher", "student", "differs"),
    [
        ((0.1, 0.9), (0.2, 0.3), False),
        ((0.1, 0.9), (0.3, 0.2), True),
        ((0.1, 0.9, 0.5), (0.4, 0.4, 0.1), False),  # a tie for the first place is no difference
    ],
)
def test_best_differs(teacher, student, differs):
    assert best_differs(torch.tensor(teacher), torch.tensor(student)) is differs


@pytest.mark.parametrize(
    ("area", "size"), [(1, 0), (1023.9, 0), (1024, 1), (9215, 1), (9216, 2), (1e6, 2)]
)
def test_sizes_are_cocos(area, size):
    assert size_of(area) == size


def test_a_row_by_hand():
    boxes = [[0.0, 0, 10, 5], [0, 0, 10, 10], [0, 0, 5, 5]]
    teachers = [[0.0, 0, 10, 8], [0, 0, 1, 1], [0, 0, 1, 1]]
    row = example((0.9, 0.5, 0.1), (0.1, 0.2, 0.3), [teachers, boxes]).row(2000)
    assert (row.size, row.tau, row.differs) == (1, 0.25, True)
    assert row.iou_teacher == pytest.approx(0.8)
    assert row.iou_own == pytest.approx(0.25)
    assert row.iou_teachers == pytest.approx(0.5)
    assert row.iou_best == pytest.approx(1)


def test_the_final_score_says_which_box_is_kept():
    # By class scores both put the first candidate first; with quality the student the second.
    boxes = [[0.0, 0, 10, 5], [0, 0, 10, 10]]
    found = example((0.9, 0.5), (0.9, 0.8), [boxes, boxes], [[0.8, 0.4], [0.2, 0.7]])
    assert found.best == (0, 1)
    row = found.row(1)
    assert row.differs and row.iou_own == pytest.approx(1) and row.iou_teachers == 0.5


def test_summary_leaves_out_what_is_undefined():
    rows = [example((0.1, 0.2), (0.1, 0.2)).row(1), example((0.1, 0.2), (0.2, 0.1)).row(1)]
    found = summarise(rows)
    assert (found["objects"], found["tau"], found["best_differs_share"]) == (2, 0.25, 0.5)
    empty = summarise([])
    assert empty.pop("objects") == 0 and set(empty.values()) == {None}


@pytest.mark.parametrize("name", ["gfl_r18", "retinanet_r18", "fcos_r18"])
def test_equal_models_agree(name, make_pair, look):
    pair = make_pair(name, name, seeds=(5, 5))
    part = Ranks(pair, examples=3)
    for index in range(3):
        part.add(look(pair, index=index))
    found = part.numbers()
    assert found["objects"] == 9
    assert 0 < found["objects_with_candidates"] <= 9
    assert found["all"]["tau"] == pytest.approx(1)
    assert found["all"]["best_differs_share"] == 0
    assert found["all"]["iou_at_own_best"] == found["all"]["iou_at_teachers_best"]
    assert found["all"]["iou_at_own_best"] == pytest.approx(found["all"]["teachers_iou"])
    assert found["easy"]["objects"] + found["hard"]["objects"] == found["objects_with_candidates"]
    assert sum(found["histogram"]) == found["histogram"][-1]
    assert part.examples.items() == []  # nothing disagrees


def test_opposite_scores_give_minus_one(make_pair, look):
    pair = make_pair(seeds=(5, 5))
    pair.student.logits.weight.data.neg_()
    pair.student.logits.bias.data.neg_()
    part = Ranks(pair, examples=2)
    for index in range(3):
        part.add(look(pair, index=index))
    found = part.numbers()
    assert found["all"]["tau"] == pytest.approx(-1)
    assert found["all"]["best_differs_share"] == 1
    assert found["histogram"][0] == sum(found["histogram"]) > 0
    assert [e.tau for e in part.examples.items()] == [pytest.approx(-1)] * 2


def test_scores_are_those_of_the_objects_class(make_pair, look):
    pair = make_pair()
    sample = look(pair)
    part = Ranks(pair, examples=1)
    part.add(sample)
    [kept] = part.examples.items()
    number = (sample.boxes_xyxy == kept.box_xyxy).all(1).nonzero().item()
    matched = pair.teacher.assign(sample.teacher.dense, sample.targets).matched[0]
    label = sample.targets.labels[0, number]
    for view, scores in ((sample.teacher, kept.teacher), (sample.student, kept.student)):
        logits = view.dense.predictions.flatten().logits[0]
        torch.testing.assert_close(scores, logits[matched == number, label].sigmoid())


def test_constant_scores_have_no_order(make_pair, look):
    pair = make_pair()
    pair.student.logits.weight.data.zero_()
    part = Ranks(pair, examples=1)
    part.add(look(pair))
    found = part.numbers()
    assert found["all"]["tau"] is None and sum(found["histogram"]) == 0
    assert found["all"]["best_differs_share"] == 0
    assert all(math.isnan(row.tau) for row in part.rows)


def test_needs_the_same_anchors(make_pair):
    assert Ranks.left_out(make_pair("gfl_r18", "atss_r18")) is None
    assert "same anchors" in Ranks.left_out(make_pair("fcos_r18", "gfl_r18"))
    pair = make_pair()
    pair.dense = False
    assert "same anchors" in Ranks.left_out(pair)

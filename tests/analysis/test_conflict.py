"""Target conflict, counted by hand on a few places and on models that agree by construction."""

import pytest
import torch

from detdistill.analysis.conflict import (
    Conflict,
    Gaps,
    Tally,
    inside_any,
    label_scores,
    measure_gaps,
)
from detdistill.analysis.pair import level_scores


def test_gaps_are_of_the_class_that_differs_most():
    label = torch.tensor([[1.0, 0], [0, 0], [0, 0]])
    teacher = torch.tensor([[0.25, 0.5], [0.1, 0.75], [0, 0]])
    student = torch.tensor([[0.5, 0.9], [0.9, 0.5], [0.2, 0]])
    gaps = measure_gaps(label, teacher, student)
    assert gaps.gap.tolist() == [0.75, 0.75, 0]
    assert gaps.teacher_higher.tolist() == [False, True, False]
    torch.testing.assert_close(gaps.to_label, torch.tensor([0.5, 0.5, 0.2]))
    torch.testing.assert_close(gaps.to_teacher, torch.tensor([0.25, 0.25, 0.2]))


def test_label_scores():
    asked = label_scores(torch.tensor([1, 2, 0]), torch.tensor([0.5, 0, 1.0]), 2)
    assert asked.tolist() == [[0, 0.5], [0, 0], [1, 0]]


def test_inside_any():
    points = torch.tensor([[5.0, 5], [10, 5], [25, 25]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    assert inside_any(points, boxes).tolist() == [True, False, True]
    assert inside_any(points, boxes[:0]).tolist() == [False] * 3


def test_tally_by_hand():
    gaps = Gaps(
        gap=torch.tensor([0.75, 0.5, 0.625, 1.0]),
        teacher_higher=torch.tensor([True, True, False, False]),
        to_label=torch.tensor([0.5, 0.1, 0.25, 1.0]),
        to_teacher=torch.tensor([0.25, 0.9, 0.5, 0.0]),
    )
    groups = torch.tensor([[True, True, True, True], [True, True, True, False], [False] * 4])
    tally = Tally(levels=2)
    # A gap of exactly 0.5 is no conflict yet.
    assert tally.add(1, gaps, groups) == 3
    found = tally.numbers(1)
    assert found["all"] == {
        "places": 4,
        "conflicts": 3,
        "share": 0.75,
        "teacher_higher_share": pytest.approx(1 / 3),
        "nearer_to_teacher_share": pytest.approx(2 / 3),
        "student_to_label": pytest.approx(1.75 / 3),
        "student_to_teacher": pytest.approx(0.25),
    }
    assert (found["inside_objects"]["places"], found["inside_objects"]["conflicts"]) == (3, 2)
    assert found["positives"]["places"] == 0 and found["positives"]["share"] is None
    assert tally.numbers(0)["all"]["places"] == 0
    assert tally.numbers() == found
    assert tally.histogram[0].nonzero()[:, 0].tolist() == [50, 62, 75, 99]
    assert tally.histogram.sum(1).tolist() == [4, 3, 0]


@pytest.mark.parametrize("name", ["gfl_r18", "retinanet_r18", "fcos_r18", "atss_r18"])
def test_a_student_that_is_its_teacher_stands_with_it(name, make_pair, look):
    pair = make_pair(name, name, seeds=(3, 3))
    part = Conflict(pair, examples=2)
    for index in range(3):
        part.add(look(pair, index=index))
    found = part.numbers()
    assert found["places"] == "anchors"
    assert found["teacher_against_its_own_labels"] is None
    assert found["all"]["places"] == sum(level["all"]["places"] for level in found["levels"])
    if name != "gfl_r18":  # untrained heads say 0.01, labels ask for 1
        assert found["positives"]["share"] == 1
        assert found["positives"]["nearer_to_teacher_share"] == 1
        assert found["positives"]["student_to_teacher"] == 0
        assert found["positives"]["student_to_label"] == pytest.approx(0.99, abs=0.005)
        assert len(part.examples.items()) == 2


def test_labels_are_the_students(make_pair, look):
    """GFL asks for the IoU of the student's own box at its positives, whatever the teacher says."""
    pair = make_pair()
    sample = look(pair)
    part = Conflict(pair, examples=0)
    part.add(sample)
    student = pair.dense_models[1]
    asked = student.assign(sample.student.dense, sample.targets)
    target = student.class_targets(sample.student.dense, asked)[0]
    taught = torch.cat([level_scores(sample.teacher.dense, level) for level in range(5)])
    label = label_scores(asked.labels[0], target, 10)
    gap = (label - taught).abs().amax(1)[asked.weights[0] > 0]
    assert part.numbers()["all"]["conflicts"] == int((gap > 0.5).sum())
    assert part.tally.histogram[0].sum() == len(gap)


def test_unlike_anchors_are_compared_by_cell(make_pair, look):
    pair = make_pair("retinanet_r18", "gfl_r18")
    sample = look(pair)
    part = Conflict(pair, examples=1)
    part.add(sample)
    found = part.numbers()
    assert found["places"] == "cells"
    cells = [level.shape[-2] * level.shape[-1] for level in sample.student.pyramid]
    assert [level["all"]["places"] for level in found["levels"]] == cells
    own = found["teacher_against_its_own_labels"]
    assert own["positives"]["share"] == 1  # its labels ask for 1 where it says 0.01
    asked = pair.teacher.assign(sample.teacher.dense, sample.targets)
    located = asked.positive[0].reshape(-1, 9).any(1)
    assert own["positives"]["places"] == int(located.sum())


def test_images_without_objects_have_no_positives(make_pair, look):
    pair = make_pair()
    part = Conflict(pair, examples=1)
    part.add(look(pair, count=0))
    found = part.numbers()
    assert found["positives"]["places"] == found["inside_objects"]["places"] == 0
    assert found["all"]["conflicts"] == 0 and found["all"]["student_to_label"] is None
    assert part.examples.items() == []


def test_needs_dense_heads(make_pair):
    pair = make_pair()
    pair.dense = False
    assert "dense head" in Conflict.left_out(pair)
    pair.dense, pair.strides = True, []
    assert "same stride" in Conflict.left_out(pair)
    assert Conflict.left_out(make_pair("fcos_r18")) is None

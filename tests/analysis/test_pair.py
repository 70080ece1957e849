"""What two models have in common, and the places of their maps."""

import pytest
import torch

from detdistill import Batch
from detdistill.analysis.pair import (
    Pair,
    best_of_cell,
    evenly,
    level_scores,
    places_of,
    split_levels,
)
from detdistill.errors import UserError
from tests.helpers import narrow


@pytest.mark.parametrize(
    ("teacher", "student", "same"),
    [
        ("gfl_r18", "gfl_r18", True),
        ("gfl_r18", "atss_r18", True),
        ("retinanet_r18", "retinanet_r18", True),
        ("gfl_r18", "retinanet_r18", False),
        ("fcos_r18", "gfl_r18", False),
    ],
)
def test_same_anchors(teacher, student, same, make_pair):
    assert make_pair(teacher, student).same_anchors is same


def test_models_are_frozen_and_dense(make_pair):
    pair = make_pair()
    assert pair.dense and pair.strides == [8, 16, 32, 64, 128]
    assert pair.levels == [(i, i) for i in range(5)]
    for model in (pair.teacher, pair.student):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_levels_are_matched_by_stride():
    teacher, student = narrow(), narrow(seed=1)
    teacher.strides = (4, 8, 16, 32, 64)
    pair = Pair(teacher, student)
    assert pair.strides == [8, 16, 32, 64]
    assert pair.levels == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert not pair.same_anchors


def test_classes_must_agree():
    with pytest.raises(UserError, match="3 classes, the student gfl_r18 4"):
        Pair(narrow(num_classes=3), narrow(num_classes=4))


def test_views_say_the_stride_of_each_map(make_pair, look):
    pair = make_pair()
    sample = look(pair)
    for view, model in ((sample.teacher, pair.teacher), (sample.student, pair.student)):
        assert list(view.backbone) == [8, 16, 32]
        for stride, level in view.backbone.items():
            assert level.shape[-2:] == (96 // stride, 96 // stride)
        padded = torch.nn.functional.pad(sample.image, (0, 1, 0, 24))
        expected = model(Batch(padded[None], sample.targets.sizes))
        torch.testing.assert_close(view.pyramid.levels, expected.pyramid.levels)
        torch.testing.assert_close(view.dense.predictions, expected.predictions)


def test_split_levels_and_scores(make_pair, look):
    sample = look(make_pair("retinanet_r18", "retinanet_r18"))
    output = sample.student.dense
    flat = output.predictions.flatten().logits[0].sigmoid()
    pieces = split_levels(flat, output)
    for level, piece in enumerate(pieces):
        torch.testing.assert_close(piece, level_scores(output, level))


def test_best_of_cell():
    values = torch.tensor([[1.0, 8], [3, 2], [5, 0], [4, 9]])
    assert best_of_cell(values, 2).tolist() == [[3, 8], [5, 9]]
    assert best_of_cell(values[:, 0], 4).tolist() == [5]


def test_evenly_draws_by_the_seed_alone():
    assert evenly(4, 9, seed=0).tolist() == [0, 1, 2, 3]
    drawn = evenly(1000, 50, seed=3)
    assert len(set(drawn.tolist())) == 50 and torch.equal(drawn, drawn.sort()[0])
    torch.manual_seed(99)
    assert torch.equal(drawn, evenly(1000, 50, seed=3))
    assert not torch.equal(drawn, evenly(1000, 50, seed=4))


def test_a_view_of_torchvision_has_no_backbone_of_its_own(look):
    from torchvision.models.detection import retinanet_resnet50_fpn

    from detdistill import as_detector

    model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    pair = Pair(narrow("retinanet_r18", 3), as_detector(model, labels=range(1, 4)))
    sample = look(pair)
    assert sample.student.backbone == {} and len(sample.student.pyramid) == 5
    assert not pair.same_anchors  # torchvision rounds its anchors
    assert ("cls 4", "8") in places_of(sample.student, ends=False)

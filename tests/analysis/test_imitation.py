"""Feature and prediction differences by hand, and what their maps have in common."""

import pytest
import torch

from detdistill.analysis import imitation
from detdistill.analysis.imitation import (
    CELLS,
    Imitation,
    feature_difference,
    prediction_difference,
    rank_table,
    relational_difference,
)
from detdistill.analysis.pair import level_scores


def test_differences_by_hand():
    teacher, student = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[0.0, 0], [3, 1]])
    assert feature_difference(teacher, student).tolist() == [0.5, 5]
    assert prediction_difference(teacher, student).tolist() == [0.5, 5]


def everywhere(features):
    return torch.arange(len(features))


def test_relations_by_hand():
    """Centred places -1, 0, 1 relate to each other as (1, 0, -1), (0, 0, 0) and (-1, 0, 1)."""
    teacher = torch.tensor([[0.0], [1], [2]])
    for student in (teacher, teacher * 5 - 3, -teacher):
        found = relational_difference(teacher, student, everywhere(teacher))
        # The middle place has no relations to compare: unrelated.
        torch.testing.assert_close(found, torch.tensor([0.0, 1, 0]))
    # Centred -1, 1, 0: relations (1, -1, 0), (-1, 1, 0) and none.
    other = torch.tensor([[0.0], [2], [1]])
    found = relational_difference(teacher, other, everywhere(teacher))
    torch.testing.assert_close(found, torch.tensor([0.5, 1, 1]))


def test_relations_do_not_ask_for_equal_channels():
    torch.manual_seed(0)
    teacher = torch.randn(40, 6)
    rotation = torch.linalg.qr(torch.randn(9, 9))[0][:6]
    found = relational_difference(teacher, 3 * teacher @ rotation + 7, torch.arange(0, 40, 3))
    assert float(found.abs().max()) < 1e-5
    stranger = relational_difference(teacher, torch.randn(40, 9), everywhere(teacher))
    assert 0.7 < float(stranger.mean()) < 1.3


def test_relations_of_a_place_that_moved():
    torch.manual_seed(0)
    teacher = torch.randn(60, 8)
    student = teacher.clone()
    student[17] = -4 * student[17]
    found = relational_difference(teacher, student, everywhere(teacher))
    assert found.argmax() == 17


def test_rank_table():
    values = torch.arange(2.0 * CELLS)
    same = rank_table(values, values)
    assert torch.equal(same, torch.eye(CELLS, dtype=torch.float64) / CELLS)
    assert torch.equal(rank_table(values, -values), same.flip(0))
    assert rank_table(values[:0], values[:0]).sum() == 0


def test_equal_models_do_not_differ(make_pair, look):
    part = Imitation(make_pair(seeds=(4, 4)), images=1, examples=1)
    part.add(look(part.pair))
    found = part.numbers()
    assert found["feature_measure"] == "mean_squared"
    for level in found["levels"]:
        assert level["feature_difference"] == level["prediction_difference"] == 0
        assert level["pearson"] is None and level["spearman"] is None
    assert part.examples.items() == []


def test_numbers_are_those_of_the_maps(make_pair, look):
    pair = make_pair("retinanet_r18", "retinanet_r18")
    part = Imitation(pair, images=2, examples=1)
    features, predictions = [], []
    for index in range(2):
        sample = look(pair, index=index)
        part.add(sample)
        maps = sample.teacher.pyramid[0] - sample.student.pyramid[0]
        features.append(maps[0].square().mean(0).flatten())
        scores = [level_scores(view.dense, 0) for view in (sample.teacher, sample.student)]
        predictions.append((scores[0] - scores[1]).square().reshape(144, 90).mean(1))
    level = part.numbers()["levels"][0]
    both = torch.stack((torch.cat(features), torch.cat(predictions))).double()
    assert (level["stride"], level["places"]) == (8, 288)
    assert level["pearson"] == pytest.approx(torch.corrcoef(both)[0, 1].item(), abs=1e-6)
    ranks = both.argsort(1).argsort(1).double()
    # Rounding may swap neighbours among the 288 ranks, which moves it by some 1e-6.
    assert level["spearman"] == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=2e-5)
    assert level["feature_difference"] == pytest.approx(both[0].mean().item())
    assert level["prediction_difference"] == pytest.approx(both[1].mean().item())
    assert part.rank_table().sum() == pytest.approx(1)


def test_unequal_widths_are_compared_by_relations(make_pair, look):
    part = Imitation(make_pair(fpn_channels=24), images=1, examples=1)
    part.add(look(part.pair))
    found = part.numbers()
    assert found["feature_measure"] == "relational"
    places = [level["places"] for level in found["levels"]]
    assert places == [144, 36, 9, 4, 0]  # one place has no relations
    assert found["levels"][-1]["feature_difference"] is None
    for level in found["levels"][:-1]:
        assert 0 < level["feature_difference"] < 2
    [example] = part.examples.items()
    assert [heat.stride for heat in example.maps["product"]] == [8, 16, 32, 64]


def test_unlike_anchors_are_compared_by_cell(make_pair, look):
    part = Imitation(make_pair("retinanet_r18", "fcos_r18"), images=1, examples=0)
    part.add(look(part.pair))
    assert [level["places"] for level in part.numbers()["levels"]] == [144, 36, 9, 4, 1]


def test_memory_is_bounded(make_pair, look, monkeypatch):
    monkeypatch.setattr(imitation, "KEPT", 50)
    part = Imitation(make_pair(), images=5, examples=0)
    for index in range(5):
        part.add(look(part.pair, index=index))
    assert [level.kept.shape[1] for level in part.levels] == [50, 50, 45, 20, 5]
    assert part.numbers()["levels"][0]["places"] == 5 * 144
    assert -1 < part.numbers()["levels"][0]["spearman"] < 1


def test_needs_dense_heads(make_pair):
    pair = make_pair()
    assert Imitation.left_out(pair) is None
    pair.strides = []
    assert "same stride" in Imitation.left_out(pair)
    pair.dense = False
    assert "dense head" in Imitation.left_out(pair)

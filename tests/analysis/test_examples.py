"""What is kept for drawing, and where maps lie on their images."""

import pytest
import torch

from detdistill.analysis.examples import Foremost, HeatMap, heat_map
from detdistill.analysis.maps import merged, overlay


def test_the_foremost_are_kept_and_only_they_are_made():
    made = []

    def make(item):
        made.append(item)
        return item

    foremost = Foremost(2)
    for item, score in enumerate([1, 0, 5, 1, 7, 5, -1]):
        foremost.offer(score, lambda item=item: make(item))
    assert foremost.items() == [4, 2]  # of the two with 5 the earlier one
    assert made == [0, 2, 4]


def test_nothing_is_kept_where_nothing_is_wanted():
    foremost = Foremost(0)
    foremost.offer(3, lambda: pytest.fail("made"))
    assert foremost.items() == []


@pytest.mark.parametrize(("name", "origin"), [("gfl_r18", -4), ("fcos_r18", 0)])
def test_cells_lie_around_their_anchors(name, origin, make_pair, look):
    output = look(make_pair(name, name)).student.dense
    heat = heat_map(torch.arange(144.0), output, 0)
    assert heat.values.shape == (12, 12) and heat.values[1, 0] == 12
    assert (heat.stride, heat.origin) == (8, (origin, origin))


def test_of_the_anchors_of_a_cell_the_greatest_value_is_shown(make_pair, look):
    output = look(make_pair("retinanet_r18", "retinanet_r18")).student.dense
    values = torch.arange(9.0 * 144)
    assert heat_map(values, output, 0).values.flatten().tolist() == list(range(8, 9 * 144, 9))


def test_levels_are_merged_by_the_greater_value():
    fine = HeatMap(torch.tensor([[0.0, 0.5], [0, 0]]), 2, (0, 0))
    coarse = HeatMap(torch.tensor([[0.25]]), 4, (-2, -2))
    # A coarse cell from -2 to 2; what lies beyond the last cell takes its value.
    assert merged([fine], (4, 8))[0].tolist() == [0, 0] + [0.5] * 6
    assert merged([coarse], (2, 2)).unique().tolist() == [0.25]
    # Cells of 4 pixels on an image of 8 would hide all others.
    assert merged([fine, coarse], (4, 8)).unique().tolist() == [0, 0.5]
    assert merged([fine, coarse], (4, 16)).unique().tolist() == [0.25, 0.5]


def test_overlay_is_brightest_at_the_top():
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    drawn = overlay(image, torch.tensor([[0.0, 1, 2]]), top=2).float().mean(0)[0]
    assert drawn[0] < drawn[1] < drawn[2]
    assert drawn[0] < 100
    flat = overlay(image, torch.zeros(1, 3), top=0)
    assert len(flat.unique()) <= 3

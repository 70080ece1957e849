"""The towers of dense heads: what their first weights let through."""

import pytest
import torch

from detdistill.parts.heads import PointConv, Tower, hidden_conv


@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize("channels", [16, 64, 256])
def test_a_narrow_tower_passes_on_as_much_as_a_wide_one(channels, group_norm):
    torch.manual_seed(0)
    level = torch.randn(1, channels, 12, 12)
    end, _ = Tower(channels, channels, 4, group_norm)(level, False)
    # From one block to the next a third remains; with normalisation everything.
    assert end.std().item() == pytest.approx(0.6 if group_norm else 0.01, rel=0.5)


def test_the_published_width_starts_as_published():
    torch.manual_seed(0)
    block = Tower(256, 256, 1, group_norm=False).blocks[0]
    assert block.conv.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (block.conv.bias == 0).all()


@pytest.mark.parametrize("channels", [16, 256])
def test_what_comes_before_the_last_layer_passes_on_a_third(channels):
    """Otherwise RepPoints, which has two such layers, learns next to nothing when narrow."""
    torch.manual_seed(0)
    level = torch.randn(1, channels, 24, 24)
    points = torch.zeros(1, 18, 24, 24) + PointConv(1, 1).taps.flatten()[:, None, None]
    for found in (hidden_conv(channels)(level), PointConv(channels, channels)(level, points)):
        assert found.std().item() == pytest.approx(0.48, rel=0.15)

"""The pyramid's extra levels at the sizes where a map is one column wide."""

import pytest
import torch

from detdistill.parts.fpn import FPN


@pytest.mark.parametrize("height", [1, 2, 3])
def test_narrow_maps_equal_the_strided_convolution(height):
    fpn = FPN([8, 8, 8], 16, "p5")
    features = [torch.randn(2, 8, height * s, s) for s in (4, 2, 1)]
    levels = fpn(features).levels
    for level, conv in ((3, fpn.output[3]), (4, fpn.output[4])):
        torch.testing.assert_close(levels[level], conv(levels[level - 1]))


def test_bfloat16_gradients_of_narrow_maps_equal_float32():
    torch.manual_seed(0)
    fpn = FPN([16, 16, 16], 16, "p5")
    features = [torch.randn(2, 16, s, s) for s in (4, 2, 1)]

    def gradient(enabled):
        fpn.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = sum(level.float().sum() for level in fpn(features).levels[3:])
        freed = [torch.full((4**n,), torch.nan, dtype=torch.bfloat16) for n in range(3, 10)]
        del freed  # memory that must not come back as a gradient
        loss.backward()
        return [conv.weight.grad.clone() for conv in list(fpn.output)[3:]]

    for low, full in zip(gradient(True), gradient(False), strict=True):
        torch.testing.assert_close(low, full, rtol=0.03, atol=0.03)

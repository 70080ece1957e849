"""The pyramids' levels, also at the sizes where a map is one column wide."""

import pytest
import torch

from detdistill.parts.fpn import FPN, PooledFPN


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


def test_the_pooled_pyramid_is_the_plain_one_and_every_second_place():
    pooled, plain = PooledFPN([8, 8, 8, 8], 16), FPN([8, 8, 8, 8], 16, "p5")
    plain.load_state_dict(pooled.state_dict(), strict=False)
    features = [torch.randn(2, 8, 3 * s, 4 * s) for s in (8, 4, 2, 1)]
    pyramid = pooled(features)
    assert pyramid.strides == (4, 8, 16, 32, 64)
    for level, own in zip(plain(features).levels[:4], pyramid, strict=False):
        torch.testing.assert_close(level, own)
    assert torch.equal(pyramid[4], pyramid[3][:, :, ::2, ::2])

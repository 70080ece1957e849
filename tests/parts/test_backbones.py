"""Backbones beyond plain ResNets: Swin on any size, MobileNetV2 as HEAD trains it, freezing."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from detdistill import UserError
from detdistill.errors import UserNotice
from detdistill.parts import pretrained
from detdistill.parts.backbones import Backbone
from detdistill.parts.swin import PaddedBlock

SWIN = "swin_tiny_patch4_window7_224"


@pytest.fixture(scope="module")
def swin():
    torch.manual_seed(0)
    return Backbone(SWIN).eval()


@pytest.mark.parametrize("size", [(64, 96), (50, 75)])
def test_swin_takes_any_size_and_gives_normalised_maps(swin, size):
    with torch.no_grad():
        maps = swin(torch.randn(1, 3, *size))
    assert [m.shape[1] for m in maps] == swin.channels == [192, 384, 768]
    patches = [-(-side // 4) for side in size]
    for level, halvings in zip(maps, (1, 2, 3), strict=True):
        assert list(level.shape[2:]) == [-(-p // 2**halvings) for p in patches]
        assert level.mean(1).abs().max() < 1e-4
        assert level.var(1, unbiased=False).amin() > 0.9


def swin_block(kind):
    torch.manual_seed(1)
    options = {"window_size": 7, "shift_size": 3, "always_partition": True, "dynamic_mask": True}
    return kind(16, (14, 14), num_heads=2, **options).eval()


def test_padding_before_the_shift_is_timms_where_windows_divide_the_map():
    ours, theirs = swin_block(PaddedBlock), swin_block(SwinTransformerBlock)
    whole, partial = torch.randn(2, 14, 14, 16), torch.randn(2, 8, 10, 16)
    with torch.no_grad():
        assert torch.equal(ours(whole), theirs(whole))
        assert not torch.allclose(ours(partial), theirs(partial), atol=1e-4)


def test_padding_before_the_shift_pads_at_the_far_ends():
    """The shifted windows of a map padded by hand are those of the map itself."""
    block, tokens = swin_block(PaddedBlock), torch.randn(1, 8, 10, 16)
    with torch.no_grad():
        attended = block._attn(tokens)
        by_hand = SwinTransformerBlock._attn(block, F.pad(tokens, (0, 0, 0, 4, 0, 6)))
    torch.testing.assert_close(attended, by_hand[:, :8, :10])


def test_no_stage_of_swin_goes_unshifted(swin):
    blocks = [m for m in swin.modules() if isinstance(m, PaddedBlock)]
    assert [b.shift_size for b in blocks] == [(0, 0), (3, 3)] * 6


def test_heads_mobilenet_is_wide_and_leaky():
    torch.manual_seed(0)
    plain, head = Backbone("mobilenetv2_100"), Backbone("mobilenetv2_100_head")
    assert (plain.channels, head.channels) == ([32, 96, 320], [32, 96, 1280])
    kinds = {type(m): m for m in head.modules() if isinstance(m, (nn.LeakyReLU, nn.ReLU6))}
    assert set(kinds) == {nn.LeakyReLU} and kinds[nn.LeakyReLU].negative_slope == 0.1
    with torch.no_grad():
        maps = head(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 8, 12), (96, 4, 6), (1280, 2, 3)]
    assert (maps[-1] < 0).any(), "the last map is activated, but leaky"


@pytest.mark.parametrize(
    ("name", "stages", "frozen", "free"),
    [
        ("resnet18", 1, ["conv1", "bn1", "layer1"], ["layer2", "layer3", "layer4"]),
        ("mobilenetv2_100", 1, ["conv_stem", "bn1", "blocks.0", "blocks.1"], ["blocks.2"]),
        ("mobilenetv2_100", 3, ["blocks.2", "blocks.4"], ["blocks.5", "blocks.6"]),
        ("convnext_atto", 2, ["stem_0", "stages_0", "stages_1"], ["stages_2", "stages_3"]),
        (SWIN, 1, ["patch_embed", "layers_0"], ["layers_1", "layers_3"]),
    ],
)
def test_freezing_ends_with_its_stage(name, stages, frozen, free):
    body = Backbone(name, frozen_stages=stages).body
    for part in frozen:
        assert not any(p.requires_grad for p in body.get_submodule(part).parameters()), part
    for part in free:
        assert all(p.requires_grad for p in body.get_submodule(part).parameters()), part


@pytest.mark.parametrize("name", ["twins_svt_small", "hrnet_w18_small"])
def test_stages_that_cannot_be_told_apart_are_not_frozen_with_all_the_rest(name):
    with pytest.raises(UserError, match=rf"frozen_stages=1: the stages of backbone '{name}'"):
        Backbone(name, frozen_stages=1)


@pytest.mark.parametrize("network", [True, False])
def test_imagenet_weights_that_cannot_be_had(monkeypatch, network):
    create, offline = timm.create_model, []

    def refuse(name, *, pretrained=False, **options):
        if not pretrained:
            return create(name, **options)
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("LocalEntryNotFoundError: set HF_HUB_OFFLINE or look elsewhere")

    class Session:
        def head(self, url, timeout):
            if not network:
                raise ConnectionError(f"no {url} within {timeout} s")

    constants = pretrained.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "get_session", Session)
    monkeypatch.setattr(timm, "create_model", refuse)
    with (
        pytest.warns(UserNotice, match=r"loading ImageNet weights of resnet18\.tv_in1k"),
        pytest.raises(UserError, match=r"not in the cache .* as backbone_weights, or use") as error,
    ):
        Backbone("resnet18", pretrained=True)
    assert "HF_HUB_OFFLINE" not in str(error.value)
    assert offline == [not network] and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("name", "loaded"),
    [
        ("resnet50", "resnet50.tv_in1k"),  # of which CrossKD's and HEAD's students are made
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("mobilenetv2_100", "mobilenetv2_100"),
        ("mobilenetv2_100_head", "mobilenetv2_100"),
    ],
)
def test_the_imagenet_weights_of_a_name(monkeypatch, name, loaded):
    create, asked = timm.create_model, []

    def without_network(name, *, pretrained=False, **options):
        asked.extend([name] if pretrained else [])
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    with pytest.warns(UserNotice, match="loading ImageNet weights"):
        Backbone(name, pretrained=True)
    assert asked == [loaded] and (loaded == "mobilenetv2_100" or timm.is_model_pretrained(loaded))

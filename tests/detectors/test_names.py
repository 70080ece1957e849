"""Names and layouts of other frameworks' weights, against what those frameworks compute."""

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import nn

from detdistill.detectors.checkpoints import from_mmdetection, rename_mmdetection


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.layer1.0.downsample.0.weight", "body.layer1.0.downsample.0.weight"),
        ("backbone.conv1.conv.weight", "body.conv_stem.weight"),
        ("backbone.conv1.bn.running_var", "body.bn1.running_var"),
        ("backbone.layer1.0.depthwise_conv.conv.weight", "body.blocks.0.0.conv_dw.weight"),
        ("backbone.layer1.0.linear_conv.bn.bias", "body.blocks.0.0.bn2.bias"),
        ("backbone.layer4.2.expand_conv.bn.weight", "body.blocks.3.2.bn1.weight"),
        ("backbone.layer7.0.linear_conv.conv.weight", "body.blocks.6.0.conv_pwl.weight"),
        ("backbone.conv2.bn.running_mean", "top.bn.running_mean"),
        ("backbone.patch_embed.projection.bias", "body.patch_embed.proj.bias"),
        ("backbone.patch_embed.norm.bias", "body.patch_embed.norm.bias"),
        (
            "backbone.stages.2.blocks.5.attn.w_msa.qkv.weight",
            "body.layers_2.blocks.5.attn.qkv.weight",
        ),
        ("backbone.stages.0.blocks.1.ffn.layers.0.0.bias", "body.layers_0.blocks.1.mlp.fc1.bias"),
        ("backbone.stages.0.blocks.1.ffn.layers.1.bias", "body.layers_0.blocks.1.mlp.fc2.bias"),
        ("backbone.stages.1.downsample.norm.bias", "body.layers_2.downsample.norm.bias"),
        ("backbone.norm3.weight", "norms.3.weight"),
    ],
)
def test_backbone_names(theirs, ours):
    assert rename_mmdetection(theirs) == f"backbone.{ours}"


def test_merged_patches_of_swin_change_their_order():
    """MMDetection unfolds 2x2 patches; timm stacks them: with the order changed both agree."""
    torch.manual_seed(0)
    norm, reduction = nn.LayerNorm(20), nn.Linear(20, 10, bias=False)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    theirs = {f"norm.{k}": v for k, v in norm.state_dict().items()}
    theirs["reduction.weight"] = reduction.weight.detach()
    prefix = "backbone.stages.0.downsample."
    ours = from_mmdetection({prefix + k: v for k, v in theirs.items()})
    merging = PatchMerging(5, 10)
    merging.load_state_dict({k.split("downsample.")[1]: v for k, v in ours.items()})
    tokens = torch.randn(2, 6, 8, 5)
    unfolded = F.unfold(tokens.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    with torch.no_grad():
        wanted = reduction(norm(unfolded)).reshape(2, 3, 4, 10)
        torch.testing.assert_close(merging(tokens), wanted)


def test_places_in_a_window_of_swin_are_mmdetections():
    rows = torch.arange(49) // 7
    columns = torch.arange(49) % 7
    down, right = rows[:, None] - rows[None], columns[:, None] - columns[None]
    wanted = (down + 6) * 13 + right + 6  # row-major in a table of 13 x 13 offsets
    assert torch.equal(WindowAttention(32, 2, window_size=7).relative_position_index, wanted)

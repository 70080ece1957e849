"""ImageNet weights from files: whose names are understood, what is refused."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from detdistill import UserError, create_detector
from detdistill.detectors.backbone_weights import load_backbone
from detdistill.parts.backbones import Backbone

SLOW = pytest.mark.slow
NARROW = {"fpn_channels": 8, "tower_channels": 8}


def scrambled(model):
    """Weights unlike any fresh ones."""
    torch.manual_seed(5)
    return {
        k: torch.rand_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()
    }


def build(name, file):
    return create_detector(name, 2, backbone_weights=file, **NARROW).backbone


def test_torchvision_and_wrappers(tmp_path):
    state = scrambled(torchvision.models.resnet18())
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "r18.pth")
    backbone = build("gfl_r18", tmp_path / "r18.pth")
    for key, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_caffe_file_without_counters(tmp_path):
    state = scrambled(timm.create_model("resnet18"))
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "r18.safetensors")
    backbone = build("gfl_r18_caffe", tmp_path / "r18.safetensors")
    assert torch.equal(backbone.body.layer4[1].bn2.running_var, state["layer4.1.bn2.running_var"])


def test_timm_flattens_names(tmp_path):
    state = scrambled(timm.create_model("convnext_atto"))
    torch.save(state, tmp_path / "atto.pth")
    backbone = build("gfl_convnext_atto", tmp_path / "atto.pth")
    assert torch.equal(
        backbone.body.stages_3.blocks[1].mlp.fc1.weight, state["stages.3.blocks.1.mlp.fc1.weight"]
    )


@pytest.mark.parametrize(
    "name", ["resnetv2_50", "twins_svt_small", pytest.param("hrnet_w18_small", marks=SLOW)]
)
def test_timms_own_file_fits_whatever_timm_makes_of_the_network(name, tmp_path):
    state = scrambled(timm.create_model(name))
    torch.save(state, tmp_path / "own.pth")
    backbone = build(f"gfl_{name}", tmp_path / "own.pth")
    filled = backbone.body.state_dict()
    assert all(
        any(v.equal(w) for w in state.values() if w.shape == v.shape) for v in filled.values()
    )


def test_swin_of_its_authors(tmp_path):
    """They merge patches at the end of a stage, and keep tables that timm computes."""
    backbone = Backbone("swin_tiny_patch4_window7_224")
    wanted = scrambled(backbone.body)
    theirs = {"head.weight": torch.zeros(1000, 768), "norm.bias": torch.zeros(768)}
    for key, tensor in wanted.items():
        stage = int(key[7]) if key.startswith("layers_") else 0
        before = f"layers_{stage}.downsample", f"layers.{stage - 1}.downsample"
        theirs[key.replace(*before).replace("layers_", "layers.")] = tensor
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    load_backbone(backbone, tmp_path / "swin.pth", "swin")
    for key, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


def test_heads_mobilenet_takes_the_last_convolution_too(tmp_path):
    state = scrambled(timm.create_model("mobilenetv2_100"))
    torch.save(state, tmp_path / "mnv2.pth")
    head = build("retinanet_mobilenetv2_head", tmp_path / "mnv2.pth")
    assert torch.equal(head.top.conv.weight, state["conv_head.weight"])
    plain = build("retinanet_mobilenetv2", tmp_path / "mnv2.pth")
    assert torch.equal(plain.body.blocks[6][0].bn3.bias, state["blocks.6.0.bn3.bias"])


def test_openmmlabs_classifier(tmp_path):
    state = scrambled(timm.create_model("resnet18"))
    theirs = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    torch.save({"state_dict": {**theirs, "head.fc.weight": state["fc.weight"]}}, tmp_path / "c.pth")
    backbone = build("gfl_r18", tmp_path / "c.pth")
    assert torch.equal(backbone.body.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(("held", "wanted"), [("resnet34", "gfl_r18"), ("resnet18", "gfl_r34")])
def test_a_deeper_or_shallower_network_is_refused(held, wanted, tmp_path):
    torch.save(timm.create_model(held).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not fit the backbone resnet\d\d in \d+"):
        build(wanted, tmp_path / "other.pth")


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="no such file with weights of the backbone resnet18"):
        build("gfl_r18", tmp_path / "none.pth")
    with pytest.raises(UserError, match="keep one"):
        create_detector("gfl_r18", 2, backbone_weights="a.pth", pretrained=True)
    with pytest.raises(UserError, match="only MobileNetV2 has the form of HEAD"):
        create_detector("gfl", 2, backbone="resnet18_head")

"""Detectors that were registered from outside the package."""

import pytest
import torch
from torch import nn

import detdistill as dd
from detdistill.detectors.gfl import GFL
from detdistill.detectors.registry import FAMILIES, register_detector
from tests.helpers import make_batch, narrow


class Simple(GFL):
    """It always has the same backbone; the constructor has no keyword of ours."""

    family = "simple"

    def __init__(self, num_classes, width=16):
        super().__init__(
            num_classes, backbone="resnet18", base_channels=8, fpn_channels=width, tower_channels=16
        )


class Plain(Simple):
    """Without any option."""

    family = "plain"

    def __init__(self, num_classes):
        super().__init__(num_classes)


class Module(nn.Module):
    def __init__(self, num_classes):
        super().__init__()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
    for name, entry in (("simple", Simple), ("plain", Plain), ("module", Module)):
        register_detector(name)(entry)


def test_a_family_without_backbones_has_one_name():
    assert dd.list_detectors("simple*") == ["simple"]
    detector = dd.create_detector("simple", 3, width=8)
    assert (detector.name, detector.options, detector.pyramid_channels) == (
        "simple",
        {"width": 8},
        8,
    )


@pytest.mark.parametrize(("name", "options"), [("simple", {"width": 8}), ("plain", {})])
def test_it_learns_saves_and_loads(name, options, tmp_path):
    detector = dd.create_detector(name, 3, **options)
    terms = dd.Distiller(detector, narrow(seed=1), {"crosskd": dd.CrossKD()})(make_batch())
    assert "crosskd/cls" in terms and sum(terms.values()).isfinite()
    dd.save_detector(detector, tmp_path / "model.safetensors")
    loaded = dd.load_detector(tmp_path)
    assert (loaded.name, loaded.options) == (name, options)
    for key, value in detector.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simple_r18", {}, "unknown detector 'simple_r18'; 'simple' takes no backbone"),
        ("simple", {"backbone": "resnet18"}, "has no option 'backbone'"),
        ("simple", {"num_classes_": 3}, "has no option 'num_classes_'"),
        ("simple", {"backbone_weights": "r18.pth"}, "takes no backbone; leave backbone_weights"),
        ("module", {}, "makes a Module, which is no FPNDetector; derive its class"),
    ],
)
def test_what_cannot_be_built_is_said(name, options, message):
    with pytest.raises(dd.UserError, match=message):
        dd.create_detector(name, 3, **options)


def test_a_box_coding_that_no_method_knows_is_said(monkeypatch):
    monkeypatch.setattr(Simple, "box_coding", "corners")
    teacher = dd.create_detector("simple", 3)
    known = "'distribution' or 'deltas' or 'distances' or 'points'"
    with pytest.raises(dd.UserError, match=f"simple: box_coding is 'corners'; expected {known}"):
        dd.Distiller(narrow(), teacher, {"crosskd": dd.CrossKD()})

"""Weights from files, good and bad."""

import json
import pickle

import pytest
import torch

from detdistill import UserError, create_detector, load_detector, save_detector
from detdistill.detectors.checkpoints import MMDETECTION
from tests.helpers import DENSE_R18, narrow


@pytest.fixture
def saved(tmp_path):
    save_detector(narrow(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


class Evil:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_does_not_run(tmp_path):
    file, mark = tmp_path / "evil.pth", tmp_path / "mark"
    torch.save({"state_dict": {"a": Evil(mark)}}, file)
    with pytest.raises(UserError, match="could run code"):
        load_detector("gfl_r18", file)
    file.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(UserError):
        load_detector("gfl_r18", file)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_safetensors(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable weights file"):
        load_detector(saved)


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_pth(tmp_path, keep):
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": narrow().state_dict()}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"weights\.pth"):
        load_detector("gfl_r18", file)


def test_another_detector(saved):
    with pytest.raises(UserError, match="holds gfl_r18, not retinanet_r18"):
        load_detector("retinanet_r18", saved)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such weights file"):
        load_detector("gfl_r18", tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"no model\.safetensors in this folder"):
        load_detector(tmp_path)


def test_broken_facts(saved):
    saved.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=r"model\.json"):
        load_detector(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 99),
        ("num_classes", "abc"),
        ("num_classes", 0),
        ("pixel_mean", [1, 2]),
        ("pixel_std", [0, 1, 1]),
        ("input_size", [0, 0]),
        ("detector", "gfl_r81"),
        ("options", {"fpn_chanels": 3}),
    ],
)
def test_impossible_facts_name_the_file(saved, key, value):
    path = saved.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"model\.json: "):
        load_detector(saved)


def test_published_files_are_readable_by_others(saved):
    assert saved.stat().st_mode == saved.with_suffix(".json").stat().st_mode


@pytest.mark.parametrize("content", [b"<html>404</html>", b"version https://git-lfs", b"\x00" * 99])
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match="not a readable weights file"):
        load_detector("gfl_r18", tmp_path / "weights.pth")


def test_weights_without_facts_need_a_name(saved):
    saved.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="says which detector"):
        load_detector(saved)


def test_every_misfit_is_listed_unless_allowed(tmp_path):
    state = narrow().state_dict()
    del state["scales.0.scale"]
    state["extra"] = torch.zeros(1)
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    options = {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16}
    with pytest.raises(UserError, match=r"missing scales\.0\.scale; left over extra"):
        load_detector("gfl_r18", file, **options)
    loaded = load_detector("gfl_r18", file, strict=False, **options)
    assert torch.equal(loaded.state_dict()["logits.weight"], state["logits.weight"])


REPPOINTS = {
    "logits": "reppoints_cls_out",
    "deform.cls": "reppoints_cls_conv",
    "deform.box": "reppoints_pts_refine_conv",
    "init_conv": "reppoints_pts_init_conv",
    "init_points": "reppoints_pts_init_out",
    "refined_points": "reppoints_pts_refine_out",
    "moment_transfer": "moment_transfer",
}


def to_mmdetection(state, family):
    """The inverse of the published table, for a round trip."""
    import re

    prefixes = {"retinanet": "retina_", "fcos": "conv_", "reppoints": "reppoints_"}
    prefix = prefixes.get(family, f"{family}_")
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("backbone.body.", "backbone.")
        name = re.sub(r"fpn\.lateral\.(\d)", r"neck.lateral_convs.\1.conv", name)
        name = re.sub(r"fpn\.output\.(\d)", r"neck.fpn_convs.\1.conv", name)
        name = re.sub(r"fpn\.lateral_norm\.(\d)", r"neck.lateral_convs.\1.gn", name)
        name = re.sub(r"fpn\.output_norm\.(\d)", r"neck.fpn_convs.\1.gn", name)
        name = name.replace("towers.cls.blocks", "bbox_head.cls_convs")
        name = name.replace("towers.box.blocks", "bbox_head.reg_convs").replace(".norm.", ".gn.")
        if family == "reppoints":
            for ours, theirs in REPPOINTS.items():
                name = re.sub(f"^{ours}", f"bbox_head.{theirs}", name)
        name = re.sub(r"^logits", f"bbox_head.{prefix}cls", name)
        name = re.sub(r"^quality", f"bbox_head.{prefix}centerness", name)
        name = re.sub(r"^(deltas|distances|distributions)", f"bbox_head.{prefix}reg", name)
        renamed[re.sub(r"^scales", "bbox_head.scales", name)] = tensor
    return renamed


@pytest.mark.parametrize("family", [name.removesuffix("_r18") for name in DENSE_R18])
@pytest.mark.parametrize("extra", ["c5", "p5"])
def test_mmdetection_keys_and_shapes_say_the_options(family, extra, tmp_path):
    detector = narrow(f"{family}_r18", 5, fpn_extra=extra, tower_depth=2)
    state = to_mmdetection(detector.state_dict(), family)
    if family == "gfl":
        state["bbox_head.integral.project"] = torch.arange(17.0)
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "published.pth")
    loaded = load_detector(f"{family}_r18", tmp_path / "published.pth")
    assert loaded.num_classes == 5
    assert (loaded.options["frozen_stages"], loaded.options["norm_eval"]) == (1, True)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert len(MMDETECTION) == len({pattern for pattern, _ in MMDETECTION})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gfl_r81", {}, "did you mean 'gfl_r18'"),
        ("glf_r18", {}, "unknown detector 'glf_r18'"),
        ("gfl_r18", {"fpn_chanels": 64}, "did you mean 'fpn_channels'"),
        ("gfl_r18", {"fpn_channels": "wide"}, "option fpn_channels"),
        ("gfl_r18", {"fpn_extra": "c4"}, "option fpn_extra"),
        ("gfl_r18", {"tower_depth": -1}, "from 0 on"),
        ("gfl_r18", {"fpn_channels": 0}, "option fpn_channels"),
        ("gfl_r18", {"reg_max": 0}, "option reg_max"),
        ("gfl_r18", {"reduce": "foo"}, "option reduce"),
        ("gfl_r18", {"frozen_stages": 9}, "option frozen_stages"),
        ("gfl", {"backbone": "resnet18d", "base_channels": 8}, "resnet152 only"),
        ("fcos_r50_cafe_gn", {}, "did you mean 'fcos_r50_caffe_gn'"),
        ("fcos_r18", {"box_loss": "l1"}, "option box_loss"),
        ("fcos_r50_caffe", {"pretrained": True}, "no pretrained weights for the caffe-style"),
        ("gfl", {"backbone": "mobilenetv3_small_050_caffe"}, "only ResNets have a caffe-style"),
        ("gfl", {"backbone": "resnet999"}, "no backbone 'resnet999'"),
        ("gfl", {"backbone": "vit_tiny_patch16_224"}, "strides"),
        ("gfl", {"backbone": "mobilenetv3_small_050", "base_channels": 8}, "resnet152 only"),
    ],
)
def test_refusals_name_the_fault(name, options, message):
    with pytest.raises(UserError, match=message):
        create_detector(name, 3, **options)

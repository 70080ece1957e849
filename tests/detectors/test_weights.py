"""Weights from files, good and bad."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save

from detdistill import UserError, create_detector, load_detector, save_detector
from detdistill.detectors.checkpoints import MMDETECTION, to_mmdetection_state
from detdistill.errors import UserNotice
from tests.helpers import DENSE_R18, FAMILIES_R18, narrow


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
    with pytest.raises(UserError, match=r"evil.pth is a Python pickle that .* could run code"):
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
        ("pixel_mean", [float("nan"), 1, 1]),
        ("pixel_std", [float("inf"), 1, 1]),
        ("classes", ["cat", "dog"]),  # of three
        ("classes", ["cat", "dog", "cat"]),
        ("input_size", [0, 0]),
        ("input_size", [10**6, 10**6]),
        ("detector", "gfl_r81"),
        ("options", {"fpn_chanels": 3}),
        ("options", {"num_classes": 3}),
    ],
)
def test_impossible_facts_name_the_file(saved, key, value):
    path = saved.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=r"model\.json: "):
        load_detector(saved)


def test_published_files_are_readable_by_others(saved):
    assert saved.stat().st_mode == saved.with_suffix(".json").stat().st_mode


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>404</html>", "it begins with b'<html>404</html>'"),
        (b"version https://git-lfs", "it begins with b'version https"),
        (b"\x00" * 99, "it begins with"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_no_checkpoint_at_all(tmp_path, content, reason, ending):
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name}: not a readable weights file: {reason}"):
        load_detector("gfl_r18", file)


def test_a_file_under_the_ending_of_another_format(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.pth").write_bytes(save({"a": torch.zeros(1)}))
    (tmp_path / "c.pth").write_bytes(b"PK\x03\x04" + b"\x00" * 99)
    for name, reason in (
        ("a.safetensors", r"a\.safetensors holds what a \.pth file holds; give it a name"),
        ("b.pth", r"b\.pth holds what a \.safetensors file holds; give it a name"),
        ("c.pth", r"c\.pth: not a readable weights file: perhaps truncated"),
    ):
        with pytest.raises(UserError, match=reason):
            load_detector("gfl_r18", tmp_path / name)


def test_a_truncated_pickle_says_so_in_few_words(tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"state_dict": narrow().state_dict()}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="perhaps truncated") as told:
        load_detector("gfl_r18", file)
    assert "weights_only" not in str(told.value) and len(str(told.value)) < 300


@pytest.mark.parametrize("left", [30, 5000, -999])
def test_a_truncated_archive_says_so(tmp_path, left):
    torch.save({"state_dict": narrow().state_dict()}, tmp_path / "new.pth")
    content = (tmp_path / "new.pth").read_bytes()
    (tmp_path / "new.pth").write_bytes(content[:left])
    with pytest.raises(UserError, match=r"new\.pth: not a readable weights file: perhaps trunc"):
        load_detector("gfl_r18", tmp_path / "new.pth")


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ("gfl_r18", "retinanet_r18"),
        ("gfl_r34", "gfl_r18"),
        ("fcos_r18_gn", "fcos_r50_gn"),
        ("retinanet_r50", "faster_rcnn_r18"),
        ("faster_rcnn_r18", "cascade_rcnn_r18"),
        ("atss_r18", "reppoints_r18"),
        ("retinanet_r18", "atss_r18"),
    ],
)
def test_an_mmdetection_file_of_another_detector_is_told_apart(held, wanted, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(to_mmdetection_state(narrow(held)), file)
    sentence = f"weights.pth holds the weights of {held}, not of {wanted}; name it {held}$"
    with pytest.raises(UserError, match=sentence):
        load_detector(wanted, file)


def test_weights_that_exploded(saved):
    detector = narrow()
    detector.scales[0].scale.data.fill_(float("nan"))
    save_detector(detector, saved)
    with pytest.raises(UserError, match=r"model\.safetensors: scales\.0\.scale is not finite"):
        load_detector(saved)


def test_the_facts_are_not_the_weights(saved):
    with pytest.raises(UserError, match=r"model\.json: not the weights"):
        load_detector(saved.with_suffix(".json"))


def test_the_weights_say_the_number_of_classes(saved):
    with pytest.raises(UserError, match="the weights say num_classes"):
        load_detector(saved, num_classes=5)


def test_an_empty_table(tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="table of tensors is empty"):
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
    with pytest.warns(UserNotice, match=r"in 2 tensors, which were .*: missing .*; left over ext"):
        loaded = load_detector("gfl_r18", file, strict=False, **options)
    assert torch.equal(loaded.state_dict()["logits.weight"], state["logits.weight"])


@pytest.mark.parametrize("family", [name.removesuffix("_r18") for name in DENSE_R18])
@pytest.mark.parametrize("extra", ["c5", "p5"])
def test_mmdetection_keys_and_shapes_say_the_options(family, extra, tmp_path):
    detector = narrow(f"{family}_r18", 5, fpn_extra=extra, tower_depth=2)
    state = to_mmdetection_state(detector)
    assert all(key.startswith(("backbone.", "neck.", "bbox_head.")) for key in state)
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "published.pth")
    loaded = load_detector(f"{family}_r18", tmp_path / "published.pth")
    assert loaded.num_classes == 5
    assert (loaded.options["frozen_stages"], loaded.options["norm_eval"]) == (1, True)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert len(MMDETECTION) == len({pattern for pattern, *_ in MMDETECTION})


OTHER_BACKBONES = ["r18_caffe", "mobilenetv2", "mobilenetv2_head", "swin_t"]


@pytest.mark.parametrize(
    "name",
    [
        *FAMILIES_R18,
        *(f"retinanet_{b}" for b in OTHER_BACKBONES),
        pytest.param("retinanet_x101_32x4d", marks=pytest.mark.slow),  # nothing narrows it
    ],
)
def test_round_trip_over_mmdetections_names(name, tmp_path):
    detector = narrow(name)
    state = to_mmdetection_state(detector)
    torch.save(state, tmp_path / "theirs.pth")
    back = to_mmdetection_state(load_detector(name, tmp_path / "theirs.pth"))
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key


def test_no_names_for_other_backbones():
    for backbone in ("mobilenetv3_small_050", "resnet18d"):
        detector = create_detector("gfl", 2, backbone=backbone, fpn_channels=8, tower_channels=8)
        with pytest.raises(UserError, match=f"MMDetection has no backbone '{backbone}'"):
            to_mmdetection_state(detector)


HEADS_HELPERS = {
    "roi_head.bbox_head.shared_fcs.0.weight": torch.zeros(4, 4),
    "roi_head.bbox_head.fc_cls.bias": torch.zeros(4),
    "adapts.akd_first_fc.weight": torch.zeros(4, 4),
}


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_heads_student_leaves_its_assistant(family, tmp_path):
    detector = narrow(f"{family}_r18", 3)
    state = to_mmdetection_state(detector)
    state = {key.replace("bbox_head.", "rpn_head."): v for key, v in state.items()}
    torch.save({"state_dict": {**state, **HEADS_HELPERS}}, tmp_path / "head.pth")
    with pytest.warns(UserNotice, match=r"left out: 3 tensors .*\(adapts, roi_head\)") as notices:
        loaded = load_detector(f"{family}_r18", tmp_path / "head.pth")
    assert notices[0].filename == __file__
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_crosskds_student_leaves_its_teacher(tmp_path):
    student, teacher = narrow("gfl_r18", seed=1), narrow("gfl_r34", seed=2)
    state = to_mmdetection_state(student)
    state |= {f"teacher.{key}": v for key, v in to_mmdetection_state(teacher).items()}
    torch.save({"state_dict": state}, tmp_path / "crosskd.pth")
    with pytest.warns(UserNotice, match=r"student alone is loaded.*\(teacher\)"):
        loaded = load_detector("gfl_r18", tmp_path / "crosskd.pth")
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_files_without_batch_norm_counters_load(tmp_path):
    state = to_mmdetection_state(narrow())
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    loaded = load_detector("gfl_r18", tmp_path / "old.pth")
    assert torch.equal(loaded.logits.bias, state["bbox_head.gfl_cls.bias"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gfl_r81", {}, "did you mean 'gfl_r18'"),
        ("glf_r18", {}, "unknown detector 'glf_r18'"),
        ("gfl_r18", {"fpn_chanels": 64}, "did you mean 'fpn_channels'"),
        ("gfl_r18", {"fpn_channels": "wide"}, "option fpn_channels"),
        ("gfl_r18", {"fpn_extra": "c4"}, "option fpn_extra"),
        ("gfl_r18", {"tower_depth": -1}, "option tower_depth"),
        ("gfl_r18", {"fpn_channels": 0}, "option fpn_channels"),
        ("gfl_r18", {"fpn_channels": 10**9}, "option fpn_channels"),
        ("gfl_r18", {"tower_depth": 10**9}, "option tower_depth"),
        ("gfl_r18", {"reg_max": 0}, "option reg_max"),
        ("gfl_r18", {"reduce": "foo"}, "option reduce"),
        ("gfl_r18", {"frozen_stages": 9}, "option frozen_stages"),
        ("gfl", {"backbone": "resnet18d", "base_channels": 8}, "resnet152 only"),
        ("fcos_r50_cafe_gn", {}, "did you mean 'fcos_r50_caffe_gn'"),
        ("fcos_r18", {"box_loss": "l1"}, "option box_loss"),
        ("fcos_r50_caffe", {"pretrained": True}, "no pretrained weights for the caffe-style"),
        ("gfl", {"backbone": "mobilenetv3_small_050_caffe"}, "only ResNets have a caffe-style"),
        ("gfl", {"backbone": "resnet999"}, "no backbone 'resnet999'"),
        ("gfl", {"backbone": "resent50"}, "did you mean resnet50"),
        ("gfl", {"backbone": "r18"}, r"no backbone 'r18'; did you mean resnet18\?$"),
        ("gfl", {"backbone": "R50_caffe"}, r"did you mean resnet50_caffe\?$"),
        ("gfl", {"backbone": "r81"}, "no backbone 'r81'; did you mean resnet18"),
        ("gfl", {"backbone": "mobilenetv3"}, r"did you mean mobilenetv2_100, mobilenetv3_large"),
        ("gfl", {"backbone": "maxvit_tiny_tf_224"}, "does not take images of any size.*by window"),
        ("gfl", {"backbone": "inception_v3"}, r"makes maps of \[13, 6, 2\] cells from 128 pixels"),
        ("GFL_R18", {}, "did you mean 'gfl_r18'"),
        ("xyz", {}, "known: atss_.* and 90 more"),
        ("gfl", {"backbone": "vit_tiny_patch16_224"}, "strides"),
        ("gfl", {"backbone": "mobilenetv3_small_050", "base_channels": 8}, "resnet152 only"),
    ],
)
def test_refusals_name_the_fault(name, options, message):
    with pytest.raises(UserError, match=message):
        create_detector(name, 3, **options)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, "3"])
def test_a_number_of_classes(num_classes):
    with pytest.raises(UserError, match="expected a whole number from 1 on"):
        create_detector("gfl_r18", num_classes)

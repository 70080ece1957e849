"""torchvision's state_dicts, told apart by their keys, as views of the models they come from."""

import hashlib
import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import detection, mobilenet_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detdistill import UserError, as_detector, load_detector, save_detector
from detdistill.detectors import torchvision_models
from detdistill.errors import UserNotice
from tests.detectors.test_two_stage_views import lively as two_stage
from tests.detectors.test_two_stage_views import tame
from tests.detectors.test_views import lively
from tests.helpers import make_batch


def build(kind, classes=4, norm=FrozenBatchNorm2d, **options):
    """Full width: that is what a file of torchvision's has."""
    if kind.startswith("faster"):
        name = {"v1": "resnet50_fpn", "v2": "resnet50_fpn_v2"}.get(
            kind[7:], "mobilenet_v3_large_fpn"
        )
        make = getattr(detection, f"fasterrcnn_{name}")
        model = make(weights=None, weights_backbone=None, num_classes=classes, **options)
        return tame(two_stage(model)).eval()
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=norm,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(512 if kind == "retinanet_v2" else 256, 256),
    )
    if kind == "fcos":
        return lively(detection.FCOS(backbone, classes)).eval()
    model = detection.RetinaNet(backbone, classes)
    if kind == "retinanet_v2":
        model.head = RetinaNetHead(256, 9, classes, norm_layer=partial(nn.GroupNorm, 32))
        model.head.regression_head._loss_type = "giou"
    return lively(model).eval()


def outputs(view):
    batch = make_batch(size=(64, 64), num_classes=2)
    torch.manual_seed(0)  # of the samplers
    with torch.no_grad():
        output = view(batch)
        losses = view.loss(output, batch.padded_targets())
        found = view.detect(output, batch.sizes)
    return [*output.predictions.logits, *output.predictions.boxes, *losses.values()], found


def assert_same(view, other):
    (maps, boxes), (other_maps, other_boxes) = outputs(view), outputs(other)
    for mine, own in zip(maps, other_maps, strict=True):
        assert torch.equal(mine, own)
    for mine, own in zip(boxes, other_boxes, strict=True):
        assert len(mine) > 0 and torch.equal(mine.boxes_xyxy, own.boxes_xyxy)


@pytest.mark.parametrize("kind", ["retinanet_v1", "retinanet_v2", "fcos"])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_a_state_dict_becomes_its_model(kind, norm, tmp_path):
    model = build(kind, norm=norm)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    family = kind.partition("_")[0]
    view = load_detector(f"{family}_r18", tmp_path / "weights.pth").eval()
    assert view.name == f"torchvision_{family}_r18" + ("_v2" if kind == "retinanet_v2" else "")
    assert view.num_classes == 4
    for key, tensor in model.state_dict().items():
        assert torch.equal(view.model.state_dict()[key], tensor), key
    assert_same(view, as_detector(model))
    frozen = [n for n, p in view.model.backbone.named_parameters() if not p.requires_grad]
    assert {name.split(".")[1] for name in frozen} <= {"conv1", "bn1", "layer1"}


def old_names(state):
    """As torchvision named them before 2022, and as its published RetinaNet still has them."""
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
        found = re.fullmatch(r"(head\..+\.conv)\.(\d)\.0\.(\w+)", key)
        renamed[f"{found[1]}.{2 * int(found[2])}.{found[3]}" if found else key] = tensor
    return renamed


def test_names_of_before_2022(tmp_path):
    model = build("retinanet_v1")
    state = old_names(model.state_dict())
    assert "head.classification_head.conv.6.weight" in state
    assert "backbone.fpn.inner_blocks.0.weight" in state
    torch.save({"model": state}, tmp_path / "weights.pth")
    view = load_detector("retinanet_r18", tmp_path / "weights.pth")
    assert view.model.state_dict().keys() == model.state_dict().keys()
    assert_same(view.eval(), as_detector(model))


def test_the_published_v1_runs_without_epsilon(tmp_path, monkeypatch):
    model = build("retinanet_v1")
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)

    def epsilons():
        modules = load_detector("retinanet_r18", file).model.modules()
        return {m.eps for m in modules if isinstance(m, FrozenBatchNorm2d)}

    assert epsilons() == {1e-5}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    published = torchvision_models.PUBLISHED
    assert published["eeacb38b"] == {"norm_eps": 0.0}
    monkeypatch.setitem(published, digest[:8], published["eeacb38b"])
    assert epsilons() == {0.0}
    monkeypatch.setitem(published, digest[:8], {"traits": {"transform.min_size": [320]}})
    assert load_detector("retinanet_r18", file).input_size == (320, 1333)


def test_coco_categories_become_the_80_classes(tmp_path):
    model = build("fcos", classes=91)
    torch.save(model.state_dict(), tmp_path / "coco.pth")
    view = load_detector("fcos_r18", tmp_path / "coco.pth")
    assert (view.num_classes, len(view.classes)) == (80, 80)
    assert (view.classes[0], view.labels[0]) == ("person", 1)
    assert (view.classes[-1], view.labels[-1]) == ("toothbrush", 90)
    assert load_detector("fcos_r18", tmp_path / "coco.pth", labels=[5]).num_classes == 1


@pytest.mark.parametrize(("kind", "count"), [("fcos", 91), ("faster_mobilenet", 90)])
def test_ninety_one_labels_of_ones_own_stay_what_they_were(kind, count, tmp_path):
    view = as_detector(build(kind, classes=91))
    view.input_size = (64, 96)
    save_detector(view, tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path)
    assert (loaded.num_classes, loaded.classes, loaded.labels) == (count, None, None)
    assert loaded.input_size == (64, 96)
    assert load_detector(tmp_path, min_size=128).input_size[0] == 128
    facts = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(facts | {"num_classes": 80}))
    with pytest.raises(UserError, match=f"its labels are {count}, its num_classes 80"):
        load_detector(tmp_path)


FASTER = {"faster_v1": "r50", "faster_v2": "r50", "faster_mobilenet": "mobilenet_v3_large"}


@pytest.mark.parametrize("kind", FASTER)
def test_faster_rcnn(kind, tmp_path):
    model = build(kind)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    view = load_detector(f"faster_rcnn_{FASTER[kind]}", tmp_path / "weights.pth").eval()
    assert view.name.endswith(FASTER[kind] + ("_v2" if kind == "faster_v2" else ""))
    assert view.num_classes == 3  # without the background
    for key, tensor in model.state_dict().items():
        assert torch.equal(view.model.state_dict()[key], tensor), key
    assert_same(view, as_detector(model))


def test_faster_rcnn_saves_what_its_weights_do_not_show(tmp_path):
    model = build("faster_mobilenet", rpn_score_thresh=0.2, box_batch_size_per_image=33)
    model.backbone.body["0"].requires_grad_(False)
    view = as_detector(model, labels=[2, 1])
    save_detector(view, tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path).eval()
    assert loaded.model.rpn.score_thresh == 0.2
    assert loaded.model.roi_heads.fg_bg_sampler.batch_size_per_image == 33
    frozen = [n for n, p in loaded.model.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("backbone.body.0.") for name in frozen)
    assert_same(loaded, view)


@pytest.mark.parametrize("kind", ["retinanet_v2", "fcos"])
def test_a_view_saves_the_models_own_names_and_loads_again(kind, tmp_path):
    model = build(kind, norm=nn.BatchNorm2d)
    model.score_thresh, model.detections_per_img = 0.3, 7
    model.anchor_generator.sizes = tuple((2 * s[0], *s[1:]) for s in model.anchor_generator.sizes)
    model.anchor_generator.cell_anchors = [
        model.anchor_generator.generate_anchors(s, r)
        for s, r in zip(
            model.anchor_generator.sizes, model.anchor_generator.aspect_ratios, strict=True
        )
    ]
    model.backbone.body.layer1.requires_grad_(False)
    view = as_detector(model, labels=[3, 1])
    view.classes = ["cat", "dog"]
    save_detector(view, tmp_path / "model.safetensors")
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))  # the user's own way back
    loaded = load_detector(tmp_path).eval()
    assert (loaded.labels, loaded.classes) == ([3, 1], ["cat", "dog"])
    assert (loaded.model.score_thresh, loaded.model.detections_per_img) == (0.3, 7)
    assert not any(p.requires_grad for p in loaded.model.backbone.body.layer1.parameters())
    assert all(p.requires_grad for p in loaded.model.backbone.body.layer2.parameters())
    assert_same(loaded, view)
    assert json.loads((tmp_path / "model.json").read_text())["detector"].startswith("torchvision_")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fcos_r18", "holds torchvision's retinanet_r18, not fcos_r18; name it retinanet_r18"),
        ("retinanet_r50", "not retinanet_r50; name it retinanet_r18"),
    ],
)
def test_another_name_is_refused(name, message, tmp_path):
    torch.save(build("retinanet_v1").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        load_detector(name, tmp_path / "weights.pth")


def test_refusals(tmp_path):
    file = tmp_path / "weights.pth"
    state = build("retinanet_v1").state_dict()
    torch.save({k: v for k, v in state.items() if "bbox_reg.weight" not in k}, file)
    with pytest.raises(UserError, match=r"missing head\.regression_head\.bbox_reg\.weight"):
        load_detector("retinanet_r18", file)
    with pytest.warns(
        UserNotice, match="in 1 tensors, which were left as they are: miss"
    ) as notices:
        assert load_detector("retinanet_r18", file, strict=False).num_classes == 4
    assert notices[0].filename == __file__
    with pytest.raises(UserError, match=r"torchvision's retinanet_r18.*no option 'fpn_channels'"):
        load_detector("retinanet_r18", file, fpn_channels=8)
    with pytest.raises(UserError, match="traits: a torchvision model has no 'forward'"):
        load_detector("retinanet_r18", file, traits={"forward": 1})
    backbone = mobilenet_v2().features[:7]
    backbone.out_channels = 32
    sizes, ratios = ((32, 64),), ((0.5, 1.0),)
    generator = detection.anchor_utils.AnchorGenerator(sizes, ratios)
    other = detection.RetinaNet(backbone, 2, anchor_generator=generator)
    torch.save(other.state_dict(), file)
    with pytest.raises(UserError, match=r"another backbone or pyramid.*detdistill\.as_detector"):
        load_detector("retinanet_r18", file)
    assert as_detector(other).strides == (8,)

"""Detectors that are cut to some of their classes, and how classes are matched by name."""

import copy
import shlex
from types import SimpleNamespace

import pytest
import torch
import torchvision

import detdistill as dd
from detdistill import UserError, as_detector, load_detector, match_classes, save_detector
from detdistill.detectors.classes import keep_classes, map_option, match_if_known
from detdistill.detectors.factory import untrained
from detdistill.errors import UserNotice
from detdistill.recipe import resolve_recipe
from tests.helpers import DENSE_R18, FAMILIES_R18, TWO_STAGE_R18, make_batch, narrow

KNOWN = ["person", "car", "dog", "cat", "bus"]
KEPT = [3, 0]  # another order, too
STUDENT = ["cat", "person"]


def lively(name, **options):
    """A detector whose predictions differ from class to class and from place to place."""
    model = narrow(name, len(KNOWN), **options).eval()
    model.classes = list(KNOWN)
    for layer_name, layer in model.named_modules():
        if layer_name.endswith(("logits", "points")):
            torch.nn.init.normal_(layer.weight, std=0.1)
            torch.nn.init.zeros_(layer.bias)
    return model


def cut(model, kept=KEPT):
    copied = copy.deepcopy(model)
    keep_classes(copied, kept)
    return copied


@pytest.mark.parametrize("name", DENSE_R18)
@torch.no_grad()
def test_a_dense_head_predicts_of_the_classes_that_stay_what_it_did(name):
    model, batch = lively(name), make_batch(num_classes=2)
    part = cut(model)
    whole, found = model(batch).predictions, part(batch).predictions
    for level, (wanted, own) in enumerate(zip(whole.logits, found.logits, strict=True)):
        torch.testing.assert_close(own, wanted[:, :, KEPT], msg=f"level {level}")
    assert all(torch.equal(*pair) for pair in zip(whole.boxes, found.boxes, strict=True))
    assert part.num_classes == 2 and part.cut == (KEPT, 5) and part.classes == STUDENT
    assert not part.logits.weight.requires_grad ^ model.logits.weight.requires_grad


@pytest.mark.parametrize("name", TWO_STAGE_R18)
@torch.no_grad()
def test_a_softmax_counts_what_is_left_out_as_background(name):
    model, batch = lively(name), make_batch(num_classes=2)
    part = cut(cut(model, [4, 3, 0]), [1, 2])  # also in two goes
    output = model(batch)
    rois = model.propose(output, batch.sizes, max_per_image=20)
    for stage, head in enumerate(model.roi_heads):
        whole, found = (m.roi(output.pyramid, rois, stage) for m in (model, part))
        scores, of_all = found.logits.softmax(1), whole.logits.softmax(1)
        torch.testing.assert_close(scores[:, :2], of_all[:, KEPT])
        torch.testing.assert_close(scores[:, 2], of_all[:, [1, 2, 4, 5]].sum(1))
        boxes = whole.boxes
        if not head.class_agnostic:
            boxes = boxes.reshape(len(boxes), 5, 4)[:, KEPT].flatten(1)
        torch.testing.assert_close(found.boxes, boxes)


def scores_of(found, label):
    """Of the boxes of a class, but those without area, which NMS drops or not by chance."""
    width, height = (found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]).unbind(1)
    return found.scores[(found.labels == label) & (width * height > 1e-3)]


@pytest.mark.parametrize("name", [name for name in FAMILIES_R18 if not name.startswith("cascade")])
@torch.no_grad()
def test_detections_of_the_classes_that_stay_are_those_that_were(name):
    # So small that no level has more than the 1000 pairs of anchor and class that are looked at.
    model = lively(name)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = dd.Batch.from_images([torch.randint(0, 256, (3, 32, 32))], [empty])
    limits = {"score_threshold": 0.1, "max_detections": 100_000}
    for wanted, found in zip(
        *(m.detect(m(batch), batch.sizes, **limits) for m in (model, cut(model))), strict=True
    ):
        for label, known in enumerate(KEPT):
            scores = scores_of(wanted, known)
            own = scores_of(found, label)
            assert len(scores) > 0
            torch.testing.assert_close(own, scores)


@pytest.mark.parametrize("build", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
@torch.no_grad()
def test_a_dense_view_reads_fewer_labels(build):
    torch.manual_seed(0)
    model = getattr(torchvision.models.detection, build)(
        weights=None, weights_backbone=None, num_classes=6
    ).eval()
    view, part = (as_detector(model, labels=range(1, 6)) for _ in range(2))
    keep_classes(part, KEPT)
    batch = make_batch(num_classes=2)
    whole, found = view(batch).predictions.logits, part(batch).predictions.logits
    assert all(torch.equal(f, w[:, :, KEPT]) for f, w in zip(found, whole, strict=True))
    assert part.labels == [4, 1]


@torch.no_grad()
def test_a_view_of_faster_rcnn_finds_what_torchvision_finds():
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=6, box_score_thresh=0.01
    ).eval()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.02)
    image = make_batch(num_classes=2).images[0].float()
    [own] = model([image / 255])
    kept = own["labels"].unique(sorted=True).flip(0)[:2].tolist()
    part = as_detector(model)
    keep_classes(part, [label - 1 for label in kept])
    [found] = part.predict([image], score_threshold=0.01)
    for label, known in enumerate(kept):
        scores = own["scores"][own["labels"] == known]
        assert len(scores) > 0
        torch.testing.assert_close(found.scores[found.labels == label], scores, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "methods"),
    [
        ("gfl_r18", "gfl_r18", ["crosskd", "mimic", "ld", "rm", "pfi", "soft_label"]),
        ("fcos_r18_gn", "faster_rcnn_r18", ["head"]),
        ("retinanet_r18", "reppoints_r18", ["crosskd", "head"]),
        ("faster_rcnn_r18", "faster_rcnn_r18", ["crosskd_roi"]),
        ("faster_rcnn_r18", "cascade_rcnn_r18", ["head"]),
    ],
)
def test_methods_learn_from_a_teacher_that_was_cut(student, teacher, methods):
    taught, model = lively(teacher), narrow(student, 2)
    model.classes = list(STUDENT)
    made = {name: dd.create_method(name) for name in methods}
    for name, method in made.items():
        with pytest.raises(UserError, match=f"{name}: .* has 5 classes, the student .* 2, all of"):
            dd.Distiller(model, taught, {name: method})
    match_classes(taught, STUDENT)
    losses = dd.Distiller(model, taught, made)(make_batch(num_classes=2))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in taught.parameters())


def test_classes_are_matched_by_name():
    model = lively("gfl_r18")
    before = model.logits.weight
    match_classes(model, KNOWN)
    assert model.logits.weight is before and model.cut is None
    match_if_known(model, ["cat", "horse"])  # left to the methods, of which some need no classes
    assert model.classes == KNOWN
    match_if_known(model, ["cat", "woman"], {"woman": "person"})
    assert model.classes == ["cat", "woman"] and model.num_classes == 2
    assert torch.equal(model.logits.weight, before[KEPT])

    unnamed = lively("gfl_r18")
    unnamed.classes = None
    match_if_known(unnamed, STUDENT)
    assert unnamed.num_classes == 5
    match_classes(unnamed, STUDENT, {"cat": 3, "person": 0})
    assert unnamed.classes == STUDENT


@pytest.mark.parametrize(
    ("named", "class_map", "message"),
    [
        (True, {"cow": "dog"}, "class_map: 'cow' is no class of the data; did you mean 'crow'?"),
        (
            True,
            {},
            "gfl_r18 knows no class 'crow' among its 5; map it: --set class_map.crow=NAME; known: ",
        ),
        (True, {"crow": "burs"}, "knows no class 'burs' among its 5; did you mean 'bus'.$"),
        (True, {"crow": "cat"}, "'cat' and 'crow' are one class of gfl_r18"),
        (True, {"crow": 5}, "class_map: crow is 5, but gfl_r18 has labels 0..4"),
        (True, {"crow": -1}, "class_map: crow is -1, but gfl_r18 has labels 0..4"),
        (
            True,
            {"crow": "4"},
            "knows no class '4' .*; a label is a number without quotes: .*=4; known",
        ),
        (False, {"crow": 4}, "names none of its 5 classes; .* --set class_map.cat=0"),
    ],
)
def test_what_cannot_be_matched(named, class_map, message):
    model = lively("gfl_r18")
    model.classes = list(KNOWN) if named else None
    with pytest.raises(UserError, match=message):
        match_classes(model, ["cat", "crow"], class_map)
    assert model.num_classes == 5


@pytest.mark.parametrize(
    ("classes", "class_map", "message"),
    [
        ("cat", None, "classes is 'cat'; expected a list of names"),
        (2, None, "classes is 2; expected a list of names"),
        ([], None, r"classes is \[\]; expected a list of names"),
        (["cat", 0], None, r"classes is \['cat', 0\]; expected a list of names"),
        (["cat"], ["cat"], r"class_map is \['cat'\]; expected a mapping"),
        (["cat"], {"cat": 3.0}, "class_map: 'cat' is 3.0; expected what .* or its label"),
        (["cat"], {"cat": ["cat"]}, r"class_map: 'cat' is \['cat'\]; expected"),
        (["cat"], {"cat": True}, "class_map: 'cat' is True; expected"),
        (["cat"], {"cat": None}, "class_map: 'cat' is None; expected"),
    ],
)
def test_what_are_no_names_is_told(classes, class_map, message):
    model = lively("gfl_r18")
    with pytest.raises(UserError, match=message):
        match_classes(model, classes, class_map)
    assert model.classes == KNOWN


def test_what_a_label_stands_for_is_told():
    with pytest.warns(UserNotice) as told:
        match_classes(lively("gfl_r18"), ["bus", "pet", "scooter"], {"scooter": 1, "pet": 3})
    [notice] = told  # one, of however many labels
    assert str(notice.message) == (
        "class_map takes labels of gfl_r18: 1 is its 'car', here scooter; 3 is its 'cat', here pet"
    )
    assert notice.filename == __file__


def test_a_shell_takes_the_option_that_is_advised():
    for name in ("car", "traffic light", "v1.5 of it's", "a=b: c", "7"):
        _, setting = shlex.split(map_option(name, "dog"))
        assert resolve_recipe({}, "", assignments=[setting]).class_map == {name: "dog"}


@pytest.mark.parametrize("kept", [[], [0, 0], [5], [-1]])
def test_labels_that_cannot_stay(kept):
    with pytest.raises(ValueError, match=r"expected different labels of 0\.\.4"):
        keep_classes(lively("gfl_r18"), kept)


def test_a_family_of_others_may_not_know_how():
    stranger = SimpleNamespace(name="strange_r18", num_classes=2, classes=None)
    with pytest.raises(UserError, match="strange_r18 has no convolution `logits`"):
        keep_classes(stranger, [0])


def test_what_was_cut_is_saved_where_a_file_can_say_so(tmp_path):
    dense, two_stage = cut(lively("atss_r18")), cut(lively("faster_rcnn_r18"))
    save_detector(dense, tmp_path / "dense.safetensors")
    again = load_detector(tmp_path / "dense.safetensors")
    assert again.classes == STUDENT and again.num_classes == 2
    assert torch.equal(again.logits.weight, dense.logits.weight)
    with pytest.raises(UserError, match=r"was cut to 2 of its classes.*save it before"):
        save_detector(two_stage, tmp_path / "two_stage.safetensors")
    assert not (tmp_path / "two_stage.safetensors").exists()
    with pytest.raises(UserError, match=r"MMDetection.*was cut to 2 .*classes.*save it before"):
        dd.detectors.to_mmdetection_state(two_stage)
    assert "bbox_head.gfl_cls.weight" in dd.detectors.to_mmdetection_state(cut(lively("gfl_r18")))
    assert untrained(two_stage).num_classes == 2


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": tuple(KNOWN)},
        {"dataset_meta": {"classes": KNOWN}},
        {"dataset_meta": {"CLASSES": tuple(KNOWN), "PALETTE": []}},
    ],
)
def test_checkpoints_of_mmdetection_name_their_classes(meta, tmp_path):
    model = lively("gfl_r18")
    state = dd.detectors.to_mmdetection_state(model)
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "named.pth")
    assert load_detector("gfl_r18", tmp_path / "named.pth").classes == KNOWN


@pytest.mark.parametrize("meta", [None, {}, {"CLASSES": None}, {"dataset_meta": {"classes": 80}}])
def test_checkpoints_without_names(meta, tmp_path):
    state = dd.detectors.to_mmdetection_state(lively("gfl_r18"))
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "unnamed.pth")
    assert load_detector("gfl_r18", tmp_path / "unnamed.pth").classes is None


def test_names_that_are_not_those_of_the_weights_are_left_out(tmp_path):
    """As where a COCO configuration was tuned to other data without a change of its names."""
    state = dd.detectors.to_mmdetection_state(lively("gfl_r18"))
    torch.save({"meta": {"CLASSES": ("a", "b")}, "state_dict": state}, tmp_path / "coco.pth")
    with pytest.warns(UserNotice, match=r"names 2 classes \(a, b\) but predicts 5"):
        assert load_detector("gfl_r18", tmp_path / "coco.pth").classes is None

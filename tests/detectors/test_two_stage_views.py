"""The view of torchvision's Faster R-CNN: what it computes is what the model computes."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead

from detdistill import HEAD, PKD, CrossKDRoI, Distiller, UserError, as_detector
from detdistill.detectors.stages import RoIStages
from detdistill.structures import Proposals, Pyramid
from tests.detectors.test_views import assert_same_boxes, inputs, prepared
from tests.helpers import make_batch, narrow

LABELS = 5  # with the background
CLASSES = LABELS - 1
SIZES = {"min_size": 96, "max_size": 160, "box_batch_size_per_image": 64}
TERMS = {
    "loss_objectness": "task/rpn_cls",
    "loss_rpn_box_reg": "task/rpn_box",
    "loss_classifier": "task/cls",
    "loss_box_reg": "task/box",
}


def backbone(norm=None):
    layers = {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)}
    return BackboneWithFPN(resnet18(), layers, [64, 128, 256, 512], 64, norm_layer=norm)


def v1():
    head, predictor = TwoMLPHead(64 * 49, 32), FastRCNNPredictor(32, LABELS)
    return detection.FasterRCNN(backbone(), box_head=head, box_predictor=predictor, **SIZES)


def v2():
    head = FastRCNNConvFCHead((64, 7, 7), [64, 64], [32], norm_layer=nn.BatchNorm2d)
    return detection.FasterRCNN(
        backbone(nn.BatchNorm2d),
        rpn_head=RPNHead(64, 3, conv_depth=2),
        box_head=head,
        box_predictor=FastRCNNPredictor(32, LABELS),
        rpn_score_thresh=0.3,
        **SIZES,
    )


def mobilenet():
    """With a small head; both maps of its backbone have stride 32."""
    options = {"weights": None, "weights_backbone": None, "num_classes": LABELS}
    model = detection.fasterrcnn_mobilenet_v3_large_fpn(**options, **SIZES)
    model.roi_heads.box_head = TwoMLPHead(256 * 49, 32)
    model.roi_heads.box_predictor = FastRCNNPredictor(32, LABELS)
    return model


BUILD = {"v1": v1, "v2": v2, "mobilenet": mobilenet}


def lively(model, seed=0):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("cls_logits", "bbox_pred", "cls_score")):
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def tame(model):
    """Deep random features are large: classes and boxes of full width would be extreme."""
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        for layer in (model.rpn.head.bbox_pred, predictor.bbox_pred, predictor.cls_score):
            layer.weight.mul_(1e-3)
    return model


@pytest.fixture(scope="module", params=BUILD)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return lively(BUILD[kind]())


def with_background(targets):
    """The labels that torchvision's own model wants."""
    return [{**target, "labels": target["labels"] + 1} for target in targets]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", [(3, 2), (3, 0), (0, 0)])
def test_losses_are_the_models_own(model, training, counts):
    theirs, ours = copy.deepcopy(model), model
    for module in (theirs, ours):
        module.train()
        if not training:  # torchvision gives losses in training mode only: freeze the statistics
            for part in module.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eval()
    images, targets = inputs(counts)
    torch.manual_seed(11)
    wanted = theirs(images, with_background(targets))
    view = as_detector(ours)
    torch.manual_seed(11)  # the transform draws a size of each image, too
    ready, targets = prepared(ours, counts)
    found = view.loss(view.head(view.pyramid(ready.tensors)), targets)
    assert {TERMS[name] for name in wanted} == set(found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[TERMS[name]], value, rtol=1e-5, atol=1e-6)
    sum(found.values()).backward()
    sum(wanted.values()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        own = gradients[name].grad
        if own is None:  # torchvision leaves what no box was pooled from without a gradient
            continue
        torch.testing.assert_close(parameter.grad, own, rtol=1e-4, atol=1e-6)
    model.zero_grad()


def test_detections_are_the_models_own(model):
    model.eval()
    view = as_detector(model)
    images, _ = inputs()
    with torch.no_grad():
        wanted = model(images)
        ready = model.transform(images)[0]
        found = view.detect(view.head(view.pyramid(ready.tensors)), ready.image_sizes)
    for i, (mine, own) in enumerate(zip(found, wanted, strict=True)):
        assert len(mine) == len(own["scores"]) > 10
        high, wide = ready.image_sizes[i]
        scaled = mine.scaled(images[i].shape[2] / wide, images[i].shape[1] / high)
        assert_same_boxes(scaled.boxes_xyxy, own["boxes"], images[i].shape[1:])
        torch.testing.assert_close(scaled.scores, own["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(scaled.labels, own["labels"] - 1)


def test_an_image_without_proposals_has_no_detections(model, monkeypatch):
    view = as_detector(model.eval())
    monkeypatch.setattr(model.rpn, "score_thresh", 1.0)
    found = view.predict([torch.zeros(3, 60, 80, dtype=torch.uint8)])
    assert [len(one) for one in found] == [0]


PUBLISHED = ["resnet50_fpn", "resnet50_fpn_v2"]
PUBLISHED += ["mobilenet_v3_large_fpn", "mobilenet_v3_large_320_fpn"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in PUBLISHED[:3] else n for n in PUBLISHED],
)
def test_published_builders(name):
    build = getattr(detection, f"fasterrcnn_{name}")
    untrained = {"weights": None, "weights_backbone": None, "num_classes": LABELS}
    model = tame(lively(build(**untrained, min_size=64, max_size=96)))
    view, (images, targets) = as_detector(model), inputs()
    with torch.no_grad():
        torch.manual_seed(11)
        wanted = model.train()(images, with_background(targets))
        torch.manual_seed(11)
        ready, resized = prepared(model)
        losses = view.loss(view.head(view.pyramid(ready.tensors)), resized)
        assert {TERMS[loss] for loss in wanted} == set(losses)
        for loss, value in wanted.items():
            torch.testing.assert_close(losses[TERMS[loss]], value, rtol=1e-5, atol=1e-6)
        wanted = model.eval()(images)
        ready = model.transform(images)[0]
        found = view.detect(view.head(view.pyramid(ready.tensors)), ready.image_sizes)
    for i, (mine, own) in enumerate(zip(found, wanted, strict=True)):
        assert len(mine) == len(own["scores"]) > 0
        (high, wide), size = ready.image_sizes[i], images[i].shape[1:]
        scaled = mine.scaled(size[1] / wide, size[0] / high)
        assert_same_boxes(scaled.boxes_xyxy, own["boxes"], size)
        torch.testing.assert_close(scaled.scores, own["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(scaled.labels, own["labels"] - 1)


def test_proposals_are_the_models_own_and_know_their_origin(model):
    model.eval()
    view = as_detector(model)
    assert isinstance(view, RoIStages)
    ready = model.transform(inputs()[0])[0]
    with torch.no_grad():
        pyramid = view.pyramid(ready.tensors)
        names = dict(zip(view.level_names, pyramid, strict=True))
        wanted, _ = model.rpn(ready, names)
        output = view.head(pyramid)
        found = view.propose(output, ready.image_sizes)
    for image, (mine, own) in enumerate(zip(found.boxes_xyxy, wanted, strict=True)):
        assert_same_boxes(mine, own, ready.image_sizes[image])
        level, y, x, anchor = found.origin[image].unbind(1)
        for i in range(0, len(mine), 97):
            logit = output.predictions.logits[level[i]][image, anchor[i], 0, y[i], x[i]]
            torch.testing.assert_close(logit.sigmoid(), found.scores[image][i])


def test_samples_mark_the_ground_truth(model, monkeypatch):
    sampler = model.roi_heads.fg_bg_sampler
    monkeypatch.setattr(sampler, "batch_size_per_image", 8000)  # all positives, no draw
    view = as_detector(model.eval())
    ready, targets = prepared(model)
    with torch.no_grad():
        output = view.head(view.pyramid(ready.tensors))
        sampled = view.sample(view.propose(output, ready.image_sizes), targets)
    for image, truth in enumerate(sampled.from_truth):
        slots = sampled.origin[image][truth][:, 3]
        assert torch.equal(sampled.boxes_xyxy[image][truth], targets.boxes[image][slots])
        assert torch.equal(sampled.labels[image][truth], targets.labels[image][slots])
        assert (sampled.scores[image][truth] == 1).all()
        assert sorted(slots.tolist()) == list(range(int(targets.present[image].sum())))
        rest = sampled.labels[image] == CLASSES
        assert (sampled.matched_boxes[image][rest] == 0).all() and rest.any()
        assert (sampled.matched_boxes[image][~rest] > 0).any()


def test_features_are_the_shared_layers(model):
    view = as_detector(model.eval())
    ready, _ = prepared(model)
    with torch.no_grad():
        output = view.head(view.pyramid(ready.tensors))
        rois = view.propose(output, ready.image_sizes, max_per_image=5)
        found = view.roi(output.pyramid, rois)
    widths = [layer.out_features for layer in view.roi_heads[0].shared]
    assert [f.shape[1] for f in found.features] == widths
    assert all((f >= 0).all() for f in found.features)
    assert found.logits.shape == (10, LABELS)


def test_views_add_nothing_to_the_model(model):
    view = as_detector(model)
    assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
    assert set(view.state_dict()) == {f"model.{k}" for k in model.state_dict()}
    twin = copy.deepcopy(view)
    assert twin.rpn.logits is twin.model.rpn.head.cls_logits
    assert twin.rpn.logits is not model.rpn.head.cls_logits


def test_labels_choose_classes(model):
    view = as_detector(model.eval(), labels=[4, 2])
    ready, _ = prepared(model)
    with torch.no_grad():
        output = view.head(view.pyramid(ready.tensors))
        rois = view.propose(output, ready.image_sizes, max_per_image=5)
        found, whole = (v.roi(output.pyramid, rois) for v in (view, as_detector(model)))
    assert torch.equal(found.logits[:, :2], whole.logits[:, [3, 1]])
    scores, of_all = found.logits.softmax(1), whole.logits.softmax(1)
    torch.testing.assert_close(scores[:, :2], of_all[:, [3, 1]])
    torch.testing.assert_close(scores[:, 2], of_all[:, [0, 2, 4]].sum(1))
    assert torch.equal(found.boxes, whole.boxes.reshape(10, 4, 4)[:, [3, 1]].flatten(1))
    assert all(d.labels.max() < 2 for d in view.detect(output, ready.image_sizes))
    with pytest.raises(UserError, match=r"labels holds \[0\]; the model has labels 1\.\.4"):
        as_detector(model, labels=[0, 1])


@pytest.mark.parametrize("build", [v1, v2])
def test_distilled_by_one_and_teaching_one(build):
    batch = make_batch(num_classes=CLASSES)
    ours, student = narrow("faster_rcnn_r18", CLASSES), lively(build(), seed=1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    methods = {"crosskd_roi": CrossKDRoI(), "pkd": PKD()}
    distiller = Distiller(as_detector(student), ours, methods).train()
    terms = distiller(batch)
    sum(terms.values()).backward()
    torch.optim.SGD(student.parameters(), 1e-2).step()
    moved = [k for k, v in student.named_parameters() if not torch.equal(v, before[k])]
    assert {k.split(".")[0] for k in moved} == {"backbone", "rpn", "roi_heads"}
    assert all(value.isfinite() for value in terms.values())
    assert terms["crosskd_roi/cls"] > 0 and terms["pkd/feature"] > 0


@pytest.mark.parametrize("student", ["retinanet_r18", "fcos_r18", "cascade_rcnn_r18"])
def test_teaches_others_by_head(model, student):
    teacher, batch = copy.deepcopy(model), make_batch(num_classes=CLASSES)
    distiller = Distiller(narrow(student, CLASSES), as_detector(teacher), {"head": HEAD()}).train()
    distiller.iteration = 2000
    terms = distiller(batch)
    own = {name: value for name, value in terms.items() if name.startswith("head/")}
    assert {"head/assistant_cls", "head/assistant_box", "head/akd_1"} <= set(own)
    assert all(value > 0 and value.isfinite() for value in own.values())
    sum(own.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assistant = distiller.methods["head"].link.assistant.head(0).own
    assert all(p.grad is not None for p in assistant.parameters())
    shared = {id(p) for p in assistant.parameters()} & {id(p) for p in teacher.parameters()}
    assert not shared
    before = dict(model.roi_heads.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in assistant.named_parameters())


def test_its_copy_pools_from_the_strides_of_the_student(model):
    """Also where the model has pooled from its own pyramid before."""
    view = as_detector(copy.deepcopy(model).eval())
    view.predict([torch.zeros(3, 96, 96)])
    student = narrow("retinanet_r18", CLASSES)
    link = Distiller(student, view, {"head": HEAD()}).methods["head"].link
    # Each map holds its stride, so that what is pooled tells which one a box came from.
    levels = [torch.full((1, 64, 256 // s, 256 // s), float(s)) for s in student.strides]
    boxes = torch.tensor([[8.0, 8, 38, 38], [0.0, 0, 250, 250]])
    rois = Proposals([boxes], [torch.ones(2)], [torch.zeros(2, 4).long()])
    found = link.assistant.head(0).pool(Pyramid(levels, student.strides), rois).mean((1, 2, 3))
    assert found.tolist() == [8, 16]  # 224 pixels at stride 16, the model's own rule


def test_other_models_are_refused():
    model = v1()
    model.roi_heads.box_predictor = nn.Linear(32, 4)
    with pytest.raises(UserError, match="FastRCNNPredictor, not Linear"):
        as_detector(model)
    model = v1()
    model.roi_heads.box_head = nn.Flatten()
    with pytest.raises(UserError, match="box heads, not Flatten"):
        as_detector(model)
    generator = AnchorGenerator(((32,), (64,), (128,), (256,), (512, 600)), ((1.0,),) * 5)
    model = v1()
    model.rpn.anchor_generator = generator
    with pytest.raises(UserError, match=r"\[1, 2\] anchors per level"):
        as_detector(model)
    masks = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    with pytest.raises(UserError, match="without masks and keypoints"):
        as_detector(masks)

"""Views of torchvision's detectors: what they compute is what the models compute."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detdistill import PKD, Batch, CrossKD, Detections, Distiller, UserError, as_detector
from detdistill.detectors.stages import DenseHead
from tests.helpers import make_batch, narrow

CLASSES = 4
SIZES = {"min_size": 96, "max_size": 160}
TERMS = {
    "classification": "task/cls",
    "bbox_regression": "task/box",
    "bbox_ctrness": "task/quality",
}


def backbone(from_c5=False):
    """ResNet-18 with a pyramid of 64 channels."""
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    extra = LastLevelP6P7(512 if from_c5 else 64, 64)
    return BackboneWithFPN(resnet18(), layers, [128, 256, 512], 64, extra)


def retinanet_v1():
    return detection.RetinaNet(backbone(), CLASSES, **SIZES)


def retinanet_v2():
    head = RetinaNetHead(64, 9, CLASSES, norm_layer=partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    return detection.RetinaNet(backbone(from_c5=True), CLASSES, head=head, **SIZES)


def fcos():
    return detection.FCOS(backbone(), CLASSES, **SIZES)


BUILD = {"retinanet_v1": retinanet_v1, "retinanet_v2": retinanet_v2, "fcos": fcos}
PUBLISHED = {
    "retinanet_v1": detection.retinanet_resnet50_fpn,
    "retinanet_v2": detection.retinanet_resnet50_fpn_v2,
    "fcos": detection.fcos_resnet50_fpn,
}


def lively(model, seed=0):
    """Predictions that pass the thresholds, statistics that are not those of a fresh model."""
    torch.manual_seed(seed)
    for name, parameter in model.head.named_parameters():
        if any(part in name for part in ("cls_logits", "bbox_reg", "bbox_ctrness")):
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


@pytest.fixture(scope="module", params=BUILD)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return lively(BUILD[kind]())


def inputs(counts=(3, 2)):
    """Images 0..1 of different sizes, with boxes larger than the smallest anchor."""
    generator = torch.Generator().manual_seed(3)
    images = [torch.rand(3, *size, generator=generator) for size in ((96, 128), (120, 97))]
    boxes = [
        [[10.0, 12, 60, 70], [30, 20, 120, 90], [55.5, 5.5, 90, 60]],
        [[5.0, 50, 80, 115], [40, 4, 92, 71]],
    ]
    labels = [[0, 2, 3], [1, 1]]
    return images, [
        {"boxes": torch.tensor(b[:n]).reshape(-1, 4), "labels": torch.tensor(k[:n]).long()}
        for b, k, n in zip(boxes, labels, counts, strict=True)
    ]


def assert_same_boxes(found, wanted, size):
    """Of an image of (h, w) pixels, to a hundred thousandth of its longer side."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(size))


def prepared(model, counts=(3, 2)):
    """What torchvision's own transform makes of the inputs: (normalised images, our targets)."""
    images, targets = model.transform(*inputs(counts))
    batch = Batch(images.tensors, images.image_sizes, targets)
    return images, batch.padded_targets()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("counts", [(3, 2), (3, 0), (0, 0)])
def test_losses_are_the_models_own(model, training, counts):
    theirs, ours = copy.deepcopy(model), model
    view = as_detector(ours)
    for module in (theirs, ours):
        module.train()
        if not training:  # torchvision gives losses in training mode only: freeze the statistics
            for norm in module.modules():
                norm.training = norm is module
    wanted = theirs(*inputs(counts))
    images, targets = prepared(ours, counts)
    found = view.loss(view.head(view.pyramid(images.tensors)), targets)
    assert {TERMS[name] for name in wanted} == set(found)
    for name, value in wanted.items():
        torch.testing.assert_close(found[TERMS[name]], value, rtol=1e-5, atol=1e-6)
    sum(found.values()).backward()
    sum(wanted.values()).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)
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
        assert torch.equal(scaled.labels, own["labels"])


def test_limits_of_detect_are_lent_only(model):
    view = as_detector(model.eval())
    ready = model.transform(inputs()[0])[0]
    output = view.head(view.pyramid(ready.tensors))
    before = model.score_thresh, model.detections_per_img
    [few, _] = view.detect(output, ready.image_sizes, score_threshold=0.6, max_detections=3)
    assert len(few) <= 3 and (few.scores > 0.6).all()
    assert (model.score_thresh, model.detections_per_img) == before


def test_a_batch_of_ours_is_normalised_as_by_the_model(model):
    images, targets = inputs()
    pixels = [(image * 255).round() for image in images]
    ready = model.transform.batch_images([model.transform.normalize(p / 255) for p in pixels])
    padded = torch.zeros(2, 3, *ready.shape[-2:])
    for i, image in enumerate(pixels):
        padded[i, :, : image.shape[1], : image.shape[2]] = image
    sizes = [tuple(image.shape[1:]) for image in images]
    view = as_detector(model)
    torch.testing.assert_close(view.normalize(Batch(padded, sizes, targets)), ready)
    assert view.input_size == (96, 160)


@pytest.mark.parametrize("depth", range(5))
def test_head_from_reproduces_the_own_predictions(model, depth):
    view = as_detector(model.eval())
    assert isinstance(view, DenseHead)
    with torch.no_grad():
        pyramid = view.pyramid(view.normalize(make_batch()))
        output = view.head(pyramid, keep_pre_activation=True)
        entered = {
            branch: [maps[depth].relu() if depth else maps[0] for maps in levels]
            for branch, levels in output.towers.items()
        }
        resumed = view.head_from(entered, depth)
    torch.testing.assert_close(resumed.logits, output.predictions.logits)
    torch.testing.assert_close(resumed.boxes, output.predictions.boxes)
    torch.testing.assert_close(resumed.quality, output.predictions.quality)
    if depth:
        assert any((maps[depth] < 0).any() for maps in output.towers["cls"])


def test_views_add_nothing_to_the_model(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    view = as_detector(model)
    assert modes == [module.training for module in model.modules()]
    assert [id(p) for p in view.parameters()] == [id(p) for p in model.parameters()]
    assert set(view.state_dict()) == {f"model.{k}" for k in before}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert view.strides == (8, 16, 32, 64, 128)


def test_labels_choose_and_reorder_the_models_classes(model):
    whole, part = as_detector(model.eval()), as_detector(model, labels=[3, 1])
    assert part.num_classes == 2
    images, _ = prepared(model)
    with torch.no_grad():
        outputs = [view.head(view.pyramid(images.tensors)) for view in (whole, part)]
    for all_of_them, chosen in zip(*(o.predictions.logits for o in outputs), strict=True):
        assert torch.equal(all_of_them[:, :, [3, 1]], chosen)
    targets = Batch(
        images.tensors,
        images.image_sizes,
        [{"boxes": t["boxes"], "labels": t["labels"] % 2} for t in inputs()[1]],
    ).padded_targets()
    losses = part.loss(part.head(part.pyramid(images.tensors)), targets)
    sum(losses.values()).backward()
    gradient = model.head.classification_head.cls_logits.bias.grad.reshape(-1, CLASSES)
    assert (gradient[:, [0, 2]] == 0).all() and (gradient[:, [1, 3]] != 0).any()
    assert all(d.labels.max() < 2 for d in part.detect(outputs[1], images.image_sizes))
    model.zero_grad()


def test_the_model_itself_is_distilled_and_taught_from(kind, model):
    """As the student of one of our detectors, and as a teacher of one."""
    ours, batch = narrow("gfl_r18", CLASSES), make_batch(num_classes=CLASSES)
    student = lively(BUILD[kind](), seed=1)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    distiller = Distiller(as_detector(student), ours, {"crosskd": CrossKD(), "pkd": PKD()}).train()
    terms = distiller(batch)
    sum(terms.values()).backward()
    torch.optim.SGD(student.parameters(), 1e-2).step()
    moved = [k for k, v in student.named_parameters() if not torch.equal(v, before[k])]
    assert {k.split(".")[0] for k in moved} == {"backbone", "head"}
    assert {"crosskd/cls", "crosskd/box", "pkd/feature", "task/cls"} <= set(terms)
    assert all(value.isfinite() and value > 0 for value in terms.values())

    teacher = copy.deepcopy(model)
    ours = narrow("fcos_r18", CLASSES)
    distiller = Distiller(ours, as_detector(teacher), {"crosskd": CrossKD(), "pkd": PKD()}).train()
    terms = distiller(batch)
    (terms["crosskd/cls"] + terms["crosskd/box"] + terms["pkd/feature"]).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in ours.towers["cls"].blocks[0].parameters())
    assert all(value.isfinite() and value > 0 for value in terms.values())


def test_views_of_equal_models_share_an_assignment(model):
    view, other = as_detector(model), as_detector(copy.deepcopy(model))
    assert view.assignment_key == other.assignment_key
    assert view.assignment_key != narrow("retinanet_r18", CLASSES).assignment_key
    if view.family == "fcos":
        other.model.center_sampling_radius = 2.0
    else:
        other.model.proposal_matcher.high_threshold = 0.7
    assert view.assignment_key != other.assignment_key


def test_predict_and_bfloat16(model):
    view = as_detector(model.eval())
    [found] = view.predict([torch.randint(0, 256, (3, 50, 130), dtype=torch.uint8)])
    assert found.boxes_xyxy[:, 2].max() <= 130 + 1e-3
    batch = make_batch(num_classes=CLASSES)
    targets = batch.padded_targets()
    full = view.loss(view(batch), targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = view.loss(view(batch), targets)
    for term, value in full.items():
        assert half[term].item() == pytest.approx(value.item(), rel=0.05, abs=1e-3), term


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_builders(kind):
    model = PUBLISHED[kind](weights=None, weights_backbone=None, num_classes=3, min_size=64)
    lively(model).eval()
    view = as_detector(model)
    images = [torch.rand(3, 64, 96)]
    with torch.no_grad():
        [wanted] = model(images)
        ready = model.transform(images)[0]
        [found] = view.detect(view.head(view.pyramid(ready.tensors)), ready.image_sizes)
    assert_same_boxes(found.boxes_xyxy, wanted["boxes"], images[0].shape[1:])
    assert torch.equal(found.labels, wanted["labels"])


def test_other_models_are_refused(model):
    with pytest.raises(UserError, match=r"as_detector takes torchvision's RetinaNet, FCOS.*Linear"):
        as_detector(nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"labels holds \[4\]; the model has labels 0\.\.3"):
        as_detector(model, labels=[1, 4])
    with pytest.raises(UserError, match="labels holds nothing"):
        as_detector(model, labels=[])
    other = copy.deepcopy(model)
    for branch in (other.head.classification_head, other.head.regression_head):
        branch.conv = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())
    with pytest.raises(UserError, match="no convolutions with ReLU"):
        as_detector(other)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_a_view_stands_where_its_model_stands(build):
    view = as_detector(build().to("meta"))
    assert {tensor.device.type for tensor in view.buffers()} == {"meta"}
    assert {tensor.device.type for tensor in view.parameters()} == {"meta"}


def test_predict_follows_a_model_that_was_moved_beside_its_view(monkeypatch):
    model = fcos()
    view = as_detector(model)
    model.to("meta")  # the buffers of the view stay behind
    seen = []
    monkeypatch.setattr(view, "forward", lambda batch: seen.append(batch.images.device.type))
    monkeypatch.setattr(
        view, "detect", lambda output, sizes, **_: [Detections(*[torch.zeros(0, 4)] * 3)]
    )
    view.predict([torch.zeros(3, 64, 64)])
    assert seen == ["meta"]

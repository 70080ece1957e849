"""What every registered detector must do; a new family is found by itself."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detdistill import UserError, create_detector, list_detectors, load_detector, save_detector
from detdistill.boxes import clip_xyxy, elementwise_iou
from detdistill.detectors.fcos import FCOS
from detdistill.detectors.registry import BACKBONES
from detdistill.detectors.stages import DenseHead, RoIStages
from tests.helpers import DENSE_R18, make_batch, narrow, narrow_options
from tests.helpers import FAMILIES_R18 as R18


@pytest.mark.parametrize("name", DENSE_R18)
@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("pre_activation", [False, True])
def test_head_from_reproduces_the_own_predictions(name, depth, pre_activation):
    detector = narrow(name, tower_depth=4).eval()
    pyramid = detector.pyramid(detector.normalize(make_batch()))
    output = detector.head(pyramid, keep_pre_activation=pre_activation)
    tower = {branch: [maps[depth] for maps in levels] for branch, levels in output.towers.items()}
    if pre_activation and depth:
        tower = {branch: [level.relu() for level in levels] for branch, levels in tower.items()}
    resumed = detector.head_from(tower, depth)
    torch.testing.assert_close(resumed.logits, output.predictions.logits)
    torch.testing.assert_close(resumed.boxes, output.predictions.boxes)
    torch.testing.assert_close(resumed.quality, output.predictions.quality)


@pytest.mark.parametrize("name", R18)
def test_shows_its_stages(name):
    detector = narrow(name)
    assert isinstance(detector, DenseHead) == (name in DENSE_R18)
    assert isinstance(detector, RoIStages) == (name not in DENSE_R18)


@pytest.mark.parametrize("name", DENSE_R18)
def test_towers_hold_activated_maps_unless_asked(name):
    detector = narrow(name)
    pyramid = detector.pyramid(detector.normalize(make_batch()))
    for keep in (False, True):
        maps = detector.head(pyramid, keep_pre_activation=keep).towers["cls"][0]
        assert maps[0] is pyramid[0]
        assert all((m < 0).any().item() == keep for m in maps[1:])


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0)])
def test_trains_a_step_on_any_batch(name, counts):
    detector = narrow(name)
    batch = make_batch(counts)
    losses = detector.loss(detector(batch), batch.padded_targets())
    sum(losses.values()).backward()
    assert set(losses) == {f"task/{term}" for term in detector.loss_weights}
    assert all(loss.isfinite() for loss in losses.values())
    for parameter_name, parameter in detector.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", DENSE_R18)
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_class_targets_are_what_the_loss_asks_for(name, counts):
    detector = narrow(name)
    batch = make_batch(counts)
    targets, output = batch.padded_targets(), detector(batch)
    asked = detector.assign(output, targets)
    scores = detector.class_targets(output, asked)
    assert scores.shape == asked.labels.shape and not scores.requires_grad
    assert torch.equal(scores > 0, asked.positive)
    if name == "gfl_r18":  # the IoU of its own box
        anchors = detector.flat_anchors(output.anchors)
        boxes = detector.decode(output.predictions.flatten().boxes, anchors)
        expected = elementwise_iou(boxes, asked.boxes) * asked.positive
        torch.testing.assert_close(scores, expected.detach())
    else:
        assert torch.equal(scores, asked.positive.float())


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("num_classes", [1, 1203])
def test_any_number_of_classes(name, num_classes):
    detector = narrow(name, num_classes)
    batch = make_batch(num_classes=num_classes)
    losses = detector.loss(detector(batch), batch.padded_targets())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", R18)
def test_bfloat16_gives_about_the_same_losses(name):
    detector = narrow(name).eval()
    batch = make_batch()
    targets = batch.padded_targets()
    output = detector(batch)
    assignment = detector.assign(output, targets)  # once: rounding may change who is sampled
    full = detector.loss(output, targets, assignment)
    with torch.autocast("cpu", torch.bfloat16):
        half = detector.loss(detector(batch), targets, assignment)
    for term, value in full.items():
        assert half[term].item() == pytest.approx(value.item(), rel=0.05, abs=1e-3), term


@pytest.mark.parametrize("name", R18)
def test_predicts_in_bfloat16(name):
    detector = narrow(name).eval()
    images = [torch.randint(0, 256, (3, 50, 99), dtype=torch.uint8)]
    [full] = detector.predict(images, score_threshold=0)
    with torch.autocast("cpu", torch.bfloat16):
        [half] = detector.predict(images, score_threshold=0)
    assert half.boxes_xyxy.dtype == half.scores.dtype == torch.float32
    assert half.boxes_xyxy.isfinite().all()
    assert ((half.boxes_xyxy >= 0) & (half.boxes_xyxy <= torch.tensor([99, 50, 99, 50]))).all()
    # Rounding may change what NMS keeps further down.
    assert len(half) >= 5
    torch.testing.assert_close(half.scores[:5], full.scores[:5], rtol=0.05, atol=1e-3)


class CountOps(TorchDispatchMode):
    """How many operations torch runs."""

    ran = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.ran += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", DENSE_R18)
def test_nothing_runs_image_by_image(name):
    """As many operations for six images as for two."""
    detector, counts = narrow(name), []
    for images in (2, 6):
        batch = make_batch((2,) * images)
        output, targets = detector(batch), batch.padded_targets()
        with CountOps() as ops:
            detector.loss(output, targets, detector.assign(output, targets))
        counts.append(ops.ran)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", DENSE_R18)
def test_a_branch_left_out_leaves_its_predictions_out(name):
    detector = narrow(name).eval()
    pyramid = detector.pyramid(detector.normalize(make_batch()))
    for branch in ("cls", "box"):
        resumed = detector.head_from({branch: list(pyramid)}, 0)
        assert bool(resumed.logits) == (detector.towers_for("cls") == (branch,))
        assert bool(resumed.boxes) == (detector.towers_for("box") == (branch,))
        assert bool(resumed.quality) == (branch == detector.quality_tower)


@pytest.mark.parametrize("name", DENSE_R18)
def test_quality_targets_fit_the_quality_branch(name):
    detector = narrow(name)
    batch = make_batch()
    output = detector(batch)
    assignment = detector.assign(output, batch.padded_targets())
    assert (assignment.quality is None) == (output.predictions.quality is None)
    if assignment.quality is not None:
        assert output.predictions.flatten().quality.shape == assignment.quality.shape
        assert (assignment.quality[~assignment.positive] == 0).all()
        central = assignment.quality[assignment.positive]
        assert ((central > 0) & (central <= 1)).all()


@pytest.mark.parametrize("name", R18)
def test_cells_beyond_an_image_learn_nothing(name):
    detector = narrow(name)
    batch = make_batch(size=(64, 160))
    output, targets = detector(batch), batch.padded_targets()
    assignment = detector.assign(output, targets)
    weights = getattr(assignment, "dense", assignment).weights[1].reshape(-1)
    if not getattr(detector, "masks_padding", True):  # published so: everything is background
        assert (weights == 1).all()
        return
    anchors = torch.cat(output.anchors)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    # The second image is 40 x 127 pixels and counts as 64 x 128.
    assert (weights[centers[:, 0] >= 128] == 0).all()
    assert (weights[centers[:, 0] < 128] == 1).any()


@pytest.mark.parametrize("name", R18)
def test_proposals_say_where_they_come_from(name):
    detector, batch = narrow(name).eval(), make_batch()
    output = detector(batch)
    proposals = detector.propose(output, batch.sizes, per_level=50, max_per_image=60)
    decoder = getattr(detector, "rpn", detector)
    for i, size in enumerate(batch.sizes):
        assert 0 < len(proposals.boxes_xyxy[i]) <= 60
        assert (proposals.scores[i].diff() <= 0).all()
        for box, score, origin in zip(
            proposals.boxes_xyxy[i], proposals.scores[i], proposals.origin[i].tolist(), strict=True
        ):
            level, y, x, anchor = origin
            predictions = output.predictions
            logits = predictions.logits[level][i, anchor, :, y, x]
            torch.testing.assert_close(score, logits.max().sigmoid())
            _, per_cell, _, _, width = predictions.logits[level].shape
            anchors = output.anchors[level][(y * width + x) * per_cell + anchor, None]
            decoded = decoder.decode(predictions.boxes[level][i, None, anchor, :, y, x], anchors)
            torch.testing.assert_close(box, clip_xyxy(decoded, size)[0])
        assert not proposals.boxes_xyxy[i].requires_grad


@pytest.mark.parametrize("name", R18)
def test_predict_returns_pixels_of_the_given_image(name):
    detector = narrow(name).eval()
    images = [torch.randint(0, 256, (3, 50, 130), dtype=torch.uint8)]
    detector.input_size = (96, 200)
    [found] = detector.predict(images, score_threshold=0.0)
    assert len(found) > 0
    assert found.boxes_xyxy[:, 2].max() <= 130 + 1e-3
    assert found.boxes_xyxy[:, 3].max() <= 50 + 1e-3
    assert found.boxes_xyxy[:, 2].max() > 100, "boxes should reach over the whole width"
    assert (found.scores.diff() <= 0).all()


def test_predict_leaves_the_mode_as_it_was_whatever_happens():
    detector = narrow().train()
    with pytest.raises(UserError):
        detector.predict([torch.zeros(1, 64, 64, dtype=torch.uint8)])
    assert detector.training
    detector.backbone.eval()  # as where BatchNorm is frozen by hand
    modes = [module.training for module in detector.modules()]
    detector.predict([torch.zeros(3, 64, 64)])
    assert modes == [module.training for module in detector.modules()]


def test_a_detector_that_does_not_know_its_options_is_not_saved(tmp_path):
    options = {"fpn_channels": 8, "tower_channels": 8, "norm_on_bbox": True}
    with pytest.raises(UserError, match=r"built from its class.*create_detector"):
        save_detector(FCOS(3, backbone="resnet18", **options), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["student.pt", "student", "student.json"])
def test_a_name_that_would_not_load_again_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"saved as \.safetensors.*such as student\.safetensors"):
        save_detector(narrow(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", R18)
def test_saves_and_loads_with_nothing_beside(name, tmp_path):
    detector = narrow(name)
    detector.classes, detector.input_size = ["a", "b", "c"], (64, 96)
    save_detector(detector, tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path)
    assert (loaded.name, loaded.classes, loaded.input_size) == (name, ["a", "b", "c"], (64, 96))
    assert loaded.options == detector.options
    for key, value in detector.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_any_timm_backbone_by_stride():
    batch = make_batch()
    for backbone in ("mobilenetv3_small_050", "regnetx_002"):
        detector = create_detector("gfl", 3, backbone=backbone, fpn_channels=16, tower_channels=16)
        assert [level.shape[-1] for level in detector(batch).pyramid] == [12, 6, 3, 2, 1]
        detector = create_detector("faster_rcnn", 3, backbone=backbone, fpn_channels=16)
        assert [level.shape[-1] for level in detector(batch).pyramid] == [24, 12, 6, 3, 2]


@pytest.mark.parametrize(
    "backbone",
    [
        "convnext_atto",
        "efficientnet_b0",
        "hgnetv2_b0",
        "mobilenetv3_small_050",
        "mobilenetv4_conv_small_035",
        "repvit_m0_9",
    ],
)
def test_a_small_backbone_of_each_family_of_timms(backbone):
    detector = create_detector("gfl", 3, backbone=backbone, fpn_channels=16, tower_channels=16)
    trains_a_step(detector, make_batch(size=(64, 64)))
    [found] = detector.predict([torch.randint(0, 256, (3, 50, 64))], score_threshold=0)
    assert len(found) > 0 and found.boxes_xyxy.isfinite().all() and found.scores.isfinite().all()


# The larger ResNeXt is the same in wide; `test_every_listed_detector` has it.
@pytest.mark.parametrize("short", [name for name in BACKBONES if name != "x101_64x4d"])
def test_every_backbone_under_one_detector(short, tmp_path):
    holds_the_contract(f"retinanet_{short}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_detectors())
def test_every_listed_detector(name, tmp_path):
    holds_the_contract(name, tmp_path)


def holds_the_contract(name, folder):
    """One pair of family and backbone does all that a single test above asks of a family."""
    options = narrow_options(name)
    detector = create_detector(name, 1, **options)
    trains_a_step(detector, make_batch(size=(64, 64), num_classes=1))
    trains_a_step(detector, make_batch((0, 0), size=(64, 160)))
    detector = create_detector(name, 1203, **options)
    with torch.autocast("cpu", torch.bfloat16):
        trains_a_step(detector, make_batch(num_classes=1203))
    detector.eval()
    resumes_at_every_depth(detector)
    save_detector(detector, folder / "model.safetensors")
    loaded = load_detector(folder).eval()
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((64, 64), (50, 99))]
    pairs = zip(*(d.predict(images, score_threshold=0) for d in (detector, loaded)), strict=True)
    for (found, again), image in zip(pairs, images, strict=True):
        assert len(found) == 100
        assert torch.equal(found.boxes_xyxy, again.boxes_xyxy)
        assert torch.equal(found.labels, again.labels)
        assert (found.boxes_xyxy.amax(0) <= torch.tensor(image.shape)[[2, 1, 2, 1]]).all()


def trains_a_step(detector, batch):
    losses = detector.loss(detector(batch), batch.padded_targets())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    detector.zero_grad()


def resumes_at_every_depth(detector):
    if not isinstance(detector, DenseHead):
        return  # the one convolution of an RPN is no tower that is entered
    output = detector(make_batch())
    for depth in range(detector.tower_depth + 1):
        tower = {b: [maps[depth] for maps in levels] for b, levels in output.towers.items()}
        resumed = detector.head_from(tower, depth)
        torch.testing.assert_close(resumed.logits, output.predictions.logits)
        torch.testing.assert_close(resumed.boxes, output.predictions.boxes)
        torch.testing.assert_close(resumed.quality, output.predictions.quality)


def test_frozen_stages_and_stored_statistics():
    detector = narrow(frozen_stages=1, norm_eval=True).train()
    body = detector.backbone.body
    assert not any(p.requires_grad for p in [*body.conv1.parameters(), *body.layer1.parameters()])
    assert all(p.requires_grad for p in body.layer2.parameters())
    before = body.layer3[0].bn1.running_mean.clone()
    detector(make_batch())
    assert torch.equal(body.layer3[0].bn1.running_mean, before)
    trained = narrow().train()
    before = trained.backbone.body.layer3[0].bn1.running_mean.clone()
    trained(make_batch())
    assert not torch.equal(trained.backbone.body.layer3[0].bn1.running_mean, before)


def test_narrow_body_has_a_narrow_stem():
    detector = create_detector("gfl_r18", 6, base_channels=16, fpn_channels=64, tower_channels=64)
    parameters = sum(p.numel() for p in detector.parameters())
    assert detector.backbone.body.conv1.out_channels == 16
    assert round(parameters / 1e6, 2) == 1.24

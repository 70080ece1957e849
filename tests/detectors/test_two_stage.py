"""Faster and Cascade R-CNN: what their stages do together, and their weights' names."""

import re

import pytest
import torch

from detdistill import Distiller, UserError, list_detectors, load_detector, save_detector
from detdistill.structures import GROUND_TRUTH
from tests.helpers import TWO_STAGE_R18, make_batch, narrow


@pytest.mark.parametrize("name", TWO_STAGE_R18)
@pytest.mark.parametrize("counts", [(2, 1), (3, 0), (0, 0)])
def test_trains_a_step_through_the_distiller(name, counts):
    student = narrow(name)
    distiller = Distiller(student).train()
    losses = distiller(make_batch(counts))
    assert set(losses) == {f"task/{term}" for term in student.loss_weights}
    for term, weight in student.loss_weights.items():
        raw = distiller.raw[f"task/{term}"].item()
        assert losses[f"task/{term}"].item() == pytest.approx(raw * weight)
        if counts == (0, 0) and "box" in term:
            assert raw == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_terms_and_published_weights():
    assert narrow("faster_rcnn_r18").loss_weights == dict.fromkeys(
        ("rpn_cls", "rpn_box", "cls", "box"), 1.0
    )
    weights = narrow("cascade_rcnn_r18").loss_weights
    assert [weights[f"cls_{i}"] for i in (1, 2, 3)] == [1.0, 0.5, 0.25]
    assert [weights[f"box_{i}"] for i in (1, 2, 3)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("name", TWO_STAGE_R18)
@pytest.mark.parametrize("size", [(64, 64), (32, 160), (160, 32)])
def test_bfloat16_on_images_of_any_shape(name, size):
    detector, batch = narrow(name), make_batch(size=(size[0] + 24, size[1] + 33))
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(batch)
        losses = detector.loss(output, batch.padded_targets())
        found = detector.detect(output, batch.sizes, score_threshold=0.0)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())
    assert all(len(one) > 0 and one.boxes_xyxy.dtype == torch.float32 for one in found)


@pytest.mark.parametrize("name", TWO_STAGE_R18)
def test_an_assignment_is_reused_and_a_seed_repeats_it(name):
    detector, batch = narrow(name).eval(), make_batch()
    output, targets = detector(batch), batch.padded_targets()
    assignments = []
    for _ in range(2):
        torch.manual_seed(3)
        assignments.append(detector.assign(output, targets))
    for one, other in zip(*(a.rois.boxes_xyxy for a in assignments), strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(4)
    given = detector.loss(output, targets, assignments[0])
    torch.manual_seed(3)
    made = detector.loss(output, targets)
    for term in ("task/rpn_cls", "task/rpn_box"):
        assert torch.equal(given[term], made[term])


@pytest.mark.parametrize("name", TWO_STAGE_R18)
def test_the_number_of_sampled_proposals_is_an_option_that_travels(name, tmp_path):
    save_detector(narrow(name, roi_samples=8), tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path)
    assert [head.samples for head in loaded.roi_heads] == [8] * len(loaded.roi_heads)
    batch = make_batch()
    sampled = loaded.assign(loaded(batch), batch.padded_targets()).rois
    assert [len(labels) for labels in sampled.labels] == [8, 8]
    with pytest.raises(UserError, match=r"roi_samples: .* greater than or equal to 4 \(found 3\)"):
        narrow(name, roi_samples=3)


def test_only_a_cascade_leaves_out_anchors_across_the_border():
    batch = make_batch(size=(160, 192))
    crossing = []
    for name in ("faster_rcnn_r18", "cascade_rcnn_r18"):
        detector = narrow(name)
        output = detector(batch)
        learns = detector.assign(output, batch.padded_targets()).dense.weights[1] > 0
        anchors = torch.cat(output.anchors)[learns]
        assert 0 < len(anchors) <= 256
        height, width = batch.sizes[1]
        beyond = (anchors < 0).any(1) | (anchors[:, 2] >= width) | (anchors[:, 3] >= height)
        crossing.append(bool(beyond.any()))
    assert crossing == [True, False]


def test_each_stage_of_a_cascade_learns_from_what_the_one_before_moved(monkeypatch):
    detector, batch = narrow("cascade_rcnn_r18"), make_batch((3, 0))
    for stage, shift in enumerate((0.5, 0.25)):
        head = detector.roi_heads[stage]
        with torch.no_grad():
            head.deltas.weight.zero_()
            head.deltas.bias.copy_(torch.tensor([shift / head.delta_scales[0], 0.0, 0.0, 0.0]))
    seen = []
    for head in detector.roi_heads:

        def spy(proposals, targets, sample=head.sample):
            seen.append((proposals, sample(proposals, targets)))
            return seen[-1][1]

        monkeypatch.setattr(head, "sample", spy)
    detector.loss(detector(batch), batch.padded_targets())
    assert len(seen) == 3
    for before, after, shift in zip(seen[:2], seen[1:], (0.5, 0.25), strict=True):
        for image, size in enumerate(batch.sizes):
            sampled, moved = before[1], after[0]
            own = sampled.origin[image][:, 0] != GROUND_TRUTH
            assert (~own).sum() == (3, 0)[image]
            boxes = sampled.boxes_xyxy[image][own].clone()
            boxes[:, ::2] += shift * (boxes[:, 2] - boxes[:, 0])[:, None]
            boxes[:, ::2] = boxes[:, ::2].clamp(0, size[1])
            torch.testing.assert_close(moved.boxes_xyxy[image], boxes)
            assert torch.equal(moved.origin[image], sampled.origin[image][own])


def test_a_cascade_detects_with_the_mean_of_its_logits_and_the_last_boxes():
    detector, batch = narrow("cascade_rcnn_r18").eval(), make_batch()
    with torch.no_grad():
        for stage, head in enumerate(detector.roi_heads):
            head.logits.weight.zero_()
            head.logits.bias.copy_(torch.tensor([3.0 * stage, 0.0, 0.0, 0.0]))
            head.deltas.weight.zero_()
        found = detector.detect(detector(batch), batch.sizes)
    best = torch.tensor([3.0, 0.0, 0.0, 0.0]).softmax(0)[0]
    for one in found:
        torch.testing.assert_close(
            one.scores[one.labels == 0], best.expand((one.labels == 0).sum())
        )
        assert len(one) > 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_any_pyramid_of_its_width_can_be_looked_at(stage):
    """As HEAD does: the proposals of a dense student, on its own P3 to P6."""
    teacher, student, batch = narrow("cascade_rcnn_r18"), narrow("retinanet_r18"), make_batch()
    output = student(batch)
    sampled = teacher.sample(student.propose(output, batch.sizes), batch.padded_targets(), stage)
    found = teacher.roi(output.pyramid, sampled, stage)
    assert len(found.logits) == len(sampled.image_index) == sum(map(len, sampled.boxes_xyxy))
    found.logits.sum().backward()
    assert student.backbone.body.conv1.weight.grad.any()
    assert student.logits.weight.grad is None


def to_mmdetection(state, stages):
    """Our names of a two-stage detector to MMDetection's."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("backbone.body.", "backbone.")
        name = re.sub(r"fpn\.lateral\.(\d)", r"neck.lateral_convs.\1.conv", name)
        name = re.sub(r"fpn\.output\.(\d)", r"neck.fpn_convs.\1.conv", name)
        name = name.replace("rpn.tower.blocks.0.conv", "rpn_head.rpn_conv")
        name = name.replace("rpn.logits", "rpn_head.rpn_cls").replace(
            "rpn.deltas", "rpn_head.rpn_reg"
        )
        head = r"roi_head.bbox_head.\1." if stages > 1 else "roi_head.bbox_head."
        name = re.sub(r"roi_heads\.(\d)\.", head, name)
        name = name.replace("shared.", "shared_fcs.")
        renamed[name.replace("logits", "fc_cls").replace("deltas", "fc_reg")] = tensor
    return renamed


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("faster_rcnn_r18", {}),
        ("faster_rcnn_r18", {"class_agnostic": True}),
        ("cascade_rcnn_r18", {}),
    ],
)
@pytest.mark.parametrize("num_classes", [1, 5])
def test_mmdetection_keys_and_shapes_say_the_options(name, options, num_classes, tmp_path):
    detector = narrow(name, num_classes, **options)
    state = to_mmdetection(detector.state_dict(), len(detector.roi_heads))
    file = tmp_path / "published.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, file)
    loaded = load_detector(name, file)
    assert loaded.num_classes == num_classes
    for key, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    batch = make_batch(num_classes=num_classes)
    one, other = (d.eval().predict(batch.images, score_threshold=0) for d in (detector, loaded))
    assert torch.equal(one[0].boxes_xyxy, other[0].boxes_xyxy)


def test_weights_of_another_family_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(to_mmdetection(narrow("faster_rcnn_r18").state_dict(), 1), file)
    with pytest.raises(UserError, match="holds the weights of faster_rcnn_r18, not of cascade"):
        load_detector("cascade_rcnn_r18", file)
    torch.save(narrow("retinanet_r18").state_dict(), file)
    with pytest.raises(UserError, match="holds the weights of retinanet_r18, not of faster_rcnn"):
        load_detector("faster_rcnn_r18", file)


def test_names():
    assert "faster_rcnn_r50" in list_detectors("faster*")
    assert "cascade_rcnn_r101_caffe" in list_detectors()

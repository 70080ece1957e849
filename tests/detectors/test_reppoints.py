"""RepPoints: its points, its two assignments and its losses, by hand."""

import pytest
import torch
import torch.nn.functional as F

from detdistill import load_detector
from detdistill.detectors import to_mmdetection_state
from detdistill.parts.coders import points_to_xyxy
from detdistill.parts.heads import PointConv
from tests.helpers import make_batch, narrow


def spread(seed=0, **options):
    """A detector whose untrained points do not coincide."""
    detector = narrow("reppoints_r18", seed=seed, **options)
    for conv in (detector.init_points, detector.refined_points):
        torch.nn.init.normal_(conv.bias, std=2.0)
    return detector


def outputs(detector, batch=None):
    batch = batch or make_batch()
    return detector(batch), batch.padded_targets()


def test_a_box_is_the_mean_and_deviation_of_its_points():
    # y: 0, 2, 4 (mean 2, unbiased deviation 2); x: 1, 1, 7 (mean 3, deviation sqrt(12)).
    points = torch.tensor([[0.0, 1, 2, 1, 4, 7]])
    box = points_to_xyxy(points, torch.tensor([[10.0, 20.0]]), torch.tensor([0.0, 2.0]).log1p())
    wide = 12**0.5
    assert box[0].tolist() == pytest.approx([13 - wide, 22 - 6, 13 + wide, 22 + 6])


def test_points_that_coincide_have_a_finite_gradient():
    points = torch.ones(2, 18, requires_grad=True)
    points_to_xyxy(points, torch.zeros(2, 2), torch.zeros(2))[:, 2:].sum().backward()
    assert points.grad.isfinite().all()


def test_the_deformable_convolution_looks_at_the_points():
    conv, level = PointConv(3, 5), torch.randn(2, 3, 6, 7)
    taps = conv.taps.expand(2, -1, 6, 7)
    plain = F.conv2d(level, conv.weight, padding=1)
    torch.testing.assert_close(conv(level, taps), plain)
    shift = torch.zeros_like(taps)
    shift[:, 0::2] = 1  # y comes first: every tap looks one row below
    moved = conv(level, taps + shift)
    torch.testing.assert_close(moved[:, :, :-2], plain[:, :, 1:-1])
    torch.testing.assert_close(moved[:, :, :-2, 0], plain[:, :, 1:-1, 0])


def test_published_shares_of_the_gradient():
    detector = spread().eval()
    output, _ = outputs(detector)
    points = output.features["points"][0]
    # The refined points start from the first ones without gradient, and see a tenth of it.
    output.predictions.boxes[0].sum().backward(retain_graph=True)
    tenth = detector.init_points.bias.grad.clone()
    end = output.towers["box"][0][-1].detach()
    looked_at = (points / 8).detach().requires_grad_()
    detector.refined_points(F.relu(detector.deform["box"](end, looked_at))).sum().backward()
    torch.testing.assert_close(tenth, looked_at.grad.sum((0, 2, 3)) * 8 * 0.1, rtol=1e-3, atol=1e-6)
    detector.zero_grad()
    flat = output.predictions.flatten().boxes[:1, :1]
    box = detector.decode(flat.detach(), output.anchors[0][:1])
    box[..., 2].sum().backward()
    half = (box[0, 0, 2] - box[0, 0, 0]).item() / 2
    assert detector.moment_transfer.grad.tolist() == pytest.approx([half * 0.01, 0])


def test_the_features_make_the_predictions():
    detector = spread().eval()
    output, _ = outputs(detector)
    maps = output.features
    for level, stride in enumerate(detector.strides):
        logits = detector.logits(maps["cls"][level])
        torch.testing.assert_close(output.predictions.logits[level][:, 0], logits)
        points = detector.init_points(maps["init"][level]) * stride
        torch.testing.assert_close(maps["points"][level], points)
        refined = points + detector.refined_points(maps["refine"][level]) * stride
        torch.testing.assert_close(output.predictions.boxes[level][:, 0], refined)
        assert all((maps[k][level] >= 0).all() for k in ("init", "cls", "refine"))


def test_only_the_refinement_depends_on_the_predictions():
    batch = make_batch()
    (one, other) = (spread(seed).eval() for seed in (0, 1))
    (output, targets), (another, _) = outputs(one, batch), outputs(other, batch)
    assert torch.equal(
        one.assign_init(output, targets).matched, other.assign_init(another, targets).matched
    )
    assert one.assign_init(output, targets).positive.sum(1).tolist() == [2, 1]
    found, changed = one.assign(output, targets), other.assign(another, targets)
    assert not torch.equal(found.matched, changed.matched)
    assert one.assignment_key != other.assignment_key
    assert one.assignment_key == one.assignment_key


def test_losses_by_their_formula():
    detector = spread().eval()
    output, targets = outputs(detector)
    losses = detector.loss(output, targets)
    centers = detector.flat_anchors(output.anchors)[:, :2]
    strides = torch.cat(
        [
            torch.full((len(a),), float(s))
            for a, s in zip(output.anchors, (8, 16, 32, 64, 128), strict=True)
        ]
    )
    first = torch.cat([p.permute(0, 2, 3, 1).flatten(1, 2) for p in output.features["points"]], 1)
    for term, weight, points, assignment in (
        ("task/box_init", 0.5, first, detector.assign_init(output, targets)),
        ("task/box", 1.0, output.predictions.flatten().boxes, detector.assign(output, targets)),
    ):
        total = 0.0
        for image, row in assignment.positive.nonzero().tolist():
            box = points_to_xyxy(points[image, row], centers[row], torch.zeros(2))
            gap = ((box - assignment.boxes[image, row]) / (4 * strides[row])).abs()
            total += torch.where(gap < 1 / 9, gap**2 * 4.5, gap - 1 / 18).sum().item()
        wanted = weight * total / assignment.num_positive.item()
        assert losses[term].item() == pytest.approx(wanted, rel=1e-4), term
    assert detector.assign_init(output, targets).num_positive == 3


def test_an_image_without_boxes_counts_as_one_positive():
    detector = spread().eval()
    output, targets = outputs(detector, make_batch((2, 0)))
    assert detector.assign_init(output, targets).num_positive == 3


@pytest.mark.parametrize("group_norm", [False, True])
def test_a_published_file_says_whether_the_pyramid_has_norms(group_norm, tmp_path):
    options = {"fpn_group_norm": group_norm, "group_norm": group_norm}
    state = to_mmdetection_state(narrow("reppoints_r18", **options))
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "published.pth")
    loaded = load_detector("reppoints_r18", tmp_path / "published.pth")
    assert {key: loaded.options[key] for key in options} == options
    assert (loaded.fpn.lateral[0].bias is None) == group_norm

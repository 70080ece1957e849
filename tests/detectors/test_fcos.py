"""FCOS's options and the caffe-style backbone."""

import pytest
import torch

from detdistill import Batch, create_detector, list_detectors, load_detector, save_detector
from detdistill.boxes import centerness
from tests.helpers import make_batch, narrow

IMPROVED = {
    "group_norm": True,
    "center_sampling": True,
    "norm_on_bbox": True,
    "centerness_on_reg": True,
    "box_loss": "giou",
}


@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_the_improved_form_trains_a_step(counts):
    detector, batch = narrow("fcos_r18", **IMPROVED), make_batch(counts)
    losses = detector.loss(detector(batch), batch.padded_targets())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters())


def test_normalised_boxes_are_in_pixels_in_both_modes():
    detector = narrow("fcos_r18", norm_on_bbox=True)
    with torch.no_grad():
        detector.distances.bias.fill_(2.0)
        detector.distances.weight.zero_()
    for mode in (True, False):
        boxes = detector.train(mode)(make_batch()).predictions.boxes
        assert [level.unique().tolist() for level in boxes] == [[2.0 * s] for s in detector.strides]


def test_centre_sampling_leaves_fewer_positives():
    batch = make_batch(size=(96, 128))
    batch.targets[0]["boxes"][0] = torch.tensor([4.0, 4.0, 60.0, 60.0])
    whole, middle = (narrow("fcos_r18", center_sampling=sampling) for sampling in (False, True))
    targets = batch.padded_targets()
    found = [d.assign(d(batch), targets).positive.sum() for d in (whole, middle)]
    assert 0 < found[1] < found[0]
    assert whole.assignment_key != middle.assignment_key


def test_centerness_by_hand():
    box, points = torch.tensor([0.0, 0, 8, 4]), torch.tensor([[4.0, 2], [2, 2], [2, 1]])
    found = centerness(box.expand(3, 4), points)
    assert found.tolist() == pytest.approx([1, (1 / 3) ** 0.5, (1 / 9) ** 0.5])


def test_names_say_caffe_and_group_norm():
    assert "fcos_r50_caffe_gn" in list_detectors()
    assert "retinanet_r50_caffe" in list_detectors()
    assert "gfl_r50_gn" not in list_detectors()
    options = narrow("fcos_r18_caffe_gn").options
    assert (options["backbone"], options["group_norm"]) == ("resnet18_caffe", True)
    assert narrow("fcos_r18").options["group_norm"] is False


def test_caffe_strides_the_first_convolution():
    plain, caffe = (create_detector(f"fcos_r50{s}", 2).backbone.body for s in ("", "_caffe"))
    assert (plain.layer3[0].conv1.stride, plain.layer3[0].conv2.stride) == ((1, 1), (2, 2))
    assert (caffe.layer3[0].conv1.stride, caffe.layer3[0].conv2.stride) == ((2, 2), (1, 1))


def test_caffe_takes_bgr_without_division():
    detector = narrow("fcos_r18_caffe")
    image = torch.tensor([10.0, 20.0, 30.0]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    found = detector.normalize(Batch(image, [(16, 32)]))
    wanted = torch.tensor([30 - 102.9801, 20 - 115.9465, 10 - 122.7717])
    torch.testing.assert_close(found[0, :, 0, 0], wanted)
    assert not found[:, :, 16:].any()


def test_caffe_batch_norm_has_no_gradient_on_stored_statistics(tmp_path):
    def norms(detector):
        modules = detector.backbone.modules()
        norms = [m for m in modules if isinstance(m, torch.nn.BatchNorm2d)]
        return [p.requires_grad for norm in norms for p in norm.parameters()]

    assert not any(norms(narrow("fcos_r18_caffe", norm_eval=True)))
    assert all(norms(narrow("fcos_r18", norm_eval=True)))
    fresh = narrow("fcos_r18_caffe")  # without weights BatchNorm has to learn
    assert all(norms(fresh))
    save_detector(fresh, tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path)
    assert torch.equal(loaded.pixel_mean, fresh.pixel_mean)
    assert loaded.backbone.caffe

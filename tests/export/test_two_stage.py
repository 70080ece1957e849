"""Two-stage detectors as files: proposals, pooled features and final detections are their own."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from detdistill import Batch, UserError, as_detector
from detdistill.detectors.classes import keep_classes
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.export import export_onnx
from detdistill.export.parity import Parity, check_batches, look_up, run_file
from detdistill.export.two_stage import TwoStageGraph, pooled
from tests.detectors.test_two_stage_views import v1
from tests.export.conftest import SIZE
from tests.helpers import TWO_STAGE_R18, make_batch, narrow


def lively(name: str, num_classes: int = 3) -> TwoStageDetector:
    """Classes and boxes that differ from place to place."""
    detector: TwoStageDetector = narrow(name, num_classes).eval()
    nn.init.normal_(detector.rpn.logits.weight, std=1.0)
    for head in detector.roi_heads:
        for layer, std in ((head.logits, 0.5), (head.deltas, 0.05)):
            nn.init.normal_(layer.weight, std=std)  # type: ignore[union-attr, arg-type]
    detector.input_size = SIZE
    return detector


@pytest.mark.parametrize("size", [SIZE, (128, 160)])
@pytest.mark.parametrize("name", TWO_STAGE_R18)
@torch.no_grad()
def test_detections_are_the_detectors_own(name: str, size: tuple[int, int]) -> None:
    """At the larger size the finest level has more anchors than go into NMS."""
    detector = lively(name)
    detector.test_proposals = 150  # fewer than NMS leaves, in one image more
    graph = TwoStageGraph(copy.deepcopy(detector), size)
    for batch in check_batches(graph):
        outputs = graph(batch.images, torch.tensor(batch.sizes))
        output = detector(batch)
        for image, found in enumerate(detector.detect(output, batch.sizes)):
            own, parity = [part[image] for part in outputs], Parity()
            look_up(found, own, parity)
            assert parity.compared > 20 and parity.lost == 0
            assert parity.boxes < 1e-2 and parity.scores < 1e-5
            assert (own[2][len(found) :] == -1).all() and (own[0][len(found) :] == 0).all()


@torch.no_grad()
def test_a_hopeless_proposal_counts_as_long_as_there_is_room() -> None:
    """Its objectness is 0 in float32; the second stage may find something in it."""
    detector = lively("faster_rcnn_r18")
    nn.init.constant_(detector.rpn.logits.bias, -2000.0)
    graph = TwoStageGraph(copy.deepcopy(detector), SIZE)
    batch = make_batch((0,), SIZE)
    batch = Batch(batch.images, [SIZE])
    [found] = detector.detect(detector(batch), [SIZE])
    assert detector.propose(detector(batch), [SIZE]).scores[0].max() == 0 < len(found)
    labels = graph(batch.images, torch.tensor([SIZE]))[2]
    assert torch.equal(labels[0, : len(found)], found.labels)


@pytest.mark.parametrize("name", TWO_STAGE_R18)
def test_the_file_is_the_detector(name: str, tmp_path: Path) -> None:
    detector = lively(name, 5)
    keep_classes(detector, [3, 0])
    written = export_onnx(detector, tmp_path / "model.onnx", nms=True, input_type="float32")
    assert written.parity.compared > 20 and written.parity.lost <= written.parity.compared // 50
    assert written.opset == 18
    assert written.outputs == {
        "boxes_xyxy": "(batch, 100, 4) float32",
        "scores": "(batch, 100) float32",
        "labels": "(batch, 100) int64",
    }
    model = onnx.load(written.path)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["scores"].startswith("softmax") and about["nms_iou"] == "0.5"
    assert ("averaged" in about["scores"]) == (name == "cascade_rcnn_r18")
    images = torch.rand(1, 3, *SIZE) * 255
    outputs = run_file(model, images, torch.tensor([SIZE]))
    with torch.no_grad():
        [found] = detector.detect(detector(Batch(images, [SIZE])), [SIZE])
    parity = Parity()
    look_up(found, [part[0] for part in outputs], parity)
    assert parity.compared > 20 and parity.lost <= 2


def test_pooling_in_a_file() -> None:
    """Boxes on every level, on none of some, of no size, and beyond the image."""
    import onnxruntime

    from detdistill.export.translations import TRANSLATIONS

    class Pooling(nn.Module):
        def forward(self, fine: torch.Tensor, coarse: torch.Tensor, *rest: torch.Tensor):  # type: ignore[no-untyped-def]
            return pooled([fine, coarse], *rest, [4, 8])

    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 3, 64 // s, 96 // s, generator=generator) for s in (4, 8)]
    corners = torch.rand(40, 2, generator=generator) * 80
    sizes = torch.rand(40, 2, generator=generator) * 50
    sizes[0] = 0
    images = torch.randint(2, (40, 1), generator=generator).float()
    rois = torch.cat((images, corners, corners + sizes), 1)
    for level_of_box in (torch.arange(40) % 2, torch.zeros(40, dtype=torch.int64)):
        given = (*levels, rois, level_of_box)
        program = torch.export.export(Pooling(), given, strict=False)
        exported = torch.onnx.export(
            program, opset_version=18, custom_translation_table=TRANSLATIONS, verbose=False
        )
        assert exported is not None
        session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
        feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), given, strict=True)}
        [found] = session.run(None, feed)
        wanted = pooled(levels, rois, level_of_box, [4, 8])
        torch.testing.assert_close(torch.from_numpy(found), wanted)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda: narrow("cascade_rcnn_r18"), {}, "has two stages.*exports with NMS only: --nms"),
        (lambda: as_detector(v1()), {"nms": True}, "its RoI head is torchvision's"),
    ],
)
def test_refusals(make, options, sentence, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=sentence):
        export_onnx(make(), tmp_path / "model.onnx", size=SIZE, **options)
    assert list(tmp_path.iterdir()) == []

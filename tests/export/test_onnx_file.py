"""The files: they compute what the detector computes, say what they are, or do not come to be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import detdistill
from detdistill import Batch, UserError, as_detector
from detdistill.detectors import DenseDetector
from detdistill.export import export_onnx, onnx_file
from detdistill.export.graph import DetectionGraph, RawGraph
from detdistill.export.parity import check_parity
from tests.detectors.test_views import fcos
from tests.detectors.test_views import lively as lively_model
from tests.export.conftest import SIZE, Export, lively
from tests.helpers import DENSE_R18, make_batch, narrow


def run(path: Path, batch: Batch) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = {"images": batch.images.numpy(), "sizes": torch.tensor(batch.sizes).numpy()}
    return [torch.from_numpy(output) for output in session.run(None, given)]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-3 if one.shape[-1] == 4 else 1e-5)


@pytest.mark.parametrize("name", DENSE_R18)
def test_every_family_is_what_it_was(name: str, exported: Export) -> None:
    detector, written = exported(name)
    assert written.parity.compared > 20 and written.parity.lost == 0
    for count in (1, 2, 4):
        batch = make_batch((0,) * count, SIZE)
        boxes, scores = run(written.path, batch)
        with torch.no_grad():
            output = detector(batch)
        flat = output.predictions.flatten()
        with torch.no_grad():
            decoded = detector.decode(flat.boxes, torch.cat(output.anchors))
        expected = flat.logits.sigmoid()
        if flat.quality is not None:
            expected = expected * flat.quality.sigmoid()[..., None]
        for image, (height, width) in enumerate(batch.sizes):
            limit = torch.tensor([width, height, width, height])
            clipped = torch.minimum(decoded[image].clamp(min=0), limit)
            close(boxes[image], clipped)
            seen = (clipped[:, 2:] - clipped[:, :2] > 1e-2).all(1)
            assert seen.sum() > 10
            close(scores[image, seen], expected[image, seen])


@pytest.mark.parametrize("name", DENSE_R18)
def test_the_file_says_what_it_is(name: str, exported: Export) -> None:
    detector, written = exported(name)
    model = onnx.load(written.path)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["classes"]) == ["class 0", "class 1", "class 2"]
    assert json.loads(about["input_size"]) == json.loads(about["resize"]) == list(SIZE)
    assert about["detector"] == name and about["family"] == detector.family
    assert about["detdistill_version"] == detdistill.__version__
    assert float(about["nms_iou"]) == detector.nms_threshold
    assert ("centerness" in about["scores"]) == (detector.quality_tower is not None)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [written.opset]
    assert written.opset == (19 if name == "reppoints_r18" else 18)
    boxes = sum(grid.shape[0] for grid in detector(Batch(torch.zeros(1, 3, *SIZE), [SIZE])).anchors)
    assert written.inputs == {"images": "(batch, 3, 64, 96) uint8", "sizes": "(batch, 2) int64"}
    assert written.outputs == {
        "boxes_xyxy": f"(batch, {boxes}, 4) float32",
        "scores": f"(batch, {boxes}, 3) float32",
    }
    assert all(value.doc_string for value in (*model.graph.input, *model.graph.output))
    assert str(Path(detdistill.__file__).parent).encode() not in written.path.read_bytes()


def test_final_detections_of_float_pixels(tmp_path: Path) -> None:
    detector, path = lively("fcos_r18").train(), tmp_path / "new" / "model.onnx"
    before, grid = copy.deepcopy(detector.state_dict()), detector.grid
    written = export_onnx(detector, path, nms=True, input_type="float32", opset=20)
    assert detector.training and detector.grid is grid
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    assert onnx.load(path).opset_import[0].version == written.opset == 20
    assert written.parity.compared > 20 and written.parity.lost == 0
    assert written.inputs["images"] == "(batch, 3, 64, 96) float32"
    assert written.outputs["labels"] == "(batch, 100) int64"
    batch = make_batch((0, 0, 0), SIZE)
    images = batch.images.float() * 0.995
    found = run(path, Batch(images, batch.sizes))
    detector.eval()
    for image, (height, width) in enumerate(batch.sizes):
        [expected] = detector.detect(
            detector(Batch(images[image, None], [(height, width)])), [(height, width)]
        )
        count = len(expected)
        assert count > 5
        boxes, scores, labels = (part[image] for part in found)
        assert torch.equal(labels[:count], expected.labels) and (labels[count:] == -1).all()
        close(scores[:count], expected.scores)
        close(boxes[:count], expected.boxes_xyxy)
    check_that_nothing_to_find_is_noticed(onnx.load(path), detector)
    check_that_a_lost_box_is_noticed(onnx.load(path), detector)


def check_that_nothing_to_find_is_noticed(model: onnx.ModelProto, detector: DenseDetector) -> None:
    """Of weights that are no numbers, file and detector agree that there are no boxes."""
    broken = copy.deepcopy(detector)
    torch.nn.init.constant_(broken.logits.bias, float("nan"))
    set_bias(model, broken.logits.bias.tolist())
    graph = DetectionGraph(copy.deepcopy(broken), SIZE, torch.float32)
    parity = check_parity(model, graph, broken)
    assert not parity.holds and parity.lost == 0
    assert "finds nothing that could be compared" in onnx_file.misfit(Path("m.onnx"), parity)


def check_that_a_lost_box_is_noticed(model: onnx.ModelProto, detector: DenseDetector) -> None:
    graph = DetectionGraph(copy.deepcopy(detector), SIZE, torch.float32)
    assert check_parity(model, graph, detector).holds
    [limit] = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
    strict = numpy_helper.from_array(torch.tensor([0.01]).numpy(), "strict")
    model.graph.initializer.append(strict)
    limit.input[3] = "strict"
    parity = check_parity(model, graph, detector)
    assert not parity.holds and parity.lost > parity.compared // 50


def test_torchvisions_detector(tmp_path: Path) -> None:
    view = as_detector(lively_model(fcos()).eval())
    written = export_onnx(view, tmp_path / "model.onnx", size=SIZE)
    assert written.parity.compared > 20 and written.parity.lost == 0
    about = {e.key: e.value for e in onnx.load(written.path).metadata_props}
    assert json.loads(about["resize"]) == [96, 160] and "square root" in about["scores"]


@pytest.fixture
def sabotaged(exported: Export, monkeypatch: pytest.MonkeyPatch) -> DenseDetector:
    """A detector whose file would come out with wrong numbers."""
    detector, written = exported("fcos_r18")
    model = onnx.load(written.path)
    set_bias(model, [value + 0.05 for value in detector.logits.bias.tolist()])
    monkeypatch.setattr(onnx_file, "_trace", lambda graph, opset: model)
    return detector


def test_a_file_that_differs_is_not_written(sabotaged: DenseDetector, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ONNX Runtime and PyTorch differ: by .* in scores"):
        export_onnx(sabotaged, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_not_run_is_not_written(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, written = exported("fcos_r18")
    model = onnx.load(written.path)
    model.graph.node[3].op_type = "Unheard"
    monkeypatch.setattr(onnx_file, "_trace", lambda graph, opset: model)
    with pytest.raises(UserError, match=r"onnxruntime .* does not run the file of fcos_r18"):
        export_onnx(detector, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_are_noticed(exported: Export) -> None:
    detector, written = exported("fcos_r18")
    model = onnx.load(written.path)
    set_bias(model, [float("nan")] * 3)
    assert not check_parity(model, RawGraph(copy.deepcopy(detector), SIZE), detector).holds


def set_bias(model: onnx.ModelProto, values: list[float]) -> None:
    [bias] = [one for one in model.graph.initializer if one.name.endswith(".logits.bias")]
    bias.CopyFrom(numpy_helper.from_array(torch.tensor(values).numpy(), bias.name))


def without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    from detdistill.export import checks

    find = checks.find_spec
    monkeypatch.setattr(checks, "find_spec", lambda n: None if n == "onnxscript" else find(n))


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda: narrow("faster_rcnn_r18"), {}, "faster_rcnn_r18 has two stages.*--nms"),
        (lambda: as_detector(fcos()), {"nms": True}, "torchvision_fcos exports without NMS only"),
        (narrow, {}, "gfl_r18 do not say their input size.*--size"),
        (narrow, {"size": (100, 64)}, "100 x 64: expected multiples of 32 pixels, e.g. 96 x 64"),
        (narrow, {"size": (0, 64)}, "input size 0 x 64"),
        (narrow, {"size": [32, 64], "opset": 17}, "opset 17: gfl_r18 can be"),  # a list will do
        (narrow, {"size": SIZE, "opset": 17}, "opset 17: gfl_r18 can be written in opset 18 to"),
        (lambda: narrow("reppoints_r18"), {"size": SIZE, "opset": 18}, "opset 19 to 23"),
        (narrow, {"path": "model.pt"}, "model.pt: expected a name that ends in .onnx"),
        (narrow, {"path": "taken.onnx"}, "taken.onnx: already exists"),
        (narrow, {"input_type": "int8", "size": SIZE}, "input type 'int8': expected uint8 or"),
    ],
)
def test_refusals(
    make: Callable[[], Any],
    options: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.onnx").write_text("mine")
    with pytest.raises(UserError, match=sentence):
        export_onnx(make(), **{"path": "model.onnx", **options})
    assert [path.name for path in tmp_path.iterdir()] == ["taken.onnx"]
    assert Path("taken.onnx").read_text() == "mine"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnxscript(monkeypatch)
    with pytest.raises(UserError, match=r"onnxscript must be installed: .*detdistill\[export\]"):
        export_onnx(narrow(), tmp_path / "model.onnx", size=SIZE)


def test_a_backbone_that_onnx_has_no_place_for(tmp_path: Path) -> None:
    detector = narrow()
    detector.backbone.body.layer1.register_forward_hook(
        lambda module, given, output: output * 2 if output.max() > 1 else output
    )
    with pytest.raises(UserError, match=r"gfl_r18 does not export to ONNX .*another backbone"):
        export_onnx(detector, tmp_path / "model.onnx", size=SIZE)
    assert list(tmp_path.iterdir()) == []

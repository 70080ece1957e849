"""Writing a detector as one ONNX file, after it was checked against the detector."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import detdistill
from detdistill.detectors import DenseDetector, FPNDetector
from detdistill.detectors.roi_head import NMS_THRESHOLD
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.detectors.view_base import TorchvisionView
from detdistill.errors import UserError
from detdistill.export.checks import (
    InputType,
    check_detector,
    check_installed,
    check_target,
    image_type,
    input_size,
    opset_for,
)
from detdistill.export.graph import (
    MAX_DETECTIONS,
    SCORE_THRESHOLD,
    DetectionGraph,
    FinalGraph,
    Graph,
    RawGraph,
)
from detdistill.export.parity import BOX_TOLERANCE, SCORE_TOLERANCE, Parity, check_parity
from detdistill.export.two_stage import TwoStageGraph

if TYPE_CHECKING:
    from onnx import ModelProto

MEANING = {
    "images": "RGB, 0..255, each image at the left and the top; what the padding holds is not read",
    "sizes": "height and width of each image in pixels, before padding",
    "boxes_xyxy": "x1, y1, x2, y2 in pixels of the input, clipped to the image",
    "scores": "0..1, final; 0 where a box lies beyond the image, and in empty slots",
    "labels": "index of the class, -1 in empty slots, which come last",
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        size: (h, w) of its input in pixels.
        opset: version of ONNX's operators.
        inputs: name to shape and type, as text.
        outputs: likewise.
        parity: how far it differs from the detector in PyTorch.
    """

    path: Path
    size: tuple[int, int]
    opset: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    parity: Parity


def export_onnx(
    detector: FPNDetector,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    nms: bool = False,
    input_type: InputType = "uint8",
    opset: int | None = None,
) -> Exported:
    """Writes a detector as an ONNX file, checked with ONNX Runtime before it appears.

    Pixels go in as they are; normalisation, decoding and clipping are in the file. Its metadata
    hold the classes, and how `predict` resizes.

    Args:
        detector: any of our own; it stays as it is.
        path: a new file; its folder is made.
        size: (h, w) of the input in pixels, multiples of 32; by default the detector's own, for
            images wider than high.
        nms: final detections instead of all boxes; detectors of two stages have no other form.
        input_type: of the images in the file.
        opset: 18 to 23; by default the lowest that has the operators.

    Raises:
        UserError: packages that are missing, a detector that cannot be exported, a file that
            exists, or one that would differ from the detector. Nothing is written then.
    """
    path = Path(path)
    check_target(path)
    check_installed()
    known = check_detector(detector, nms)
    size, dtype = input_size(detector, size), image_type(input_type)
    opset = opset_for(detector, opset)
    original = copy.deepcopy(known).cpu().eval()
    graph = _graph(copy.deepcopy(original), size, dtype, nms).eval()
    model = _trace(graph, opset)
    _describe(model, original, graph)
    parity = check_parity(model, graph, original)
    if not parity.holds:
        raise UserError(misfit(path, parity))
    _write(path, model.SerializeToString())
    inputs, outputs = (
        {value.name: _type_of(value) for value in values}
        for values in (model.graph.input, model.graph.output)
    )
    return Exported(path, size, opset, inputs, outputs, parity)


def _graph(
    detector: DenseDetector | TwoStageDetector, size: tuple[int, int], dtype: torch.dtype, nms: bool
) -> Graph:
    if isinstance(detector, TwoStageDetector):
        return TwoStageGraph(detector, size, dtype)
    return (DetectionGraph if nms else RawGraph)(detector, size, dtype)


def _trace(graph: Graph, opset: int) -> ModelProto:
    """The graph in ONNX, with an open number of images."""
    import onnx

    from detdistill.export.translations import TRANSLATIONS

    images = torch.zeros(2, 3, *graph.size, dtype=graph.dtype)
    sizes = torch.tensor([graph.size] * 2)
    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                graph, (images, sizes), dynamic_shapes=({0: batch}, {0: batch}), strict=False
            )
            exported: Any = torch.onnx.export(
                program,
                input_names=["images", "sizes"],
                output_names=list(graph.outputs),
                opset_version=opset,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        model: ModelProto = exported.model_proto
        _tidy(model, opset)
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # any module of a backbone may be one that has no place in ONNX
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{graph.detector.name} does not export to ONNX ({type(error).__name__}: {reason}); "
            f"choose another backbone"
        ) from error
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes, which are for its authors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def _tidy(model: ModelProto, opset: int) -> None:
    """Takes out what the exporter leaves for its authors, among it paths of this machine."""
    from onnx import helper

    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.HasField("dim_param"):
                dimension.dim_param = dimension.dim_param.replace(symbol, "batch")
    del graph.metadata_props[:], model.metadata_props[:]
    model.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


def _describe(model: ModelProto, detector: DenseDetector | TwoStageDetector, graph: Graph) -> None:
    """Adds what a stranger needs to know: metadata of the file, a sentence per input and output."""
    from onnx import helper

    short, long = detector.input_size or (min(graph.size), max(graph.size))
    about = {
        "detdistill_version": detdistill.__version__,
        "detector": detector.name,
        "family": detector.family,
        "classes": json.dumps(detector.classes or [str(k) for k in range(detector.num_classes)]),
        "input_size": json.dumps(graph.size),
        "resize": json.dumps([short, long]),
        "scores": _score_rule(detector),
        "nms_iou": str(getattr(detector, "nms_threshold", NMS_THRESHOLD)),
    }
    if isinstance(graph, FinalGraph):
        about |= {"score_threshold": str(SCORE_THRESHOLD), "max_detections": str(MAX_DETECTIONS)}
    helper.set_model_props(model, about)
    model.graph.name = detector.name
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = MEANING[value.name]


def _score_rule(detector: DenseDetector | TwoStageDetector) -> str:
    if isinstance(detector, TwoStageDetector):
        several = len(detector.roi_heads) > 1
        return "softmax of the class logits" + (", averaged over the stages" if several else "")
    if detector.quality_tower is None:
        return "sigmoid of the class logit"
    product = "class score times centerness, each a sigmoid"
    return f"square root of {product}" if isinstance(detector, TorchvisionView) else product


def misfit(path: Path, parity: Parity) -> str:
    """Why a file was not written."""
    if parity.compared == 0:
        return (
            f"{path} was not written, because the detector finds nothing that could be compared: "
            f"look at what it predicts first"
        )
    return (
        f"{path} was not written, because ONNX Runtime and PyTorch differ: by {parity.boxes:.2g} "
        f"pixels (at most {BOX_TOLERANCE} expected), by {parity.scores:.2g} in scores (at most "
        f"{SCORE_TOLERANCE}), and in {parity.lost} of {parity.compared} detections; try another "
        f"opset, or another version of onnxruntime"
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _type_of(value: Any) -> str:
    """For instance `(batch, 3, 320, 544) uint8`."""
    from onnx import helper

    tensor = value.type.tensor_type
    sides = [side.dim_param or str(side.dim_value) for side in tensor.shape.dim]
    return f"({', '.join(sides)}) {helper.tensor_dtype_to_np_dtype(tensor.elem_type)}"

"""What the exporter of PyTorch must be told. Imports onnxscript, so only an export imports it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from onnxscript import FLOAT

from detdistill.export import suppression as suppression  # registers the operation

op: Any = onnxscript.opset18  # its types know no constants


def _survivors(boxes_xyxy: FLOAT, scores: FLOAT, iou: float, most: int) -> FLOAT:
    """`suppression.survivors` in ONNX."""
    # A row per box that stays: image, class, box.
    chosen = op.NonMaxSuppression(
        boxes_xyxy,
        scores,
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[iou]),
        op.Constant(value_floats=[0.0]),
    )
    places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(chosen, start=0, end=1))
    none = op.ConstantOfShape(op.Shape(boxes_xyxy, start=0, end=2))
    return op.ScatterND(none, places, ones)  # type: ignore[no-any-return]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.detdistill.survivors.default: _survivors
}

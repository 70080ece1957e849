"""What the exporter of PyTorch must be told. Imports onnxscript, so only an export imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from onnxscript import FLOAT, INT64

from detdistill.detectors.roi_head import POOLED
from detdistill.export import suppression as suppression  # registers the operation
from detdistill.export import two_stage as two_stage  # likewise

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


def _pooled(
    levels: Sequence[FLOAT], rois: FLOAT, level_of_box: INT64, strides: Sequence[int]
) -> FLOAT:
    """`two_stage.pooled` in ONNX."""
    first = op.Constant(value_ints=[0])
    boxes = op.Slice(rois, op.Constant(value_ints=[1]), op.Constant(value_ints=[5]), [1])
    images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=INT64.dtype)
    parts, places = [], []
    for i, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        own = op.Equal(level_of_box, op.Constant(value_int=i))
        rows = op.Squeeze(op.NonZero(own), first)
        parts.append(
            op.RoiAlign(
                level,
                op.Gather(boxes, rows, axis=0),
                op.Gather(images, rows, axis=0),
                coordinate_transformation_mode="half_pixel",
                output_height=POOLED,
                output_width=POOLED,
                sampling_ratio=0,
                spatial_scale=1 / stride,
            )
        )
        places.append(rows)
    at = op.Unsqueeze(op.Concat(*places, axis=0), op.Constant(value_ints=[1]))
    found = op.Concat(*parts, axis=0)
    return op.ScatterND(op.ConstantOfShape(op.Shape(found)), at, found)  # type: ignore[no-any-return]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.detdistill.survivors.default: _survivors,
    torch.ops.detdistill.pooled.default: _pooled,
}

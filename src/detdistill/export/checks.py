"""What is refused before anything is traced or written."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from detdistill.detectors import DenseDetector, FPNDetector
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.detectors.view_base import TorchvisionView
from detdistill.errors import UserError
from detdistill.parts.heads import PointConv
from detdistill.structures import PADDED_TO

InputType = Literal["uint8", "float32"]
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LOWEST_OPSET, HIGHEST_OPSET = 18, 23
DEFORMABLE_OPSET = 19  # the first with DeformConv


def check_target(path: Path) -> None:
    """Refuses a name that is taken or that is none of an ONNX file."""
    if path.suffix != ".onnx":
        raise UserError(f"{path}: expected a name that ends in .onnx")
    if path.exists():
        raise UserError(f"{path}: already exists; choose another name, or remove it")


def check_installed() -> None:
    """Refuses where a package is missing that only an export needs."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"to export, {', '.join(missing)} must be installed: pip install 'detdistill[export]'"
        )


def check_detector(detector: FPNDetector, nms: bool) -> DenseDetector | TwoStageDetector:
    """The detector, if it can be exported."""
    own = not isinstance(detector, TorchvisionView)
    if isinstance(detector, TwoStageDetector):
        if not own:
            raise UserError(
                f"{detector.name} does not export, since its RoI head is torchvision's: distil it "
                f"into a detector of detdistill (see detdistill list detectors)"
            )
        if not nms:
            raise UserError(
                f"{detector.name} has two stages, the second of which looks at boxes that NMS has "
                f"chosen, so it exports with NMS only: --nms (nms=True in Python)"
            )
        return detector
    if nms and not own:
        raise UserError(
            f"{detector.name} exports without NMS only, since its post-processing is "
            f"torchvision's: leave nms out"
        )
    return cast(DenseDetector, detector)


def image_type(name: str) -> torch.dtype:
    """The type of the images in the file."""
    if name not in get_args(InputType):
        raise UserError(f"input type {name!r}: expected {' or '.join(get_args(InputType))}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def input_size(detector: FPNDetector, given: tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) in pixels of the graph's input: what was asked for, or the detector's own."""
    if given is None:
        if detector.input_size is None:
            raise UserError(
                f"the weights of {detector.name} do not say their input size: give one, "
                f"e.g. --size 320 544 (size=(320, 544) in Python)"
            )
        short, long = (-(-side // PADDED_TO) * PADDED_TO for side in detector.input_size)
        return short, long
    given = (given[0], given[1])  # also of a list
    rounded = tuple(max(1, round(side / PADDED_TO)) * PADDED_TO for side in given)
    if rounded != given:
        raise UserError(
            f"input size {given[0]} x {given[1]}: expected multiples of {PADDED_TO} pixels, "
            f"e.g. {rounded[0]} x {rounded[1]}"
        )
    return given


def opset_for(detector: FPNDetector, given: int | None) -> int:
    """The version of ONNX's operators: what was asked for, or the lowest that has them all."""
    deformable = any(isinstance(module, PointConv) for module in detector.modules())
    lowest = DEFORMABLE_OPSET if deformable else LOWEST_OPSET
    if given is not None and not lowest <= given <= HIGHEST_OPSET:
        raise UserError(
            f"opset {given}: {detector.name} can be written in opset {lowest} to {HIGHEST_OPSET}"
        )
    return given or lowest

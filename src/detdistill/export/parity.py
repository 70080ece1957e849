"""Whether a file computes what the detector computes: both run on the same images."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as image_ops

from detdistill.boxes import has_area
from detdistill.data.synthetic import draw_scene
from detdistill.detectors import FPNDetector
from detdistill.errors import UserError
from detdistill.export.graph import SCORE_THRESHOLD, FinalGraph, Graph
from detdistill.structures import Batch, DenseOutput, Detections

if TYPE_CHECKING:
    from onnx import ModelProto

BOX_TOLERANCE = 0.1
"""Pixels: far above what rounding does, far below what an eye can see."""
SCORE_TOLERANCE = 1e-3
ONE_IN = 50
"""One detection in so many may differ: where two boxes overlap by just the IoU at which NMS removes
one of them, rounding decides."""
ENOUGH = 50  # detections of each check image, so that there is something to compare


@dataclass
class Parity:
    """How far a file and the detector that it came from differ.

    Attributes:
        boxes: largest difference in pixels.
        scores: largest difference, on the scale of 0..1.
        compared: detections that were looked for among the outputs of the file.
        lost: those of them that are not there, and detections that are too many.
    """

    boxes: float = 0.0
    scores: float = 0.0
    compared: int = 0
    lost: int = 0

    @property
    def holds(self) -> bool:
        """Whether rounding explains the differences."""
        close = self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE
        return close and self.compared > 0 and self.lost <= self.compared // ONE_IN

    def saw(self, boxes: float, scores: float) -> None:
        """Counts one more difference in; unlike Python's `max`, what is no number stays."""
        self.boxes = float(np.maximum(self.boxes, boxes))
        self.scores = float(np.maximum(self.scores, scores))


def check_parity(model: ModelProto, graph: Graph, detector: FPNDetector) -> Parity:
    """Runs the file and the detector on a batch of 1 and a batch of 3 images.

    Whatever `detect` finds must stand among the outputs; of a `FinalGraph` nothing else. All
    outputs of `RawGraph` are compared besides.
    """
    parity = Parity()
    for batch in check_batches(graph):
        sizes = torch.tensor(batch.sizes)
        with torch.no_grad():
            output = detector(batch)
        threshold = _passed_by_enough(detector, output, batch)
        if isinstance(graph, FinalGraph):
            outputs = run_file(with_threshold(model, threshold), batch.images, sizes)
        else:
            outputs = run_file(model, batch.images, sizes)
            with torch.no_grad():
                expected = graph(batch.images, sizes)
            boxes, scores = (
                (one - other).abs().max().item()
                for one, other in zip(outputs, expected, strict=True)
            )
            parity.saw(boxes, scores)
        found = detector.detect(output, batch.sizes, score_threshold=threshold)
        for image, detections in enumerate(found):
            look_up(detections, [part[image] for part in outputs], parity)
    return parity


def look_up(found: Detections, outputs: list[Tensor], parity: Parity) -> None:
    """Looks for the detections of one image among the outputs for it."""
    seen = has_area(found.boxes_xyxy)  # torchvision's detectors keep boxes without
    parity.compared += int(seen.sum())
    final = len(outputs) == 3
    if final:
        parity.lost += max(0, int((outputs[2] >= 0).sum() - seen.sum()))
    for box, score, label in zip(
        found.boxes_xyxy[seen], found.scores[seen], found.labels[seen], strict=True
    ):
        scores = outputs[1] if final else outputs[1][:, label]
        apart = (outputs[0] - box).abs().amax(-1), (scores - score).abs()
        cost = torch.maximum(apart[0] / BOX_TOLERANCE, apart[1] / SCORE_TOLERANCE)
        if final:
            cost = torch.where(outputs[2] == label, cost, torch.inf)
        row = cost.argmin()
        if cost[row] <= 1:
            parity.saw(apart[0][row].item(), apart[1][row].item())
        else:
            parity.lost += 1


def check_batches(graph: Graph) -> list[Batch]:
    """One image that fills the input, and three of which two do not; noise in the padding."""
    height, width = graph.size
    generator = torch.Generator().manual_seed(0)
    batches = []
    for sizes in (
        [(height, width)],
        [(height, width), (height * 2 // 3, width), (height, width // 2 + 1)],
    ):
        images = torch.randint(256, (len(sizes), 3, height, width), generator=generator)
        for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
            pixels = torch.from_numpy(draw_scene(len(sizes), "test", index).image).permute(2, 0, 1)
            image[:, : size[0], : size[1]] = image_ops.resize(pixels, list(size), antialias=True)
        batches.append(Batch(images.to(graph.dtype), sizes))
    return batches


def with_threshold(model: ModelProto, threshold: float) -> ModelProto:
    """A copy of a file of a `FinalGraph` with another score threshold."""
    from onnx import numpy_helper

    changed = copy.deepcopy(model)
    [constant] = [one for one in changed.graph.initializer if one.name == "score_threshold"]
    constant.CopyFrom(numpy_helper.from_array(torch.tensor(threshold).numpy(), constant.name))
    return changed


def run_file(model: ModelProto, images: Tensor, sizes: Tensor) -> list[Tensor]:
    """The outputs of a file for images (B, 3, H, W) and their (B, 2) sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    given = {"images": images.numpy(), "sizes": sizes.numpy()}
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return [torch.from_numpy(output) for output in session.run(None, given)]
    except Exception as error:  # its own kinds of errors have no common base
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"onnxruntime {onnxruntime.__version__} does not run the file of {model.graph.name}, "
            f"so it was not written ({reason}); try a newer onnxruntime, or a lower opset"
        ) from error


def _passed_by_enough(detector: FPNDetector, output: DenseOutput, batch: Batch) -> float:
    """The usual score threshold, or a lower one where it would leave little to compare."""
    best = detector.detect(output, batch.sizes, score_threshold=0.0, max_detections=ENOUGH)
    lowest = [found.scores[-1].item() for found in best if len(found)]
    return min([SCORE_THRESHOLD, *(0.99 * score for score in lowest)])

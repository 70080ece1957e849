"""What the graphs compute, before they become files: what the detector itself computes."""

from __future__ import annotations

import copy

import pytest
import torch

from detdistill import Batch, as_detector
from detdistill.detectors import DenseDetector
from detdistill.export.graph import DetectionGraph, RawGraph
from detdistill.export.parity import Parity, check_batches, look_up
from detdistill.structures import Detections
from tests.detectors.test_views import BUILD
from tests.detectors.test_views import lively as lively_model
from tests.export.conftest import lively
from tests.helpers import DENSE_R18


def run(graph: RawGraph, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(graph(batch.images, torch.tensor(batch.sizes)))


def detect(detector: DenseDetector, batch: Batch) -> list[Detections]:
    with torch.no_grad():
        return detector.detect(detector(batch), batch.sizes)


@pytest.mark.parametrize("size", [(64, 96), (128, 160)])
@pytest.mark.parametrize("name", [*DENSE_R18, "fcos_r18_caffe"])
def test_detections_are_the_detectors_own(name: str, size: tuple[int, int]) -> None:
    """At the larger size most levels have more than 1000 candidates, as many as count."""
    detector = lively(name, num_classes=20)
    graph = DetectionGraph(copy.deepcopy(detector), size)
    parity = Parity()
    for batch in check_batches(graph):
        outputs = run(graph, batch)
        for image, found in enumerate(detect(detector, batch)):
            boxes, scores, labels = (part[image] for part in outputs)
            count = len(found)
            assert count > 20
            assert ((labels >= 0) == (scores > 0)).all() and (labels[count:] == -1).all()
            assert (boxes[count:] == 0).all()
            look_up(found, [boxes, scores, labels], parity)
            if batch.sizes[image] == size:
                assert torch.equal(labels[:count], found.labels)
                torch.testing.assert_close(scores[:count], found.scores)
                torch.testing.assert_close(boxes[:count], found.boxes_xyxy)
    # Over padding places look alike, and of boxes with equal scores either may go first.
    assert parity.lost <= 1


@pytest.mark.parametrize("name", [*DENSE_R18, "fcos_r18_caffe"])
def test_all_boxes_hold_the_detections(name: str) -> None:
    detector = lively(name)
    graph = RawGraph(copy.deepcopy(detector), (64, 96))
    for batch in check_batches(graph):
        agrees(detect(detector, batch), run(graph, batch))


@pytest.mark.parametrize("kind", BUILD)
def test_all_boxes_of_torchvisions_detectors_hold_theirs(kind: str) -> None:
    view = as_detector(lively_model(BUILD[kind]()).eval())
    graph = RawGraph(copy.deepcopy(view), (64, 96))
    for batch in check_batches(graph):
        agrees(detect(view, batch), run(graph, batch))


def agrees(detections: list[Detections], outputs: list[torch.Tensor]) -> None:
    for image, found in enumerate(detections):
        parity = Parity()
        look_up(found, [part[image] for part in outputs], parity)
        assert parity.compared > 3 and parity.lost == 0
        assert parity.boxes < 0.01 and parity.scores < 1e-5


def test_what_the_padding_holds_does_not_matter() -> None:
    graph = RawGraph(lively("gfl_r18"), (64, 96))
    _, batch = check_batches(graph)
    blank = torch.zeros_like(batch.images)
    for image, pixels, (height, width) in zip(blank, batch.images, batch.sizes, strict=True):
        image[:, :height, :width] = pixels[:, :height, :width]
    assert not torch.equal(blank, batch.images)
    for one, other in zip(run(graph, batch), run(graph, Batch(blank, batch.sizes)), strict=True):
        assert torch.equal(one, other)


def test_boxes_stay_on_their_images() -> None:
    detector = lively("fcos_r18")
    _, batch = check_batches(graph := RawGraph(detector, (64, 96)))
    boxes, scores = run(graph, batch)
    sizes = torch.tensor(batch.sizes)
    assert (boxes >= 0).all() and (boxes[..., 2:] <= sizes.flip(1)[:, None]).all()
    gone = (boxes[..., 2:] <= boxes[..., :2]).any(-1)
    assert gone.any() and (scores[gone] == 0).all() and (scores[~gone] > 0).all()

"""By what a run tells its teacher from another."""

import copy
import hashlib

import pytest
import torch
import torchvision

from detdistill import as_detector, match_classes
from detdistill.engine.build import _fingerprint
from tests.helpers import narrow


def view():
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    return as_detector(build(weights=None, weights_backbone=None, num_classes=4))


def whole(model):
    model.classes = ["cat", "dog", "cow"]
    return model


def fingerprint_of_weights(model):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "build", [narrow, lambda: narrow("faster_rcnn_r18", class_agnostic=True), view]
)
def test_the_classes_that_a_teacher_was_cut_to_make_another(build):
    model = whole(build())
    assert _fingerprint(model) == fingerprint_of_weights(model)
    found = []
    for classes in (["cat", "dog", "cow"], ["dog", "cat", "cow"], ["cat", "dog"], ["cat", "cow"]):
        part = copy.deepcopy(model)
        match_classes(part, classes)
        found.append(_fingerprint(part))
    assert found[0] == _fingerprint(model), "nothing was cut"
    assert len(set(found)) == len(found)

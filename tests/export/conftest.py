"""Each family exported once per process: that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from detdistill.detectors import DenseDetector
from detdistill.export import Exported, export_onnx
from tests.cli.conftest import run as run
from tests.helpers import narrow

SIZE = (64, 96)
Export = Callable[[str], tuple[DenseDetector, Exported]]


def lively(name: str, num_classes: int = 3, **options: object) -> DenseDetector:
    """Predictions that pass the thresholds, statistics that are not those of a fresh model."""
    detector = narrow(name, num_classes, **{"tower_depth": 1, **options}).eval()
    torch.manual_seed(1)
    for key, parameter in detector.named_parameters():
        if parameter.dim() < 2:  # no two equal, none that could be left out
            parameter.detach().add_(0.1 * torch.randn(parameter.shape))
        elif not key.startswith("backbone"):
            nn.init.kaiming_normal_(parameter)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    if detector.backbone.caffe:  # whose pixels are not scaled: features would be extreme
        nn.init.kaiming_normal_(detector.backbone.body.conv1.weight).detach().mul_(0.02)
    nn.init.normal_(detector.logits.bias, -2.0, 0.1)
    detector.classes = [f"class {label}" for label in range(num_classes)]
    detector.input_size = SIZE
    return detector


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A lively detector by its name, and its file with all boxes."""
    folder: Path = tmp_path_factory.mktemp("onnx")
    made: dict[str, tuple[DenseDetector, Exported]] = {}

    def export(name: str) -> tuple[DenseDetector, Exported]:
        if name not in made:
            detector = lively(name)
            made[name] = detector, export_onnx(detector, folder / f"{name}.onnx")
        return made[name]

    return export

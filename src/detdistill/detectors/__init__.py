"""Detectors that show their stages; see `stages` for the contract."""

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.checkpoints import to_mmdetection_state
from detdistill.detectors.classes import match_classes
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import create_detector, list_detectors
from detdistill.detectors.views import as_detector
from detdistill.detectors.weights import load_detector, save_detector

__all__ = [
    "DenseDetector",
    "FPNDetector",
    "as_detector",
    "create_detector",
    "list_detectors",
    "load_detector",
    "match_classes",
    "save_detector",
    "to_mmdetection_state",
]

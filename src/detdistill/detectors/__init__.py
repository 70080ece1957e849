"""Detectors that show their stages; see `stages` for the contract."""

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import create_detector, list_detectors
from detdistill.detectors.weights import load_detector, save_detector

__all__ = [
    "DenseDetector",
    "FPNDetector",
    "create_detector",
    "list_detectors",
    "load_detector",
    "save_detector",
]

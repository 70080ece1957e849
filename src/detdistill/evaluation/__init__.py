"""COCO accuracy and speed of detectors."""

from detdistill.evaluation.run import evaluate

__all__ = ["evaluate"]

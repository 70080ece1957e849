"""Knowledge distillation of object detectors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use: importing the package, as the command line does, must not load torch.
_HOMES = {
    "Batch": "detdistill.structures",
    "CrossKD": "detdistill.distill",
    "CrossKDRoI": "detdistill.distill",
    "Detections": "detdistill.structures",
    "Distiller": "detdistill.distill",
    "FeatureImitation": "detdistill.distill",
    "GDetKD": "detdistill.distill",
    "HEAD": "detdistill.distill",
    "LD": "detdistill.distill",
    "PFI": "detdistill.distill",
    "PKD": "detdistill.distill",
    "PredictionMimicking": "detdistill.distill",
    "RM": "detdistill.distill",
    "SoftLabel": "detdistill.distill",
    "TFHEAD": "detdistill.distill",
    "UserError": "detdistill.errors",
    "UserNotice": "detdistill.errors",
    "as_detector": "detdistill.detectors",
    "create_detector": "detdistill.detectors",
    "create_method": "detdistill.distill",
    "evaluate": "detdistill.evaluation",
    "export_onnx": "detdistill.export",
    "list_detectors": "detdistill.detectors",
    "list_methods": "detdistill.distill",
    "list_recipes": "detdistill.recipes",
    "load_detector": "detdistill.detectors",
    "match_classes": "detdistill.detectors",
    "save_detector": "detdistill.detectors",
}

if TYPE_CHECKING:
    from detdistill.detectors import (
        as_detector,
        create_detector,
        list_detectors,
        load_detector,
        match_classes,
        save_detector,
    )
    from detdistill.distill import (
        HEAD,
        LD,
        PFI,
        PKD,
        RM,
        TFHEAD,
        CrossKD,
        CrossKDRoI,
        Distiller,
        FeatureImitation,
        GDetKD,
        PredictionMimicking,
        SoftLabel,
        create_method,
        list_methods,
    )
    from detdistill.errors import UserError, UserNotice
    from detdistill.evaluation import evaluate
    from detdistill.export import export_onnx
    from detdistill.recipes import list_recipes
    from detdistill.structures import Batch, Detections

__all__ = [
    "HEAD",
    "LD",
    "PFI",
    "PKD",
    "RM",
    "TFHEAD",
    "Batch",
    "CrossKD",
    "CrossKDRoI",
    "Detections",
    "Distiller",
    "FeatureImitation",
    "GDetKD",
    "PredictionMimicking",
    "SoftLabel",
    "UserError",
    "UserNotice",
    "__version__",
    "as_detector",
    "create_detector",
    "create_method",
    "evaluate",
    "export_onnx",
    "list_detectors",
    "list_methods",
    "list_recipes",
    "load_detector",
    "match_classes",
    "save_detector",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Distillation: one method, one file, put together by the `Distiller`."""

from detdistill.distill.crosskd import CrossKD
from detdistill.distill.distiller import Distiller
from detdistill.distill.feature import FeatureImitation
from detdistill.distill.method import METHODS, Method, Step, create_method, list_methods
from detdistill.distill.mimic import PredictionMimicking
from detdistill.distill.pfi import PFI
from detdistill.distill.pkd import PKD
from detdistill.distill.rank_mimicking import RM
from detdistill.distill.soft_label import SoftLabel

__all__ = [
    "METHODS",
    "PFI",
    "PKD",
    "RM",
    "CrossKD",
    "Distiller",
    "FeatureImitation",
    "Method",
    "PredictionMimicking",
    "SoftLabel",
    "Step",
    "create_method",
    "list_methods",
]

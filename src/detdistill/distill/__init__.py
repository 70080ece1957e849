"""Distillation: one method, one file, put together by the `Distiller`."""

from detdistill.distill.crosskd import CrossKD
from detdistill.distill.crosskd_roi import CrossKDRoI
from detdistill.distill.distiller import Distiller
from detdistill.distill.feature import FeatureImitation
from detdistill.distill.g_detkd import GDetKD
from detdistill.distill.head import HEAD
from detdistill.distill.ld import LD
from detdistill.distill.method import METHODS, Method, Step, create_method, list_methods
from detdistill.distill.mimic import PredictionMimicking
from detdistill.distill.pfi import PFI
from detdistill.distill.pkd import PKD
from detdistill.distill.rank_mimicking import RM
from detdistill.distill.soft_label import SoftLabel
from detdistill.distill.tf_head import TFHEAD

__all__ = [
    "HEAD",
    "LD",
    "METHODS",
    "PFI",
    "PKD",
    "RM",
    "TFHEAD",
    "CrossKD",
    "CrossKDRoI",
    "Distiller",
    "FeatureImitation",
    "GDetKD",
    "Method",
    "PredictionMimicking",
    "SoftLabel",
    "Step",
    "create_method",
    "list_methods",
]

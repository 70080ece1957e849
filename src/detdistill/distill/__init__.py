"""Distillation: one method, one file, put together by the `Distiller`."""

from detdistill.distill.crosskd import CrossKD
from detdistill.distill.crosskd_roi import CrossKDRoI
from detdistill.distill.distiller import Distiller
from detdistill.distill.head import HEAD
from detdistill.distill.method import METHODS, Method, Step, create_method, list_methods
from detdistill.distill.pkd import PKD
from detdistill.distill.tf_head import TFHEAD

__all__ = [
    "HEAD",
    "METHODS",
    "PKD",
    "TFHEAD",
    "CrossKD",
    "CrossKDRoI",
    "Distiller",
    "Method",
    "Step",
    "create_method",
    "list_methods",
]

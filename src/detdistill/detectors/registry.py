"""Detector names: a family and a backbone, e.g. `gfl_r18`."""

from __future__ import annotations

from detdistill.registry import Registry

BACKBONES = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "r101": "resnet101",
    "r152": "resnet152",
    "r18_caffe": "resnet18_caffe",
    "r34_caffe": "resnet34_caffe",
    "r50_caffe": "resnet50_caffe",
    "r101_caffe": "resnet101_caffe",
    "r152_caffe": "resnet152_caffe",
}
"""Short names; any other timm model joins by the `backbone` keyword."""

FAMILIES: Registry[type] = Registry("detector family")
register_detector = FAMILIES.register

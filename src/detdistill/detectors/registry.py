"""Detector names: a family and a backbone, e.g. `gfl_r18`."""

from __future__ import annotations

from detdistill.registry import Registry

BACKBONES = {
    "r18": "resnet18",
    "r34": "resnet34",
    "r50": "resnet50",
    "r101": "resnet101",
    "r152": "resnet152",
    "x101_32x4d": "resnext101_32x4d",
    "x101_64x4d": "resnext101_64x4d",
    "mobilenetv2": "mobilenetv2_100",
    "mobilenetv2_head": "mobilenetv2_100_head",
    "swin_t": "swin_tiny_patch4_window7_224",
    "r18_caffe": "resnet18_caffe",
    "r34_caffe": "resnet34_caffe",
    "r50_caffe": "resnet50_caffe",
    "r101_caffe": "resnet101_caffe",
    "r152_caffe": "resnet152_caffe",
}
"""Short names; any other timm model joins by the `backbone` keyword.

"caffe" and "head" at their ends: see `Backbone`.
"""

FAMILIES: Registry[type] = Registry("detector family")
register_detector = FAMILIES.register

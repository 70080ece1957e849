"""From a name and keywords to a detector."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm

from detdistill.detectors import atss as atss  # each import files a family in the registry
from detdistill.detectors import cascade_rcnn as cascade_rcnn
from detdistill.detectors import faster_rcnn as faster_rcnn
from detdistill.detectors import fcos as fcos
from detdistill.detectors import gfl as gfl
from detdistill.detectors import reppoints as reppoints
from detdistill.detectors import retinanet as retinanet
from detdistill.detectors.backbone_weights import load_backbone
from detdistill.detectors.base import FPNDetector
from detdistill.detectors.registry import BACKBONES, FAMILIES
from detdistill.errors import UserError
from detdistill.parts.backbones import CAFFE, HEAD_FORM, close_models, unknown_model
from detdistill.registry import checked_keywords, keywords_of, nearest

GROUP_NORM = "_gn"


def list_detectors(pattern: str = "*") -> list[str]:
    """Names that `create_detector` takes, e.g. for the pattern "gfl*".

    Beside these, any timm backbone with maps at strides 8, 16 and 32 (two-stage: 4 too) joins by
    `create_detector("gfl", ..., backbone="mobilenetv3_large_100")`.
    """
    names: list[str] = []
    for family in FAMILIES.names():
        if not _takes_backbone(family):
            names.append(family)
            continue
        endings = ("", *getattr(FAMILIES.get(family), "suffixes", ()))
        names += [f"{family}_{short}{norm}" for short in BACKBONES for norm in endings]
    return [name for name in names if fnmatch(name, pattern)]


def _takes_backbone(family: str) -> bool:
    """True of all families here; one that was registered from outside may bring its own."""
    return "backbone" in keywords_of(FAMILIES.get(family))


def create_detector(
    name: str, num_classes: int, *, backbone_weights: str | Path | None = None, **options: Any
) -> FPNDetector:
    """Builds a detector with fresh weights.

    Args:
        name: family and backbone, e.g. "gfl_r18" or "fcos_r50_caffe_gn" ("caffe": see `Backbone`;
            "gn": `group_norm=True`); a family alone takes `backbone=`, or none where its class,
            registered from outside, has no such keyword.
        num_classes: K.
        backbone_weights: a file with ImageNet weights for the backbone, where `pretrained=True`
            cannot download them: timm's, torchvision's ResNets or OpenMMLab's.
        **options: the detector's own keywords (see its class); published values by default.

    Raises:
        UserError: for an unknown name or keyword, a value of the wrong type, a backbone without
            the needed feature maps, a file that does not fit.
    """
    family, options = split_name(name, options)
    entry = FAMILIES.get(family)
    keywords = checked_keywords(f"detector {family!r}", entry, options, given=["num_classes"])
    if _takes_backbone(family):
        _check_backbone(keywords["backbone"])
    elif backbone_weights is not None:
        raise UserError(f"detector {family!r} takes no backbone; leave backbone_weights out")
    if backbone_weights is not None and keywords.get("pretrained"):
        raise UserError("pretrained=True and backbone_weights both fill the backbone; keep one")
    detector = entry(num_classes, **keywords)
    if not isinstance(detector, FPNDetector):
        raise UserError(
            f"the detector family {family!r} makes a {type(detector).__name__}, which is no "
            f"FPNDetector; derive its class from FPNDetector or DenseDetector"
        )
    detector.name, detector.options = name, keywords
    if backbone_weights is not None:
        load_backbone(detector.backbone, backbone_weights, keywords["backbone"])
    return detector


def untrained(detector: FPNDetector) -> FPNDetector:
    """A detector of the same class and options with fresh weights, the backbone's, too.

    Raises:
        UserError: when its options are not known, as of a view or of one built from its class.
    """
    require_options(detector)
    options = {key: value for key, value in detector.options.items() if key != "pretrained"}
    build: Callable[..., FPNDetector] = type(detector)
    return build(detector.num_classes, **options)


def require_options(detector: FPNDetector) -> None:
    """`UserError` where it does not know its options: nothing could build it again."""
    if not detector.options and keywords_of(type(detector)).keys() - {"num_classes"}:
        raise UserError(
            f"{detector.name} was built from its class, so its options are not known; build it "
            f"with create_detector or load_detector"
        )


def _check_backbone(name: str) -> None:
    """`UserError` where a short name of ours, or nearly one, stands instead of timm's."""
    if timm.is_model(name.removesuffix(CAFFE).removesuffix(HEAD_FORM)):
        return
    if name.lower() in BACKBONES:
        raise unknown_model(name, [BACKBONES[name.lower()]])
    ours = [BACKBONES[short] for short in difflib.get_close_matches(name, BACKBONES, n=1)]
    raise unknown_model(name, [*ours, *close_models(name)])


def split_name(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """`"fcos_r18_gn"` to "fcos" and the options with `backbone="resnet18"`, `group_norm=True`."""
    families = [f for f in FAMILIES.names() if name == f or name.startswith(f + "_")]
    if not families:
        raise UserError(f"unknown detector {name!r}; {nearest(name, list_detectors())}")
    family = max(families, key=len)
    short = name[len(family) + 1 :]
    if not short:
        return family, options
    if not _takes_backbone(family):
        raise UserError(f"unknown detector {name!r}; {family!r} takes no backbone: leave it out")
    if short.endswith(GROUP_NORM):
        short, options = short.removesuffix(GROUP_NORM), {"group_norm": True, **options}
    if short not in BACKBONES and not timm.is_model(short):
        raise UserError(f"unknown detector {name!r}; {nearest(name, list_detectors())}")
    return family, {"backbone": BACKBONES.get(short, short), **options}

"""torchvision's RetinaNet, FCOS and Faster R-CNN rebuilt from their weights, as views.

They cannot become our detectors of the same names: torchvision rounds its anchors, spaces them by
the size of the level, pools boxes half a pixel beside ours, and applies ReLU before P7. So the
weights keep their own architecture.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, FCOS_ResNet50_FPN_Weights, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import (
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from detdistill.detectors.checkpoints import resnet_of
from detdistill.detectors.view_base import TorchvisionView
from detdistill.detectors.views import as_detector
from detdistill.errors import UserError
from detdistill.registry import AtLeastOne, checked_keywords

PREFIX = "torchvision_"
"""Of the names of views, e.g. "torchvision_retinanet_r50"."""

MOBILENET = "mobilenet_v3_large"
WIDTH = 256  # of every pyramid that torchvision builds
DENSE_LOGITS = "head.classification_head.cls_logits"
ROI_LOGITS = "roi_heads.box_predictor.cls_score"
COCO_CATEGORIES: list[str] = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
NO_CLASS = ("__background__", "N/A")
PUBLISHED: dict[str, dict[str, Any]] = {
    # RetinaNet v1, trained before BatchNorm had an epsilon: torchvision sets it to 0 for this file.
    "eeacb38b": {"norm_eps": 0.0},
    # Faster R-CNN on MobileNetV3 for images of 320 pixels, whose tensors are named as those of 800.
    "907ea3f9": {
        "traits": {
            "transform.min_size": [320],
            "transform.max_size": 640,
            "rpn._pre_nms_top_n": {"training": 2000, "testing": 150},
            "rpn._post_nms_top_n": {"training": 2000, "testing": 150},
        }
    },
}
"""Settings of torchvision's own files, by the start of their SHA-256, that are not its defaults."""

_MATCHING = ("proposal_matcher.high_threshold", "proposal_matcher.low_threshold")
_SAMPLING = ("fg_bg_sampler.batch_size_per_image", "fg_bg_sampler.positive_fraction")
_ANCHORS = ("anchor_generator.sizes", "anchor_generator.aspect_ratios")
_LIMITS = ("score_thresh", "nms_thresh", "detections_per_img")
TRAITS = (
    *(f"transform.{name}" for name in ("min_size", "max_size", "image_mean", "image_std")),
    *(*_LIMITS, "topk_candidates", "center_sampling_radius", *_MATCHING, *_ANCHORS),
    *(f"rpn.{name}" for name in ("score_thresh", "nms_thresh", *_MATCHING, *_SAMPLING, *_ANCHORS)),
    *("rpn._pre_nms_top_n", "rpn._post_nms_top_n", "roi_heads.box_coder.weights"),
    *(f"roi_heads.{name}" for name in (*_LIMITS, *_MATCHING, *_SAMPLING)),
)
"""Attributes of a model that its weights do not show; each model has some of them."""


@dataclass(frozen=True)
class Architecture:
    """What the keys and shapes of a torchvision state_dict say.

    Attributes:
        family: "retinanet", "fcos" or "faster_rcnn".
        backbone: short name, e.g. "r50".
        num_labels: of the model, usually with a background.
        v2: whether it is torchvision's second version of the detector, with norms in the head.
        from_c5: whether P6 starts from C5.
        frozen_norm: whether BatchNorm is torchvision's frozen one, which has no counter.
    """

    family: Literal["retinanet", "fcos", "faster_rcnn"]
    backbone: str
    num_labels: int
    v2: bool
    from_c5: bool
    frozen_norm: bool

    @property
    def name(self) -> str:
        """E.g. "retinanet_r50" or "retinanet_r50_v2"."""
        return f"{self.family}_{self.backbone}" + ("_v2" if self.v2 else "")


class Settings:
    """What the weights do not say of a torchvision model; the defaults are its own."""

    def __init__(
        self,
        *,
        labels: list[int] | None = None,
        trainable_layers: Literal[0, 1, 2, 3, 4, 5] = 3,
        frozen: list[str] | None = None,
        norm_eps: float | None = None,
        min_size: AtLeastOne | None = None,
        max_size: AtLeastOne | None = None,
        traits: dict[str, Any] | None = None,
    ) -> None:
        """None is torchvision's default, and for `labels` COCO's 80 where the model has 91.

        Args:
            labels: the model's label of each of our classes (see `as_detector`).
            trainable_layers: stages of the backbone that train, from the last; 5 is all of a
                ResNet.
            frozen: parameters that do not train, by name, instead of `trainable_layers`.
            norm_eps: of BatchNorm.
            min_size: short side that images are resized to, pixels.
            max_size: limit of the long side, pixels.
            traits: other attributes by their place (`TRAITS`), as model.json keeps them.
        """


def is_torchvision(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of torchvision's RetinaNet, FCOS or Faster R-CNN."""
    return any(f"{logits}.weight" in state for logits in (DENSE_LOGITS, ROI_LOGITS))


def architecture(state: dict[str, Tensor], file: Path) -> Architecture:
    """Reads the facts off a state_dict; `UserError` for a backbone that torchvision's have not."""
    two_stage = f"{ROI_LOGITS}.weight" in state
    sixth = state.get("backbone.fpn.extra_blocks.p6.weight")
    backbone = _backbone_name(state)
    if backbone is None or (sixth is None) != two_stage:
        raise UserError(
            f"{file} holds a torchvision detector with another backbone or pyramid than "
            f"torchvision's own builders give it; build the model yourself, load the file into it, "
            f"and pass it to detdistill.as_detector"
        )
    fcos = "head.regression_head.bbox_ctrness.weight" in state
    logits = state[f"{ROI_LOGITS if two_stage else DENSE_LOGITS}.bias"]
    boxes = state.get("head.regression_head.bbox_reg.bias")
    anchors = 1 if boxes is None else len(boxes) // 4
    return Architecture(
        family="faster_rcnn" if two_stage else "fcos" if fcos else "retinanet",
        backbone=backbone,
        num_labels=len(logits) // anchors,
        v2=any(
            key in state
            for key in (
                "head.classification_head.conv.0.1.weight",
                "backbone.fpn.inner_blocks.0.1.weight",
            )
        ),
        from_c5=sixth is not None and sixth.shape[1] != sixth.shape[0],
        frozen_norm=not any(key.endswith("num_batches_tracked") for key in state),
    )


def _backbone_name(state: dict[str, Tensor]) -> str | None:
    stem = state.get("backbone.body.0.0.weight")
    if stem is not None:
        last = state.get("backbone.body.16.0.weight")
        return MOBILENET if last is not None and last.shape[:2] == (960, 160) else None
    return resnet_of(state)


def view_for(
    state: dict[str, Tensor], file: Path, wanted: str, options: dict[str, Any]
) -> tuple[TorchvisionView, dict[str, Tensor]]:
    """A view of the model that a torchvision state_dict is of, and the state under its names."""
    facts = architecture(state, file)
    plain = f"{facts.family}_{facts.backbone}"
    if wanted.removeprefix(PREFIX) not in (plain, facts.name, facts.family):
        raise UserError(f"{file} holds torchvision's {facts.name}, not {wanted}; name it {plain}")
    options = {**_published(facts, file), **options}
    settings = checked_keywords(f"torchvision's {facts.name}", Settings, options)
    return _build(facts, settings), _current_names(state)


def _build(facts: Architecture, settings: dict[str, Any]) -> TorchvisionView:
    """The model of these facts, with fresh weights, as a view; `settings`: see `Settings`."""
    traits = dict(settings["traits"] or {})
    traits |= {
        f"transform.{key}": [settings[key]] if key == "min_size" else settings[key]
        for key in ("min_size", "max_size")
        if settings[key] is not None
    }
    unknown = [place for place in traits if place not in TRAITS]
    if unknown:
        raise UserError(f"traits: a torchvision model has no {unknown[0]!r}")
    place = "rpn." if facts.family == "faster_rcnn" else ""
    sizes, ratios = (_tuples(traits.get(place + name)) for name in _ANCHORS)
    anchors = None if sizes is None or ratios is None else AnchorGenerator(sizes, ratios)
    make = {"fcos": _fcos, "retinanet": _retinanet, "faster_rcnn": _faster_rcnn}[facts.family]
    model = make(facts, _backbone(facts, settings), anchors)
    for trait, value in traits.items():
        *parents, last = trait.split(".")
        setattr(reduce(getattr, parents, model), last, _tuples(value))
    if settings["frozen"] is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in settings["frozen"])
    labels, classes = settings["labels"], None
    if labels is None and facts.num_labels == len(COCO_CATEGORIES):
        labels = [i for i, name in enumerate(COCO_CATEGORIES) if name not in NO_CLASS]
        classes = [COCO_CATEGORIES[i] for i in labels]
    view = as_detector(model, labels=labels)
    view.classes, view.name = classes, PREFIX + facts.name
    return view


def _backbone(facts: Architecture, settings: dict[str, Any]) -> Any:
    norm: Any = FrozenBatchNorm2d if facts.frozen_norm else nn.BatchNorm2d
    if settings["norm_eps"] is not None:
        norm = partial(norm, eps=settings["norm_eps"])
    common = {"weights": None, "norm_layer": norm, "trainable_layers": settings["trainable_layers"]}
    if facts.backbone == MOBILENET:
        return mobilenet_backbone(backbone_name=MOBILENET, fpn=True, **common)
    name = facts.backbone.replace("r", "resnet", 1)
    deep = facts.backbone in ("r50", "r101", "r152")
    widths = [width * (4 if deep else 1) for width in (64, 128, 256, 512)]
    if facts.family == "faster_rcnn":
        backbone = resnet_fpn_backbone(backbone_name=name, **common)
        if facts.v2:
            norms = {"norm_layer": nn.BatchNorm2d}
            backbone.fpn = FeaturePyramidNetwork(widths, WIDTH, LastLevelMaxPool(), **norms)
        return backbone
    extra = LastLevelP6P7(widths[-1] if facts.from_c5 else WIDTH, WIDTH)
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": extra}
    return resnet_fpn_backbone(backbone_name=name, **common, **levels)


def _fcos(facts: Architecture, backbone: nn.Module, anchors: AnchorGenerator | None) -> Any:
    return FCOS(backbone, facts.num_labels, anchor_generator=anchors)


def _retinanet(facts: Architecture, backbone: nn.Module, anchors: AnchorGenerator | None) -> Any:
    model = RetinaNet(backbone, facts.num_labels, anchor_generator=anchors)
    if facts.v2:
        per_location = model.anchor_generator.num_anchors_per_location()[0]
        norm = partial(nn.GroupNorm, 32)
        model.head = RetinaNetHead(WIDTH, per_location, facts.num_labels, norm_layer=norm)
        model.head.regression_head._loss_type = "giou"  # as torchvision's v2 has it
    return model


def _faster_rcnn(facts: Architecture, backbone: nn.Module, anchors: AnchorGenerator | None) -> Any:
    options: dict[str, Any] = {}
    if facts.backbone == MOBILENET:
        sizes, ratios = ((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3
        anchors = anchors or AnchorGenerator(sizes, ratios)
        options["rpn_score_thresh"] = 0.05
    if facts.v2:
        per_location = 3 if anchors is None else anchors.num_anchors_per_location()[0]
        options["rpn_head"] = RPNHead(WIDTH, per_location, conv_depth=2)
        options["box_head"] = FastRCNNConvFCHead(
            (WIDTH, 7, 7), [WIDTH] * 4, [1024], norm_layer=nn.BatchNorm2d
        )
    return FasterRCNN(backbone, facts.num_labels, rpn_anchor_generator=anchors, **options)


def _current_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of today's torchvision for those of before 2022, which had one level less."""
    old = "head.regression_head.bbox_ctrness.weight" not in state and not any(
        re.fullmatch(r"head\.classification_head\.conv\.0\.0\..+", key) for key in state
    )
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"(\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
        key = re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", key)
        found = re.fullmatch(r"(head\..+_head\.conv)\.(\d)\.(weight|bias)", key)
        if old and found:
            key = f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}"
        renamed[key] = tensor
    return renamed


def _published(facts: Architecture, file: Path) -> dict[str, Any]:
    """What `PUBLISHED` says of the file."""
    if not facts.frozen_norm:  # as both have it: others need not be read again
        return {}
    with file.open("rb") as stream:
        return PUBLISHED.get(hashlib.file_digest(stream, "sha256").hexdigest()[:8], {})


def settings_of(view: TorchvisionView) -> dict[str, Any]:
    """The `Settings` of a view's model, for model.json."""
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)
    norms = [m for m in view.model.backbone.modules() if isinstance(m, kinds)]
    traits = {}
    for place in TRAITS:
        try:
            traits[place] = reduce(getattr, place.split("."), view.model)
        except AttributeError:  # of another family
            continue
    return {
        "labels": view.labels or list(view.known),
        "frozen": [n for n, p in view.model.named_parameters() if not p.requires_grad],
        "norm_eps": float(norms[0].eps) if norms else None,
        "traits": traits,
    }


def _tuples(value: Any) -> Any:
    """Lists of JSON, also nested, as the tuples that torchvision has."""
    return tuple(_tuples(one) for one in value) if isinstance(value, (list, tuple)) else value

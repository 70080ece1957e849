"""torchvision's RetinaNet and FCOS rebuilt from their weights, as views.

They cannot become our detectors of the same names: torchvision rounds its anchors, spaces them by
the size of the level, and applies ReLU before P7. So the weights keep their own architecture.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FCOS_ResNet50_FPN_Weights, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detdistill.detectors.view_base import TorchvisionView
from detdistill.detectors.views import as_detector
from detdistill.errors import UserError
from detdistill.registry import AtLeastOne, checked_keywords

PREFIX = "torchvision_"
"""Of the names of views, e.g. "torchvision_retinanet_r50"."""

DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "r18",
    (False, (3, 4, 6, 3)): "r34",
    (True, (3, 4, 6, 3)): "r50",
    (True, (3, 4, 23, 3)): "r101",
    (True, (3, 8, 36, 3)): "r152",
}
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # in the order in which they thaw
LIMITS = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
COCO_CATEGORIES: list[str] = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
NO_CLASS = ("__background__", "N/A")
NO_EPSILON = "eeacb38b"
"""Start of the hash of torchvision's published RetinaNet v1, which was trained without BatchNorm's
epsilon; torchvision sets it to 0 for this file alone."""


@dataclass(frozen=True)
class Architecture:
    """What the keys and shapes of a torchvision state_dict say.

    Attributes:
        family: "retinanet" or "fcos".
        backbone: short name, e.g. "r50".
        num_labels: of the model, usually with a background.
        group_norm: RetinaNet v2's towers.
        from_c5: whether P6 starts from C5.
        frozen_norm: whether BatchNorm is torchvision's frozen one, which has no counter.
    """

    family: Literal["retinanet", "fcos"]
    backbone: str
    num_labels: int
    group_norm: bool
    from_c5: bool
    frozen_norm: bool

    @property
    def name(self) -> str:
        """E.g. "retinanet_r50", or "retinanet_r50_v2" with GroupNorm."""
        v2 = "_v2" if self.family == "retinanet" and self.group_norm else ""
        return f"{self.family}_{self.backbone}{v2}"


class Settings:
    """What the weights do not say of a torchvision model; the defaults are its own."""

    def __init__(
        self,
        *,
        labels: list[int] | None = None,
        trainable_layers: Literal[0, 1, 2, 3, 4, 5] = 3,
        norm_eps: float | None = None,
        min_size: AtLeastOne = 800,
        max_size: AtLeastOne = 1333,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        score_thresh: float | None = None,
        nms_thresh: float | None = None,
        detections_per_img: AtLeastOne | None = None,
        topk_candidates: AtLeastOne | None = None,
        anchor_sizes: list[list[float]] | None = None,
        aspect_ratios: list[list[float]] | None = None,
        fg_iou_thresh: float | None = None,
        bg_iou_thresh: float | None = None,
        center_sampling_radius: float | None = None,
    ) -> None:
        """None is torchvision's default, and for `labels` COCO's 80 where the model has 91.

        Args:
            labels: the model's label of each of our classes (see `as_detector`).
            trainable_layers: stages of the ResNet that train, from the last; 5 is all.
            norm_eps: of BatchNorm.
            min_size: short side that images are resized to, pixels.
            max_size: limit of the long side, pixels.
            image_mean: of the channels, 0..1.
            image_std: of the channels, 0..1.
            score_thresh: least score of a detection.
            nms_thresh: IoU from which on NMS suppresses.
            detections_per_img: most detections.
            topk_candidates: most candidates of a level.
            anchor_sizes: per level, pixels.
            aspect_ratios: per level, height / width.
            fg_iou_thresh: RetinaNet's least IoU of a positive.
            bg_iou_thresh: RetinaNet's IoU below which an anchor is background.
            center_sampling_radius: FCOS's, in strides.
        """


def is_torchvision(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of torchvision's RetinaNet or FCOS."""
    return "head.classification_head.cls_logits.weight" in state


def architecture(state: dict[str, Tensor], file: Path) -> Architecture:
    """Reads the facts off a state_dict; `UserError` for a backbone other than ResNet with FPN."""
    blocks = Counter(
        found[1]
        for found in (
            re.fullmatch(r"backbone\.body\.(layer\d)\.\d+\.conv1\.weight", k) for k in state
        )
        if found
    )
    deep = "backbone.body.layer4.0.conv3.weight" in state
    depth = DEPTHS.get((deep, tuple(blocks[f"layer{i}"] for i in (1, 2, 3, 4))))
    sixth = state.get("backbone.fpn.extra_blocks.p6.weight")
    if depth is None or sixth is None:
        raise UserError(
            f"{file} holds a torchvision detector on another backbone than ResNet with FPN; build "
            f"the model yourself, load the file into it, and pass it to detdistill.as_detector"
        )
    fcos = "head.regression_head.bbox_ctrness.weight" in state
    head = "head.classification_head"
    anchors = 1 if fcos else state["head.regression_head.bbox_reg.bias"].numel() // 4
    return Architecture(
        family="fcos" if fcos else "retinanet",
        backbone=depth,
        num_labels=state[f"{head}.cls_logits.bias"].numel() // anchors,
        group_norm=fcos or f"{head}.conv.0.1.weight" in state,
        from_c5=sixth.shape[1] != sixth.shape[0],
        frozen_norm=not any(key.endswith("num_batches_tracked") for key in state),
    )


def view_for(
    state: dict[str, Tensor], file: Path, wanted: str, options: dict[str, Any]
) -> tuple[TorchvisionView, dict[str, Tensor]]:
    """A view of the model that a torchvision state_dict is of, and the state under its names."""
    facts = architecture(state, file)
    plain = f"{facts.family}_{facts.backbone}"
    if wanted.removeprefix(PREFIX) not in (plain, facts.name, facts.family):
        raise UserError(f"{file} holds torchvision's {facts.name}, not {wanted}; name it {plain}")
    settings = checked_keywords(f"torchvision's {facts.name}", Settings, options)
    if settings["norm_eps"] is None:
        settings["norm_eps"] = published_eps(facts, file)
    return build(facts, settings), current_names(state)


def build(facts: Architecture, settings: dict[str, Any]) -> TorchvisionView:
    """The model of these facts, with fresh weights, as a view; `settings`: see `Settings`."""
    norm = FrozenBatchNorm2d if facts.frozen_norm else nn.BatchNorm2d
    eps = settings["norm_eps"]
    c5 = 2048 if facts.backbone in ("r50", "r101", "r152") else 512
    backbone = resnet_fpn_backbone(
        backbone_name=facts.backbone.replace("r", "resnet", 1),
        weights=None,
        norm_layer=norm if eps is None else partial(norm, eps=eps),
        trainable_layers=settings["trainable_layers"],
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(c5 if facts.from_c5 else 256, 256),
    )
    given = {key: value for key, value in settings.items() if value is not None}
    options = {key: given[key] for key in (*LIMITS, "min_size", "max_size") if key in given}
    options |= {key: given[key] for key in ("image_mean", "image_std") if key in given}
    if "anchor_sizes" in given and "aspect_ratios" in given:
        options["anchor_generator"] = AnchorGenerator(
            _tuples(given["anchor_sizes"]), _tuples(given["aspect_ratios"])
        )
    labels, classes = settings["labels"], None
    if labels is None and facts.num_labels == len(COCO_CATEGORIES):
        labels = [i for i, name in enumerate(COCO_CATEGORIES) if name not in NO_CLASS]
        classes = [COCO_CATEGORIES[i] for i in labels]
    make = _fcos if facts.family == "fcos" else _retinanet
    view = as_detector(make(facts, backbone, options, given), labels=labels)
    view.classes, view.name = classes, PREFIX + facts.name
    return view


def _fcos(
    facts: Architecture, backbone: nn.Module, options: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    if "center_sampling_radius" in given:
        options["center_sampling_radius"] = given["center_sampling_radius"]
    return FCOS(backbone, facts.num_labels, **options)  # type: ignore[no-any-return]


def _retinanet(
    facts: Architecture, backbone: nn.Module, options: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    for key in ("fg_iou_thresh", "bg_iou_thresh"):
        if key in given:
            options[key] = given[key]
    model = RetinaNet(backbone, facts.num_labels, **options)
    if facts.group_norm:
        per_location = model.anchor_generator.num_anchors_per_location()[0]
        norm = partial(nn.GroupNorm, 32)
        model.head = RetinaNetHead(256, per_location, facts.num_labels, norm_layer=norm)
        model.head.regression_head._loss_type = "giou"  # as torchvision's v2 has it
    return model  # type: ignore[no-any-return]


def _tuples(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows)


def current_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of today's torchvision for those of before 2022, which had one level less."""
    old = "head.regression_head.bbox_ctrness.weight" not in state and not any(
        re.fullmatch(r"head\.classification_head\.conv\.0\.0\..+", key) for key in state
    )
    renamed = {}
    for key, tensor in state.items():
        key = re.sub(r"(\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
        found = re.fullmatch(r"(head\..+_head\.conv)\.(\d)\.(weight|bias)", key)
        if old and found:
            key = f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}"
        renamed[key] = tensor
    return renamed


def published_eps(facts: Architecture, file: Path) -> float | None:
    """0 for torchvision's published RetinaNet v1, None (its default) for all else."""
    if facts.family != "retinanet" or facts.group_norm or not facts.frozen_norm:
        return None
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return 0.0 if digest.startswith(NO_EPSILON) else None


def settings_of(view: TorchvisionView) -> dict[str, Any]:
    """The `Settings` of a view's model, for model.json."""
    model = view.model
    transform, generator = model.transform, model.anchor_generator
    norms = [
        m for m in model.backbone.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))
    ]
    settings = {key: getattr(model, key) for key in LIMITS}
    settings |= {
        "labels": view.labels,
        "trainable_layers": _trainable(model.backbone),
        "norm_eps": norms[0].eps if norms else None,
        "min_size": transform.min_size[-1],
        "max_size": transform.max_size,
        "image_mean": list(transform.image_mean),
        "image_std": list(transform.image_std),
        "anchor_sizes": [[float(size) for size in level] for level in generator.sizes],
        "aspect_ratios": [[float(ratio) for ratio in level] for level in generator.aspect_ratios],
    }
    if view.family == "fcos":
        return {**settings, "center_sampling_radius": float(model.center_sampling_radius)}
    matcher = model.proposal_matcher
    thresholds = {"fg_iou_thresh": matcher.high_threshold, "bg_iou_thresh": matcher.low_threshold}
    return {**settings, **thresholds}


def _trainable(backbone: nn.Module) -> int:
    """How many stages train, counted from the last."""
    body = getattr(backbone, "body", backbone)
    count = 0
    for stage in STAGES:
        part = getattr(body, stage, None)
        if part is None or not all(p.requires_grad for p in part.parameters()):
            break
        count += 1
    return count

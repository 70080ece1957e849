"""Names of other frameworks' weights, and ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.roi_head import KeptClasses
from detdistill.errors import UserError

SWIN, MOBILENET = "swin", "mobilenetv2"
RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "r18",
    (False, (3, 4, 6, 3)): "r34",
    (True, (3, 4, 6, 3)): "r50",
    (True, (3, 4, 23, 3)): "r101",
    (True, (3, 8, 36, 3)): "r152",
}
"""Short names, by whether blocks are bottlenecks and how many each stage has."""
SIGNS = {
    "distributions.weight": "gfl",
    "distances.weight": "fcos",
    "init_points.weight": "reppoints",
    "roi_heads.1.logits.weight": "cascade_rcnn",
    "roi_heads.0.logits.weight": "faster_rcnn",
    "quality.weight": "atss",
    "deltas.weight": "retinanet",
}
"""Tensors (our names) that say a family; the first that is there counts."""


def _mobilenet_rows() -> Iterator[tuple[str, str, str]]:
    """MobileNetV2: MMDetection counts layers from 1 and names convolutions by what they do."""
    first = {"depthwise_conv": ("conv_dw", "bn1"), "linear_conv": ("conv_pw", "bn2")}
    others = {
        "expand_conv": ("conv_pw", "bn1"),
        "depthwise_conv": ("conv_dw", "bn2"),
        "linear_conv": ("conv_pwl", "bn3"),
    }
    for layer in range(1, 8):
        for theirs, (conv, norm) in (first if layer == 1 else others).items():
            for part, ours in (("conv", conv), ("bn", norm)):
                yield (
                    rf"backbone\.layer{layer}\.(\d+)\.{theirs}\.{part}\.(\w+)",
                    rf"backbone.body.blocks.{layer - 1}.\1.{ours}.\2",
                    MOBILENET,
                )
    yield r"backbone\.conv1\.conv\.(\w+)", r"backbone.body.conv_stem.\1", MOBILENET
    yield r"backbone\.conv1\.bn\.(\w+)", r"backbone.body.bn1.\1", MOBILENET
    yield r"backbone\.conv2\.(conv|bn)\.(\w+)", r"backbone.top.\1.\2", MOBILENET


def _swin_rows() -> Iterator[tuple[str, str, str]]:
    """Swin: MMDetection merges patches at the end of a stage, timm at the start of the next."""
    yield (
        r"backbone\.patch_embed\.projection\.(\w+)",
        r"backbone.body.patch_embed.proj.\1",
        SWIN,
    )
    block = (r"backbone\.stages\.(\d+)\.blocks\.(\d+)", r"backbone.body.layers_\1.blocks.\2")
    for theirs, ours in (
        (r"\.attn\.w_msa\.(.+)", r".attn.\3"),
        (r"\.ffn\.layers\.0\.0\.(\w+)", r".mlp.fc1.\3"),
        (r"\.ffn\.layers\.1\.(\w+)", r".mlp.fc2.\3"),
        (r"\.norm(\d)\.(\w+)", r".norm\3.\4"),
    ):
        yield block[0] + theirs, block[1] + ours, SWIN
    for stage in range(3):
        yield (
            rf"backbone\.stages\.{stage}\.downsample\.(\w+)\.(\w+)",
            rf"backbone.body.layers_{stage + 1}.downsample.\1.\2",
            SWIN,
        )
    yield r"backbone\.norm(\d)\.(\w+)", r"backbone.norms.\1.\2", SWIN


MMDETECTION: tuple[tuple[str, ...], ...] = (
    *_mobilenet_rows(),
    *_swin_rows(),
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.gn\.(\w+)", r"fpn.lateral_norm.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.gn\.(\w+)", r"fpn.output_norm.\1.\2"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"fpn.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"fpn.output.\1.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", r"towers.cls.blocks.\1.conv.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.gn\.(\w+)", r"towers.cls.blocks.\1.norm.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", r"towers.box.blocks.\1.conv.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.gn\.(\w+)", r"towers.box.blocks.\1.norm.\2"),
    (r"bbox_head\.retina_cls\.(\w+)", r"logits.\1", "retinanet"),
    (r"bbox_head\.gfl_cls\.(\w+)", r"logits.\1", "gfl"),
    (r"bbox_head\.atss_cls\.(\w+)", r"logits.\1", "atss"),
    (r"bbox_head\.conv_cls\.(\w+)", r"logits.\1", "fcos"),
    (r"bbox_head\.retina_reg\.(\w+)", r"deltas.\1", "retinanet"),
    (r"bbox_head\.atss_reg\.(\w+)", r"deltas.\1", "atss"),
    (r"bbox_head\.conv_reg\.(\w+)", r"distances.\1", "fcos"),
    (r"bbox_head\.atss_centerness\.(\w+)", r"quality.\1", "atss"),
    (r"bbox_head\.conv_centerness\.(\w+)", r"quality.\1", "fcos"),
    (r"bbox_head\.gfl_reg\.(\w+)", r"distributions.\1", "gfl"),
    (r"bbox_head\.reppoints_cls_conv\.weight", r"deform.cls.weight"),
    (r"bbox_head\.reppoints_cls_out\.(\w+)", r"logits.\1", "reppoints"),
    (r"bbox_head\.reppoints_pts_init_conv\.(\w+)", r"init_conv.\1"),
    (r"bbox_head\.reppoints_pts_init_out\.(\w+)", r"init_points.\1"),
    (r"bbox_head\.reppoints_pts_refine_conv\.weight", r"deform.box.weight"),
    (r"bbox_head\.reppoints_pts_refine_out\.(\w+)", r"refined_points.\1"),
    (r"bbox_head\.moment_transfer", r"moment_transfer"),
    (r"bbox_head\.scales\.(\d+)\.scale", r"scales.\1.scale"),
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.tower.blocks.0.conv.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.deltas.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(\w+)", r"roi_heads.0.shared.\1.\2", "faster_rcnn"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"roi_heads.0.logits.\1", "faster_rcnn"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"roi_heads.0.deltas.\1", "faster_rcnn"),
    (
        r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.(\d+)\.(\w+)",
        r"roi_heads.\1.shared.\2.\3",
        "cascade_rcnn",
    ),
    (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.(\w+)", r"roi_heads.\1.logits.\2", "cascade_rcnn"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.(\w+)", r"roi_heads.\1.deltas.\2", "cascade_rcnn"),
)
"""MMDetection 2.x and 3.x names (pattern) and ours (replacement), the first that matches counts.

A third element says which family or backbone alone has the row; without it all have it.
"""

CONSTANTS = re.compile(r"bbox_head\.integral\.project|.+\.relative_position_index")
"""GFL's bin centres 0..reg_max, and the places of a Swin window: no weights."""


MERGED = re.compile(
    r"backbone\.body\.layers_\d\.downsample\.(norm\.(weight|bias)|reduction\.weight)"
)
"""Our names of the tensors whose last dimension holds four merged patches of a Swin."""


HEAD_STUDENT = "rpn_head.cls_convs."
"""HEAD trains the student's dense head in the place of an RPN, which has no such towers."""


def without_helpers(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A distilled student alone, and the names of what stood beside it for training.

    That is CrossKD's teacher, and HEAD's assistant with its adapters; the student's own head gets
    the name that it has in a plain detector.
    """
    if any(name.startswith(HEAD_STUDENT) for name in state):
        own = ("backbone.", "neck.", "rpn_head.")
        helpers = [name for name in state if not name.startswith(own)]
        kept = {
            re.sub(r"^rpn_head\.", "bbox_head.", name): tensor
            for name, tensor in state.items()
            if name.startswith(own)
        }
        return kept, helpers
    helpers = [name for name in state if name.startswith("teacher.")]
    return {name: tensor for name, tensor in state.items() if name not in helpers}, helpers


def is_mmdetection(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of an MMDetection detector."""
    return any(key.startswith(("bbox_head.", "rpn_head.")) for key in state)


def rename_mmdetection(name: str) -> str | None:
    """Our name of an MMDetection tensor; None for a constant; the name itself when unknown."""
    if CONSTANTS.fullmatch(name):
        return None
    for pattern, replacement, *_ in MMDETECTION:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def from_mmdetection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names."""
    renamed = {rename_mmdetection(name): tensor for name, tensor in state.items()}
    return {
        name: _merge_order(tensor) if MERGED.fullmatch(name) else tensor
        for name, tensor in renamed.items()
        if name is not None
    }


def family_of(state: dict[str, Tensor]) -> str | None:
    """The family that tensors (our names) are of; None where none has them."""
    return next((family for sign, family in SIGNS.items() if sign in state), None)


def resnet_of(state: dict[str, Tensor]) -> str | None:
    """Short name of the plain ResNet among a detector's tensors (our names, or torchvision's)."""
    keys = (re.fullmatch(r"backbone\.body\.(layer\d)\.\d+\.conv1\.weight", key) for key in state)
    blocks = Counter(found[1] for found in keys if found)
    deep = "backbone.body.layer4.0.conv3.weight" in state
    middle = state.get("backbone.body.layer1.0.conv2.weight")
    if middle is None or middle.shape[0] != middle.shape[1]:  # a ResNeXt's are in groups
        return None
    return RESNETS.get((deep, tuple(blocks[f"layer{i}"] for i in (1, 2, 3, 4))))


def _merge_order(tensor: Tensor) -> Tensor:
    """Reorders the four patches that Swin merges, in (..., 4*C).

    MMDetection unfolds: channel, row, column. timm stacks: column, row, channel.
    """
    patches = tensor.reshape(*tensor.shape[:-1], -1, 2, 2)
    return patches.transpose(-1, -3).reshape(tensor.shape)


def to_mmdetection_state(detector: FPNDetector) -> dict[str, Tensor]:
    """A detector's weights under the names of MMDetection 2.x and 3.x, constants included.

    The inverse of `from_mmdetection`, bit for bit: what was loaded from MMDetection goes back as it
    came.

    Raises:
        UserError: for a detector that MMDetection has no names for, or that was cut to some of its
            classes in a way that it cannot have.
    """
    require_all_classes(detector, "MMDetection's names")
    owners = {detector.family, _backbone_kind(detector)}
    rows = [_inverse(*row[:2]) for row in MMDETECTION if not row[2:] or row[2] in owners]
    state = {}
    for name, tensor in detector.state_dict().items():
        theirs = next((re.sub(p, r, name) for p, r in rows if re.fullmatch(p, name)), None)
        if theirs is None:
            raise UserError(f"MMDetection has no name for {name} of {detector.name}")
        if MERGED.fullmatch(name):
            rows_first = tensor.reshape(*tensor.shape[:-1], 2, 2, -1)
            tensor = rows_first.transpose(-1, -3).reshape(tensor.shape)
        state[theirs] = tensor.detach().clone()
    return {**state, **_constants(detector)}


def require_all_classes(detector: FPNDetector, place: str | Path) -> None:
    """`UserError` where it was cut to some of its classes in a way that no file can tell."""
    if any(isinstance(module, KeptClasses) for module in detector.modules()):
        raise UserError(
            f"{place}: {detector.name} was cut to {detector.num_classes} of its classes, and a "
            f"file could not say what became of the others' scores; save it before it is cut"
        )


def _backbone_kind(detector: FPNDetector) -> str:
    """Owner of the rows for the detector's backbone; `UserError` where there are none."""
    name = str(detector.options.get("backbone", type(detector).__name__))
    kinds = {"resnet": "resnet", "resnext": "resnet", "swin_": SWIN, "mobilenetv2_100": MOBILENET}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), None)
    plain = kind != "resnet" or "backbone.body.conv1.weight" in detector.state_dict()
    if kind is None or not plain:
        raise UserError(
            f"MMDetection has no backbone {name!r}; it has ResNets, ResNeXts, MobileNetV2 and Swin"
        )
    return kind


def _inverse(pattern: str, replacement: str) -> tuple[str, str]:
    """The row that renames back. Groups stand in the same order on both sides."""
    back, theirs = replacement.replace(".", r"\."), pattern
    for index, group in enumerate(re.findall(r"\([^()]+\)", pattern), 1):
        back = back.replace(f"\\{index}", group)
        theirs = theirs.replace(group, f"\\{index}", 1)
    return back, theirs.replace(r"\.", ".")


def _constants(detector: FPNDetector) -> dict[str, Tensor]:
    """What MMDetection keeps among its weights although it never changes."""
    found = {}
    if "distributions.weight" in detector.state_dict():
        bins = int(detector.options["reg_max"])
        found["bbox_head.integral.project"] = torch.linspace(0, bins, bins + 1)
    for name, places in detector.backbone.body.named_buffers():
        place = re.fullmatch(r"layers_(.+)\.attn\.relative_position_index", name)
        if place:
            found[f"backbone.stages.{place[1]}.attn.w_msa.relative_position_index"] = places
    return found


def implied_options(state: dict[str, Tensor]) -> dict[str, object]:
    """Detector keywords that the shapes of a published checkpoint (our names) give away.

    The widths, the depth and where the extra pyramid levels start; published training of ResNets
    froze the first stage and kept BatchNorm on stored statistics. `fpn_extra` stays open where C5
    happens to be as wide as the pyramid.
    """
    residual = "backbone.body.layer1.0.conv1.weight" in state
    options: dict[str, object] = {"frozen_stages": 1, "norm_eval": True} if residual else {}
    if "fpn.lateral.2.weight" in state:
        fpn, c5 = state["fpn.lateral.2.weight"].shape[:2]
        options["fpn_channels"] = int(fpn)
        start = state.get("fpn.output.3.weight")
        if start is not None and c5 != fpn and "rpn.logits.weight" not in state:
            options["fpn_extra"] = "c5" if start.shape[1] == c5 else "p5"
    if "init_conv.weight" in state:  # RepPoints, the one family with norms in the pyramid
        options["fpn_group_norm"] = "fpn.output_norm.0.weight" in state
    blocks = [key for key in state if re.fullmatch(r"towers\.cls\.blocks\.\d+\.conv\.weight", key)]
    if blocks:
        options["tower_depth"] = len(blocks)
        options["tower_channels"] = int(state[blocks[0]].shape[0])
        options["group_norm"] = "towers.cls.blocks.0.norm.weight" in state
    if "backbone.body.conv1.weight" in state:
        options["base_channels"] = int(state["backbone.body.conv1.weight"].shape[0])
    if "distributions.weight" in state:
        options["reg_max"] = int(state["distributions.weight"].shape[0]) // 4 - 1
    if "roi_heads.0.logits.weight" in state:
        outputs, options["roi_channels"] = map(int, state["roi_heads.0.logits.weight"].shape)
        shared = len(state["roi_heads.0.deltas.weight"]) == 4 and outputs > 2
        if shared and "roi_heads.1.logits.weight" not in state:
            options["class_agnostic"] = True
    return options

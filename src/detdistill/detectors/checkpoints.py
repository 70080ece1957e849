"""Names of other frameworks' weights, and ours."""

from __future__ import annotations

import re

from torch import Tensor

MMDETECTION = (
    (r"backbone\.(.+)", r"backbone.body.\1"),
    (r"neck\.lateral_convs\.(\d+)\.gn\.(\w+)", r"fpn.lateral_norm.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.gn\.(\w+)", r"fpn.output_norm.\1.\2"),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"fpn.lateral.\1.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"fpn.output.\1.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.conv\.(\w+)", r"towers.cls.blocks.\1.conv.\2"),
    (r"bbox_head\.cls_convs\.(\d+)\.gn\.(\w+)", r"towers.cls.blocks.\1.norm.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.conv\.(\w+)", r"towers.box.blocks.\1.conv.\2"),
    (r"bbox_head\.reg_convs\.(\d+)\.gn\.(\w+)", r"towers.box.blocks.\1.norm.\2"),
    (r"bbox_head\.(?:(?:retina|gfl|atss)_cls|conv_cls)\.(\w+)", r"logits.\1"),
    (r"bbox_head\.(?:retina|atss)_reg\.(\w+)", r"deltas.\1"),
    (r"bbox_head\.conv_reg\.(\w+)", r"distances.\1"),
    (r"bbox_head\.(?:atss|conv)_centerness\.(\w+)", r"quality.\1"),
    (r"bbox_head\.gfl_reg\.(\w+)", r"distributions.\1"),
    (r"bbox_head\.reppoints_cls_conv\.weight", r"deform.cls.weight"),
    (r"bbox_head\.reppoints_cls_out\.(\w+)", r"logits.\1"),
    (r"bbox_head\.reppoints_pts_init_conv\.(\w+)", r"init_conv.\1"),
    (r"bbox_head\.reppoints_pts_init_out\.(\w+)", r"init_points.\1"),
    (r"bbox_head\.reppoints_pts_refine_conv\.weight", r"deform.box.weight"),
    (r"bbox_head\.reppoints_pts_refine_out\.(\w+)", r"refined_points.\1"),
    (r"bbox_head\.moment_transfer", r"moment_transfer"),
    (r"bbox_head\.scales\.(\d+)\.scale", r"scales.\1.scale"),
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.tower.blocks.0.conv.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.deltas.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.(\w+)", r"roi_heads.0.shared.\1.\2"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"roi_heads.0.logits.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"roi_heads.0.deltas.\1"),
    (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.(\d+)\.(\w+)", r"roi_heads.\1.shared.\2.\3"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.(\w+)", r"roi_heads.\1.logits.\2"),
    (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.(\w+)", r"roi_heads.\1.deltas.\2"),
)
"""MMDetection 2.x and 3.x names (pattern) and ours (replacement)."""

CONSTANTS = frozenset({"bbox_head.integral.project"})  # GFL's bin centres 0..reg_max


def is_mmdetection(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of an MMDetection detector."""
    return any(key.startswith(("bbox_head.", "rpn_head.")) for key in state)


def rename_mmdetection(name: str) -> str | None:
    """Our name of an MMDetection tensor; None for a constant; the name itself when unknown."""
    if name in CONSTANTS:
        return None
    for pattern, replacement in MMDETECTION:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def from_mmdetection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names."""
    renamed = {rename_mmdetection(name): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}


def implied_options(state: dict[str, Tensor]) -> dict[str, object]:
    """Detector keywords that the shapes of a published checkpoint (our names) give away.

    The widths, the depth and where the extra pyramid levels start; published training froze the
    first stage and kept BatchNorm on stored statistics. `fpn_extra` stays open where C5 happens to
    be as wide as the pyramid.
    """
    options: dict[str, object] = {"frozen_stages": 1, "norm_eval": True}
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

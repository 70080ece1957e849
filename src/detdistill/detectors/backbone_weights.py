"""ImageNet weights for a backbone from a local file, whoever trained them."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from detdistill.detectors.checkpoints import from_mmdetection
from detdistill.detectors.files import few, misfits, read_state
from detdistill.errors import UserError
from detdistill.parts.backbones import Backbone

CLASSIFIERS = ("classifier", "head", "fc")  # some feature extractors of timm's keep theirs
BUFFERS = re.compile(r".+\.(attn_mask|relative_position_index)")  # of Swin, which makes its own


def load_backbone(backbone: Backbone, path: str | Path, name: str) -> None:
    """Fills a backbone from a classifier's weights: timm's, torchvision's ResNets, OpenMMLab's.

    The classifier itself is left out; all else must fit. A transformer's norms of single stages
    are new in detectors and keep their start.

    Args:
        backbone: what is filled.
        path: .safetensors or .pth.
        name: of the backbone, for messages.

    Raises:
        UserError: a file that is missing, unreadable, or of another network.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"{file}: no such file with weights of the backbone {name}")
    state = _under_our_names(read_state(file), backbone)
    own = {k: v for k, v in backbone.state_dict().items() if not k.startswith("norms.")}
    # A deeper network of the same kind holds every tensor of this one: what belongs to the body
    # must be the body's. All else is the classifier.
    root, place = _root(backbone)
    parts = tuple(
        f"{place}{part}."
        for part, child in root.named_children()
        if part not in CLASSIFIERS and child.state_dict()  # some are emptied, not removed
    )
    state = {k: v for k, v in state.items() if k in own or k.startswith(parts)}
    faults = misfits(own, state)
    if faults:
        raise UserError(
            f"{file} does not fit the backbone {name} in {len(faults)} tensors: {few(faults)}; "
            f"choose the file of this very network"
        )
    backbone.load_state_dict(state, strict=False)


def _under_our_names(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    state = {k.removeprefix("module."): v for k, v in state.items() if not BUFFERS.fullmatch(k)}
    if any(k.startswith("backbone.") for k in state):  # OpenMMLab's classifiers
        state = from_mmdetection({k: v for k, v in state.items() if k.startswith("backbone.")})
        return {k.removeprefix("backbone."): v for k, v in state.items()}
    if "layers.0.downsample.reduction.weight" in state:
        # Swin's authors merge patches at the end of a stage, timm at the start of the next.
        state = {re.sub(r"layers\.(\d)\.downsample", _next_stage, k): v for k, v in state.items()}
    # timm flattens some containers: "stages_0" for "stages.0".
    root, place = _root(backbone)
    there = {key.partition(".")[0] for key in state}
    flat = {
        name.replace("_", ".", 1): name
        for name, _ in root.named_children()
        if "_" in name and name not in there
    }
    renamed = {}
    for key, tensor in state.items():
        whole = next((w for w in flat if key.startswith(f"{w}.")), None)
        ours = key if whole is None else flat[whole] + key.removeprefix(whole)
        renamed[_top_name(ours, backbone) or place + ours] = tensor
    return renamed


def _next_stage(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) + 1}.downsample"


def _root(backbone: Backbone) -> tuple[nn.Module, str]:
    """The network itself, which timm wraps for some families, and where it stands."""
    wrapped = [name for name, _ in backbone.body.named_children()] == ["model"]
    return (backbone.body.model, "body.model.") if wrapped else (backbone.body, "body.")


def _top_name(key: str, backbone: Backbone) -> str | None:
    """Below `top` for timm's last convolution of a MobileNetV2, where it is used."""
    if len(list(backbone.top.children())):
        for theirs, ours in (("conv_head.", "top.conv."), ("bn2.", "top.bn.")):
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs)
    return None

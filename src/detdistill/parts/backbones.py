"""Backbones from timm, chosen by the stride of their feature maps."""

from __future__ import annotations

import difflib
from typing import Any, cast

import timm
import torch
from timm.layers.conv_bn_act import ConvNormAct
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from detdistill.errors import UserError
from detdistill.parts.pretrained import pretrained_model
from detdistill.parts.swin import (
    in_patches,
    is_swin,
    pad_blocks,
    pad_to_patches,
    swin_options,
)

STRIDES = (8, 16, 32)
PLAIN_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
RESNET_WIDTHS = (64, 128, 256, 512)
CAFFE = "_caffe"
HEAD_FORM = "_head"
TORCHVISION = ".tv_in1k"  # timm's tag
LEAK = 0.1  # negative slope in HEAD's form
TOP_CHANNELS = 1280
PROVEN = ("resnet", "resnext", "mobilenetv2", "swin_")  # their maps need no trial
TRIAL = 128  # pixels
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """A timm feature extractor that returns the maps at some strides, by default C3, C4, C5.

    Args:
        name: any timm model with feature maps at these strides; a ResNet's name with `_caffe` is
            its caffe-style form, which strides the first 1x1 convolution of a stage, not the 3x3;
            a MobileNetV2's name with `_head` is the form that HEAD trains (arXiv 2207.05345):
            LeakyReLU, and 1280 channels in the last map.
        pretrained: load ImageNet weights from timm (needs the network once); of a plain ResNet
            torchvision's first, from which published detectors start, unless the name has a tag,
            e.g. "resnet50.a1_in1k". What timm lacks (the norms of single stages, HEAD's last
            convolution) starts fresh.
        base_channels: width of a ResNet's first stage and stem; 64 is the full network.
        frozen_stages: 0 trains everything, n freezes the stem and the first n stages.
        norm_eval: BatchNorm keeps its stored statistics while training; in a caffe-style network
            its factors and offsets get no gradient either, as published.
        strides: of the maps.

    Attributes:
        caffe: whether it is caffe-style and takes BGR.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        base_channels: int = 64,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        strides: tuple[int, ...] = STRIDES,
    ) -> None:
        """Builds the network; `UserError` where the name or the combination makes none."""
        super().__init__()
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.caffe = name.endswith(CAFFE)
        plain = name.removesuffix(CAFFE).removesuffix(HEAD_FORM)
        leaky = name.endswith(HEAD_FORM)
        self.body = _create(plain, pretrained and not self.caffe, base_channels, strides, leaky)
        if self.caffe:
            _stride_first(self.body, name, pretrained)
        reductions = list(self.body.feature_info.reduction())
        self.channels: list[int] = list(self.body.feature_info.channels())
        if tuple(reductions) != strides:
            raise UserError(
                f"backbone {name!r} has feature maps at strides {reductions}, a pyramid needs "
                f"{', '.join(map(str, strides[:-1]))} and {strides[-1]}; choose another timm model"
            )
        self.top = _top(name, self.channels) if leaky else nn.Identity()
        # Transformers of MMDetection normalise each map that leaves them; by index of the stage.
        self.norms = nn.ModuleDict()
        if is_swin(plain):
            pad_blocks(self.body)
            stages = zip(self.body.feature_info.out_indices, self.channels, strict=True)
            self.norms.update({str(stage): nn.LayerNorm(c) for stage, c in stages})
        self.in_patches = in_patches(plain)
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        if not plain.startswith(PROVEN):
            self._check_maps(name, strides)
        self._freeze(name)

    @torch.no_grad()
    def _check_maps(self, name: str, strides: tuple[int, ...]) -> None:
        """`UserError` for a network of fixed image size, or one that trims its maps.

        timm says neither beforehand.
        """
        self.eval()
        try:
            sides = [level.shape[-1] for level in self(torch.zeros(1, 3, TRIAL, TRIAL))]
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"backbone {name!r} does not take images of any size, as a detector must; of "
                f"{TRIAL} pixels it says: {reason}; choose another timm model"
            ) from None
        if sides != [TRIAL // stride for stride in strides]:
            raise UserError(
                f"backbone {name!r} makes maps of {sides} cells from {TRIAL} pixels, where strides "
                f"of {strides} make {[TRIAL // stride for stride in strides]}; choose another timm "
                f"model"
            )
        self.train()

    def _freeze(self, name: str) -> None:
        if self.caffe and self.norm_eval:
            for module in self.modules():
                if isinstance(module, BATCH_NORMS):
                    module.requires_grad_(False)
        if self.frozen_stages == 0:
            return
        limit = 4 * 2 ** (self.frozen_stages - 1)
        infos = self.body.feature_info.info
        ends = [info["module"] for info in infos if info["reduction"] <= limit]
        if ends:
            for module in self._until(ends[-1], name):
                module.requires_grad_(False)

    def _until(self, end: str, name: str) -> list[nn.Module]:
        """All that stands before and in the module `end`, e.g. "layer1" or "blocks.1"."""
        first, _, index = end.partition(".")
        found: list[nn.Module] = []
        for part, child in self.body.named_children():
            if part == first and index:
                return [*found, *list(child.children())[: int(index) + 1]]
            found.append(child)
            if part == end.replace(".", "_"):  # timm flattens some containers
                return found
        raise UserError(
            f"frozen_stages={self.frozen_stages}: the stages of backbone {name!r} cannot be told "
            f"apart; use frozen_stages=0"
        )

    def train(self, mode: bool = True) -> Backbone:
        """As `nn.Module.train`, but BatchNorm stays on its stored statistics where asked to."""
        super().train(mode)
        if mode:
            for module in self.modules():
                frozen = all(not p.requires_grad for p in module.parameters(recurse=False))
                if isinstance(module, BATCH_NORMS) and (self.norm_eval or frozen):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) to the maps, fine to coarse, each (B, C, H/s, W/s)."""
        maps = cast(list[Tensor], self.body(pad_to_patches(images) if self.in_patches else images))
        if self.norms:
            maps = [norm(level) for norm, level in zip(self.norms.values(), maps, strict=True)]
        if self.channels_last:
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps]
        return [*maps[:-1], self.top(maps[-1])]


def _top(name: str, channels: list[int]) -> nn.Module:
    """MobileNetV2's last 1x1 convolution, which timm leaves out; its width replaces that of C5."""
    if not name.startswith("mobilenetv2"):
        raise UserError(f"only MobileNetV2 has the form of HEAD, {name!r} is none")
    narrow, channels[-1] = channels[-1], TOP_CHANNELS
    return ConvNormAct(narrow, TOP_CHANNELS, 1, act_layer=_leaky_relu)


def _leaky_relu(inplace: bool = False) -> nn.Module:
    return nn.LeakyReLU(LEAK, inplace)


def _create(
    name: str, pretrained: bool, base_channels: int, strides: tuple[int, ...], leaky: bool
) -> Any:
    if not timm.is_model(name):
        raise unknown_model(name, close_models(name))
    if base_channels != 64:
        return _narrow_resnet(name, pretrained, base_channels, strides)
    options = {"act_layer": _leaky_relu} if leaky else swin_options(name)
    try:
        levels: Any = timm.create_model(name, features_only=True, pretrained=False).feature_info
        wanted = [i for i, r in enumerate(levels.reduction()) if r in strides]
        create = pretrained_model if pretrained else timm.create_model
        name += TORCHVISION if pretrained and name in PLAIN_RESNETS else ""
        return create(name, features_only=True, out_indices=tuple(wanted), **options)
    except RuntimeError as error:
        raise UserError(
            f"backbone {name!r} cannot be built with pretrained={pretrained}: "
            f"{' '.join(str(error).split())[:200]}; give the file of {name}'s weights as "
            f"backbone_weights, or use pretrained=False"
        ) from None


def close_models(name: str) -> list[str]:
    """Those of timm's names that hold an unknown one, else those that resemble it."""
    known = timm.list_models()
    return [k for k in known if name in k] or difflib.get_close_matches(name, known)


def unknown_model(name: str, close: list[str]) -> UserError:
    """What is said of a name that timm does not know."""
    hint = f"; did you mean {', '.join(close[:3])}?" if close else "; see timm.list_models()"
    return UserError(f"timm knows no backbone {name!r}{hint}")


def _stride_first(body: Any, name: str, pretrained: bool) -> None:
    """Moves the stride of each stage from the 3x3 convolution to the 1x1 before it."""
    if pretrained:
        raise UserError(
            f"timm has no pretrained weights for the caffe-style {name}; use the name without "
            f"{CAFFE!r}, or load a checkpoint"
        )
    if not hasattr(body, "layer4"):
        raise UserError(f"only ResNets have a caffe-style form, {name!r} is none")
    for module in body.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def _narrow_resnet(
    name: str, pretrained: bool, base_channels: int, strides: tuple[int, ...]
) -> Any:
    """A ResNet whose stem and stages are base_channels/64 as wide."""
    if name not in PLAIN_RESNETS:
        raise UserError(
            f"base_channels={base_channels} narrows {', '.join(PLAIN_RESNETS)} only; instead of "
            f"{name!r} choose a smaller timm model by name"
        )
    if pretrained:
        raise UserError(f"there are no pretrained weights for base_channels={base_channels}")
    widths = tuple(width * base_channels // 64 for width in RESNET_WIDTHS)
    wanted = tuple(i for i in range(5) if 2 ** (i + 1) in strides)
    body = timm.create_model(name, features_only=True, channels=widths, out_indices=wanted)
    _narrow_stem(body, base_channels)
    return body


def _narrow_stem(body: Any, width: int) -> None:
    """Narrows the plain 7x7 stem, which timm always makes 64 wide."""
    body.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    body.bn1 = nn.BatchNorm2d(width)
    first = body.layer1[0]
    old = first.conv1
    first.conv1 = nn.Conv2d(
        width, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
    )
    out = body.layer1[-1].conv2 if not hasattr(first, "conv3") else body.layer1[-1].conv3
    if out.out_channels == width:
        first.downsample = None
    else:
        first.downsample = nn.Sequential(
            nn.Conv2d(width, out.out_channels, 1, bias=False), nn.BatchNorm2d(out.out_channels)
        )
    for module in (body.conv1, first.conv1, first.downsample):
        for conv in [] if module is None else module.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

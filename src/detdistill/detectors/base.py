"""What every detector of ours shares: a backbone and a pyramid, and the facts that travel along."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from detdistill.detectors.inference import eval_mode, predict_image
from detdistill.errors import UserError
from detdistill.parts.backbones import STRIDES, Backbone
from detdistill.parts.fpn import FPN, ExtraFrom, PooledFPN
from detdistill.structures import (
    Assignment,
    Batch,
    DenseOutput,
    Detections,
    Pyramid,
    Targets,
    TwoStageAssignment,
)

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, 0..255, as timm and MMDetection
IMAGENET_STD = (58.395, 57.12, 57.375)


class FPNDetector(nn.Module):
    """Backbone and FPN; a subclass adds what stands on the pyramid.

    Its stages follow each other: `normalize`, `pyramid`, `head`, then `assign` and `loss`, or
    `detect`.

    Args:
        backbone: a timm model name.
        num_classes: K.
        pretrained: ImageNet weights for the backbone.
        base_channels: width of a ResNet's first stage; 64 is full.
        frozen_stages: backbone stages without training.
        norm_eval: BatchNorm on stored statistics while training.
        fpn_channels: channels of the pyramid.
        fpn_extra: where the two coarse levels P6 and P7 start; "pool" makes a pyramid of P2..P6,
            the last by pooling.
        fpn_group_norm: GroupNorm in the pyramid.
    """

    family: str
    loss_weights: Mapping[str, float]
    caffe_mean = IMAGENET_MEAN  # RGB here, although caffe-style networks take BGR
    suffixes: tuple[str, ...] = ()  # of listed names, beside none
    relu_before_extra = False  # between the coarse levels of the pyramid
    strides: tuple[int, ...]
    cut: tuple[list[int], int] | None = None  # the labels that stayed, of how many (see `classes`)
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: str,
        num_classes: int,
        pretrained: bool,
        base_channels: int,
        frozen_stages: int,
        norm_eval: bool,
        fpn_channels: int,
        fpn_extra: ExtraFrom | Literal["pool"],
        fpn_group_norm: bool = False,
    ) -> None:
        """Builds backbone and pyramid."""
        super().__init__()
        if not hasattr(num_classes, "__index__") or num_classes < 1:  # NumPy's fit, too
            raise UserError(f"num_classes is {num_classes!r}; expected a whole number from 1 on")
        self.name = f"{self.family}_{backbone}"
        self.num_classes = int(num_classes)
        self.options: dict[str, Any] = {}  # what `create_detector` was given, for model.json
        self.classes: list[str] | None = None
        self.input_size: tuple[int, int] | None = None  # (short, long) that `predict` resizes to
        self.backbone = Backbone(
            backbone,
            pretrained=pretrained,
            base_channels=base_channels,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            strides=(4, *STRIDES) if fpn_extra == "pool" else STRIDES,
        )
        channels = self.backbone.channels
        self.fpn: FPN | PooledFPN
        if fpn_extra == "pool":
            self.fpn = PooledFPN(channels, fpn_channels)
        else:
            self.fpn = FPN(
                channels, fpn_channels, fpn_extra, self.relu_before_extra, fpn_group_norm
            )
        self.strides = self.fpn.strides
        own = self.caffe_mean, (1.0, 1.0, 1.0)
        mean, std = own if self.backbone.caffe else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("pixel_mean", torch.tensor(mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std), persistent=False)

    def normalize(self, batch: Batch) -> Tensor:
        """Images to float32 (B, 3, H, W), RGB or, caffe-style, BGR; padding is 0 afterwards."""
        return blank_padding(self.own_pixels(batch.images), batch.sizes)

    def own_pixels(self, images: Tensor) -> Tensor:
        """RGB, 0..255, to float32 on the model's scale and in its channel order, padding too."""
        mean, std = self.pixel_mean[:, None, None], self.pixel_std[:, None, None]
        images = images.to(torch.float32, copy=True).sub_(mean).div_(std)  # 20 x as fast in place
        return images.flip(1) if self.backbone.caffe else images

    def pyramid(self, images: Tensor) -> Pyramid:
        """Normalised images (B, 3, H, W) to the maps of the pyramid."""
        return self.fpn(self.backbone(images))  # type: ignore[no-any-return]

    @property
    def pyramid_channels(self) -> int:
        """C of every pyramid level."""
        return self.fpn.channels

    @property
    def assignment_key(self) -> tuple[object, ...]:
        """Equal for detectors whose `assign` gives equal results on equal pyramids."""
        raise NotImplementedError

    def head(self, pyramid: Pyramid, *, keep_pre_activation: bool = False) -> DenseOutput:
        """What is predicted at every location of the pyramid."""
        raise NotImplementedError

    def assign(self, output: DenseOutput, targets: Targets) -> Assignment | TwoStageAssignment:
        """Who learns what, in the record of the kind of the detector."""
        raise NotImplementedError

    def loss(
        self, output: DenseOutput, targets: Targets, assignment: Any = None
    ) -> dict[str, Tensor]:
        """Weighted terms `task/...`; an assignment made before is reused."""
        raise NotImplementedError

    def detect(
        self,
        output: DenseOutput,
        sizes: Sequence[tuple[int, int]],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Final boxes of each image, in pixels of the batch, best first."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> DenseOutput:
        """All stages up to the predictions."""
        return self.head(self.pyramid(self.normalize(batch)))

    @torch.no_grad()
    def predict(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Detections of images of any sizes, in pixels of each image as given.

        Images are RGB (3, h, w), uint8 or float on the 0..255 scale, resized to the size the
        detector was trained at when it knows one. The detector is left in the mode it was in.
        """
        with eval_mode(self):
            return [predict_image(self, i, score_threshold, max_detections) for i in images]

    def weighted(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Multiplies each raw term by its weight and names it `task/...`."""
        return {f"task/{name}": value * self.loss_weights[name] for name, value in terms.items()}

    def head_only(self) -> Self:
        """A trainable copy without backbone and pyramid, to stand on another detector's pyramid."""
        body = {name: self._modules.pop(name) for name in ("backbone", "fpn")}
        assistant = copy.deepcopy(self)
        self._modules.update(body)
        return assistant.requires_grad_(True)


def blank_padding(images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Sets (B, 3, H, W) to 0, in place, beyond each image's own (h, w)."""
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return images

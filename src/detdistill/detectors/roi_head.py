"""The second stage of two-stage detectors: what stands in a box, and where exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torchvision.ops import roi_align

from detdistill.boxes import area, clip_xyxy
from detdistill.detectors.inference import best_boxes
from detdistill.parts.assigners import assign_max_iou, take_matches
from detdistill.parts.coders import deltas_to_xyxy, xyxy_to_deltas
from detdistill.parts.heads import with_outputs
from detdistill.parts.losses import Reduce, mean_over_processes
from detdistill.parts.samplers import sample_balanced
from detdistill.structures import (
    GROUND_TRUTH,
    Detections,
    Proposals,
    Pyramid,
    RoIOutput,
    Targets,
)

LEVELS = 4
FINEST_SCALE = 56  # pixels; a box twice as large is pooled one level coarser
POOLED = 7
POSITIVE_FRACTION = 0.25
NMS_THRESHOLD = 0.5
Samples = Annotated[int, Ge(4)]
"""Proposals of an image; fewer leave no room for a positive."""


class RoIHead(nn.Module):
    """Two shared fully connected layers on pooled boxes, then classes and deltas.

    It fits any pyramid of its width: boxes are pooled from the first four levels that it is given.

    Args:
        num_classes: K.
        in_channels: of the pyramid.
        channels: width of the shared layers.
        class_agnostic: all classes share their deltas.
        samples: proposals of an image that learn, at most.
        iou_threshold: IoU with a ground-truth box from which a proposal learns it.
        delta_scales: what a predicted delta of 1 means.
        box_beta: where the smooth L1 loss of the deltas turns linear; 0 is L1.
        reduce: whether the normaliser is averaged over processes ("global") or not ("local").
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int,
        channels: int = 1024,
        class_agnostic: bool = False,
        samples: int = 512,
        iou_threshold: float = 0.5,
        delta_scales: Sequence[float] = (0.1, 0.1, 0.2, 0.2),
        box_beta: float = 0.0,
        reduce: Reduce = "local",
    ) -> None:
        """Weights start as published."""
        super().__init__()
        self.num_classes, self.class_agnostic = num_classes, class_agnostic
        self.samples = samples
        self.iou_threshold, self.box_beta, self.reduce = iou_threshold, box_beta, reduce
        self.delta_scales = tuple(delta_scales)
        self.shared = nn.ModuleList(
            [nn.Linear(in_channels * POOLED**2, channels), nn.Linear(channels, channels)]
        )
        self.logits: nn.Linear | KeptClasses = nn.Linear(channels, num_classes + 1)
        self.deltas = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes)
        for layer in self.shared:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        for layer in (*self.shared, self.logits, self.deltas):
            nn.init.zeros_(layer.bias)

    def keep_classes(self, kept: list[int]) -> None:
        """Leaves all classes out but these labels of 0..K-1 (see `classes.keep_classes`)."""
        self.logits = KeptClasses(self.logits, kept, self.num_classes)
        if not self.class_agnostic:
            rows = [4 * label + side for label in kept for side in range(4)]
            self.deltas = with_outputs(self.deltas, rows)
        self.num_classes = len(kept)

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> Proposals:
        """`sample_proposals` with this head's classes, `samples` and IoU; ground truth joins."""
        return sample_proposals(
            proposals,
            targets,
            self.num_classes,
            samples=self.samples,
            iou_threshold=self.iou_threshold,
        )

    def roi(self, pyramid: Pyramid, proposals: Proposals) -> RoIOutput:
        """Pools each box and classifies it; the gradient flows into the pyramid, not the boxes."""
        maps = self.shared_features(self.pool(pyramid, proposals))
        return RoIOutput(maps, self.logits(maps[-1]), self.deltas(maps[-1]))

    def shared_features(self, pooled: Tensor) -> list[Tensor]:
        """(R, C) after the activation of each shared layer, of pooled boxes (R, C, 7, 7)."""
        features, maps = pooled.flatten(1), []
        for layer in self.shared:
            features = F.relu(layer(features))
            maps.append(features)
        return maps

    def pool(self, pyramid: Pyramid, proposals: Proposals) -> Tensor:
        """`pool_boxes`: (R, C, 7, 7) float32."""
        return pool_boxes(pyramid, proposals)

    def decode(self, deltas: Tensor, boxes_xyxy: Tensor) -> Tensor:
        """Deltas (..., 4) on proposals (..., 4) to boxes (..., 4); float32."""
        return deltas_to_xyxy(deltas.float() * boxes_xyxy.new_tensor(self.delta_scales), boxes_xyxy)

    def loss(self, output: RoIOutput, proposals: Proposals) -> dict[str, Tensor]:
        """Raw terms of sampled proposals, both over their number: `cls`, `box` (L1 on deltas)."""
        assert proposals.labels is not None and proposals.matched_boxes is not None
        labels, boxes = torch.cat(proposals.labels), torch.cat(proposals.boxes_xyxy)
        number = mean_over_processes(boxes.new_tensor(len(boxes)), self.reduce, at_least=1)
        cls = F.cross_entropy(output.logits.float(), labels, reduction="sum")
        [rows] = (labels < self.num_classes).nonzero(as_tuple=True)
        found = self.deltas_of(output.boxes, rows, labels[rows])
        wanted = xyxy_to_deltas(torch.cat(proposals.matched_boxes)[rows], boxes[rows])
        wanted = wanted / wanted.new_tensor(self.delta_scales)
        box = F.smooth_l1_loss(found, wanted, reduction="sum", beta=self.box_beta)
        return {"cls": cls / number, "box": (box + output.boxes.float().sum() * 0) / number}

    def deltas_of(self, deltas: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        """(M, 4) float32 of M pairs of RoI and class."""
        if self.class_agnostic:
            return deltas[rows].float()
        return deltas.reshape(len(deltas), self.num_classes, 4)[rows, classes].float()

    @torch.no_grad()
    def refine(
        self, output: RoIOutput, proposals: Proposals, sizes: Sequence[tuple[int, int]]
    ) -> Proposals:
        """The proposals moved to where their deltas say, for the next stage of a cascade.

        Ground truth among them is dropped: sampling adds it again. Needs class-agnostic deltas.
        """
        counts = [len(boxes) for boxes in proposals.boxes_xyxy]
        moved = []
        for boxes, deltas, truth, size in zip(
            proposals.boxes_xyxy,
            torch.split(output.boxes, counts),
            proposals.from_truth,
            sizes,
            strict=True,
        ):
            moved.append(clip_xyxy(self.decode(deltas, boxes), size)[~truth])
        own = [~truth for truth in proposals.from_truth]
        scores = [s[keep] for s, keep in zip(proposals.scores, own, strict=True)]
        return Proposals(
            moved, scores, [o[keep] for o, keep in zip(proposals.origin, own, strict=True)]
        )

    @torch.no_grad()
    def detect(
        self,
        output: RoIOutput,
        proposals: Proposals,
        sizes: Sequence[tuple[int, int]],
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Every class of every box above the threshold, decoded, clipped, class-wise NMS."""
        counts = [len(boxes) for boxes in proposals.boxes_xyxy]
        found = []
        for boxes, logits, deltas, size in zip(
            proposals.boxes_xyxy,
            torch.split(output.logits, counts),
            torch.split(output.boxes, counts),
            sizes,
            strict=True,
        ):
            scores = logits.float().softmax(-1)[:, :-1]
            rows, classes = (scores > score_threshold).nonzero(as_tuple=True)
            decoded = self.decode(self.deltas_of(deltas, rows, classes), boxes[rows])
            found.append(
                best_boxes(
                    clip_xyxy(decoded, size),
                    scores[rows, classes],
                    classes,
                    NMS_THRESHOLD,
                    max_detections,
                )
            )
        return found


class KeptClasses(nn.Module):
    """A layer of logits with some of its classes; the others count as background.

    So the softmax over what is left gives the classes that stay the scores that they had.

    Args:
        layer: (R, C) to logits (R, K + 1), background last.
        kept: labels of 0..K-1.
        num_classes: K.
    """

    def __init__(self, layer: nn.Module, kept: list[int], num_classes: int) -> None:
        """The layer keeps its weights."""
        super().__init__()
        self.layer, self.kept = layer, kept
        self.others = [label for label in range(num_classes + 1) if label not in kept]

    def forward(self, features: Tensor) -> Tensor:
        """(R, C) to float32 logits (R, len(kept) + 1)."""
        return with_others_as_background(self.layer(features), self.kept, self.others)


def with_others_as_background(logits: Tensor, kept: Sequence[int], others: Sequence[int]) -> Tensor:
    """(R, N) to float32 (R, len(kept) + 1): `kept` as they are, then `others` as one."""
    logits = logits.float()
    background = logits[:, list(others)].logsumexp(1, keepdim=True)
    return torch.cat((logits[:, list(kept)], background), 1)


@torch.no_grad()
def sample_proposals(
    proposals: Proposals,
    targets: Targets,
    num_classes: int,
    *,
    samples: int,
    iou_threshold: float,
    add_truth: bool = True,
) -> Proposals:
    """A random `samples` proposals per image, a quarter of them positive at most, with labels.

    Args:
        proposals: the boxes to choose from.
        targets: ground truth of the batch.
        num_classes: K, the label of background.
        samples: of an image, at most.
        iou_threshold: IoU with a ground-truth box from which a proposal is positive.
        add_truth: the ground truth joins the proposals first.

    Returns:
        Of each image the positives, then the rest, both in the order given, ground truth first.
    """
    sampled = []
    for image, one in enumerate(
        zip(proposals.boxes_xyxy, proposals.scores, proposals.origin, strict=True)
    ):
        parts = _with_truth(*one, targets, image) if add_truth else one
        truth = Targets(
            targets.boxes[image, None], targets.labels[image, None], (targets.sizes[image],)
        )
        matched = _match(parts[0], truth, iou_threshold)
        positive, labels, wanted = take_matches(matched, truth, num_classes)
        taken = sample_balanced(
            positive, ~positive, count=samples, positive_fraction=POSITIVE_FRACTION
        )
        rows = torch.cat([(taken & part)[0].nonzero()[:, 0] for part in (positive, ~positive)])
        sampled.append((*(part[rows] for part in parts), labels[0, rows], wanted[0, rows]))
    return Proposals(*(list(part) for part in zip(*sampled, strict=True)))


def _with_truth(
    boxes: Tensor, scores: Tensor, origin: Tensor, targets: Targets, image: int
) -> tuple[Tensor, Tensor, Tensor]:
    [slots] = targets.present[image].nonzero(as_tuple=True)
    own = slots.new_full((len(slots), 4), GROUND_TRUTH)
    own[:, 3] = slots
    boxes = torch.cat((targets.boxes[image, slots], boxes))
    scores = torch.cat((scores.new_ones(len(slots)), scores))
    return boxes, scores, torch.cat((own, origin))


def _match(boxes: Tensor, truth: Targets, iou_threshold: float) -> Tensor:
    """(1, R) index of a box, or background, of boxes (R, 4) of one image."""
    return assign_max_iou(
        boxes[None],
        boxes.new_ones((1, len(boxes)), dtype=torch.bool),
        truth,
        positive=iou_threshold,
        negative=iou_threshold,
        forced=None,
    )


def pool_boxes(pyramid: Pyramid, proposals: Proposals) -> Tensor:
    """RoIAlign (arXiv 1703.06870) to (R, C, 7, 7) float32, from the level that suits a box."""
    rois = indexed_boxes(proposals)
    levels = pyramid.levels[:LEVELS]
    level_of_box = pooling_level(rois[:, 1:], len(levels))
    pooled, order = [], []
    for i, (level, stride) in enumerate(zip(levels, pyramid.strides[:LEVELS], strict=True)):
        rows = (level_of_box == i).nonzero()[:, 0]
        # Also without boxes, which ties every level to the loss.
        pooled.append(pool_level(level, stride, rois[rows]))
        order.append(rows)
    stacked = torch.cat(pooled)
    del pooled  # as large again as what it is stacked to
    return stacked[torch.cat(order).argsort()]


def indexed_boxes(proposals: Proposals) -> Tensor:
    """(R, 5) float32 of all images: the image of a box, and its corners."""
    boxes = torch.cat(proposals.boxes_xyxy)
    return torch.cat((proposals.image_index[:, None].to(boxes), boxes), 1)


def pool_level(
    level: Tensor, stride: int, rois: Tensor, size: Sequence[int] = (POOLED,) * 2
) -> Tensor:
    """RoIAlign of boxes (R, 5) on one level (B, C, H, W) to (R, C, *size) float32."""
    # No bfloat16 kernel on CPUs.
    pooled: Tensor = roi_align(level.float(), rois, list(size), 1 / stride, 0, aligned=True)
    return pooled


def pooling_level(boxes_xyxy: Tensor, levels: int) -> Tensor:
    """(R,) int64: FPN (arXiv 1612.03144) eq. 1, the finest level up to twice `FINEST_SCALE`."""
    scale = area(boxes_xyxy).sqrt() / FINEST_SCALE
    return (scale + 1e-6).log2().floor().clamp(0, levels - 1).long()

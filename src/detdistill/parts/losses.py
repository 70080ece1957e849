"""Loss terms. Each returns a sum over what its docstring names; the caller divides once."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from detdistill.boxes import elementwise_giou, elementwise_iou

Reduce = Literal["local", "global"]


def focal_loss_sum(
    logits: Tensor, labels: Tensor, weights: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002 eq. 5), summed over anchors and classes.

    The background form runs over everything and the few positives are corrected, which saves
    building a one-hot target as large as the logits.

    Args:
        logits: (B, P, K).
        labels: (B, P) int64, 0..K-1 for positives, anything else is background.
        weights: (B, P) factor of each anchor.
        alpha: weight of positives.
        gamma: focusing exponent.
    """
    total = (_background(logits, gamma).sum(-1) * weights).sum() * (1 - alpha)
    rows = ((labels >= 0) & (labels < logits.shape[-1])).nonzero(as_tuple=True)
    chosen = logits[(*rows, labels[rows])]
    positive = alpha * torch.sigmoid(-chosen).pow(gamma) * F.softplus(-chosen)
    correction = positive - (1 - alpha) * _background(chosen, gamma)
    return total + (correction * weights[rows]).sum()


def quality_focal_loss_sum(
    logits: Tensor, labels: Tensor, quality: Tensor, weights: Tensor, *, beta: float = 2.0
) -> Tensor:
    """Quality focal loss (GFL, arXiv 2006.04388 eq. 2), summed over anchors and classes.

    Args:
        logits: (B, P, K).
        labels: (B, P) int64, 0..K-1 for positives, anything else is background.
        quality: (B, P) target score of the positive's class, 0..1.
        weights: (B, P) factor of each anchor.
        beta: focusing exponent.
    """
    total = (_background(logits, beta).sum(-1) * weights).sum()
    rows = ((labels >= 0) & (labels < logits.shape[-1])).nonzero(as_tuple=True)
    chosen, target = logits[(*rows, labels[rows])], quality[rows]
    modulation = (target - chosen.sigmoid()).abs().pow(beta)
    positive = F.binary_cross_entropy_with_logits(chosen, target, reduction="none") * modulation
    return total + ((positive - _background(chosen, beta)) * weights[rows]).sum()


def _background(logits: Tensor, gamma: float) -> Tensor:
    return logits.sigmoid().pow(gamma) * F.softplus(logits)


def distribution_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Distribution focal loss (GFL eq. 6) of each distance.

    Args:
        logits: (M, R+1) over the bins.
        targets: (M,) distances in bins, 0 <= target < R.

    Returns:
        (M,) losses.
    """
    left = targets.long()
    log_probabilities = logits.log_softmax(-1)
    low = log_probabilities.gather(1, left[:, None])[:, 0]
    high = log_probabilities.gather(1, left[:, None] + 1)[:, 0]
    return -(low * (left + 1 - targets) + high * (targets - left))


def giou_loss(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """1 - GIoU (arXiv 1902.09630) of box i and target i: two (..., 4) to (...), 0..2."""
    return 1 - elementwise_giou(boxes_xyxy, targets_xyxy)


def log_iou_loss(boxes_xyxy: Tensor, targets_xyxy: Tensor) -> Tensor:
    """-log IoU (arXiv 1608.01471) of box i and target i: two (..., 4) to (...); IoU from 1e-6."""
    return -elementwise_iou(boxes_xyxy, targets_xyxy).clamp(min=1e-6).log()


def soft_target_focal_sum(logits: Tensor, targets: Tensor, weights: Tensor, beta: float) -> Tensor:
    """BCE towards soft scores, modulated by |score - target|^beta, summed over anchors and classes.

    Args:
        logits: (B, P, K).
        targets: (B, P, K) scores 0..1, without gradient.
        weights: (B, P) factor of each anchor.
        beta: exponent; the modulation carries gradient.
    """
    total: Tensor = _SoftTargetFocal.apply(logits, targets, weights, beta)
    return total


class _SoftTargetFocal(torch.autograd.Function):
    """Value and gradient in one go: the terms are as large as all logits, and memory is slow."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, beta: float) -> Tensor:
        score = logits.sigmoid()
        gap = score - targets
        size = gap.abs()
        bce = F.softplus(logits).sub_(targets * logits)
        # d|gap|^beta / dlogit = beta |gap|^(beta-1) sign(gap) score (1 - score)
        slope = score.mul_(1 - score).mul_(gap.sign()).mul_(bce)
        if beta != 1:
            slope.mul_(beta * size.pow(beta - 1))
            size.pow_(beta)
        total = (bce.mul_(size).sum(-1) * weights).sum()
        ctx.save_for_backward(slope.add_(gap.mul_(size)).mul_(weights[..., None]))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None, None


def distribution_kl(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(target || prediction) over the last dimension, times T^2: two (..., R+1) to (...)."""
    log_prediction = (logits / temperature).log_softmax(-1)
    log_target = (targets / temperature).log_softmax(-1)
    return (log_target.exp() * (log_target - log_prediction)).sum(-1) * temperature**2


def bernoulli_kl(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL(target || prediction) of each pair of scores, times T^2: two (...) logits to (...).

    Its gradient is that of the BCE towards the target's score.
    """
    logits, targets = logits / temperature, targets / temperature
    score = targets.sigmoid()
    present = score * (F.logsigmoid(targets) - F.logsigmoid(logits))
    absent = (1 - score) * (F.logsigmoid(-targets) - F.logsigmoid(-logits))
    return (present + absent) * temperature**2


def mean_over_processes(value: Tensor, reduce: Reduce, at_least: float = 0.0) -> Tensor:
    """A normaliser: the value itself, or its mean over all processes for `reduce="global"`.

    `at_least` bounds the sum over the processes, so that several processes give the loss of one;
    the published code bounds their mean.
    """
    if reduce == "local" or not dist.is_available() or not dist.is_initialized():
        return value.clamp(min=at_least)
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.clamp(min=at_least) / dist.get_world_size()

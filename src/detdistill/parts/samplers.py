"""Which anchors or proposals of an image learn at all."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_balanced(
    positive: Tensor, negative: Tensor, *, count: int, positive_fraction: float
) -> Tensor:
    """A random draw per image, as two-stage detectors train (arXiv 1506.01497 section 3.1.3).

    Positives fill at most their share; negatives fill the rest. Where there are no more than are
    wanted all are taken, whatever the random state.

    Args:
        positive: (B, P) bool.
        negative: (B, P) bool, disjoint.
        count: taken per image.
        positive_fraction: of them positives, at most.

    Returns:
        (B, P) bool.
    """
    keys = torch.rand(positive.shape, device=positive.device)
    share = int(count * positive_fraction)
    taken = _draw(positive, keys, share, share)
    rest = count - taken.sum(1, keepdim=True)
    return taken | _draw(negative, keys, rest, count)


def _draw(among: Tensor, keys: Tensor, wanted: Tensor | int, most: int) -> Tensor:
    """(B, P) bool: the `wanted`, or (B, 1), entries with the highest keys; never over `most`."""
    best, index = torch.where(among, keys, -1.0).topk(min(most, keys.shape[1]), 1)
    places = torch.arange(best.shape[1], device=keys.device)
    kept = (best >= 0) & (places < wanted)
    return torch.zeros_like(among).scatter(1, index, kept)

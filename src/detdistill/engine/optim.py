"""Optimiser and learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from detdistill.recipe import Recipe


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over everything that is trainable."""
    trainable = [p for p in parameters if p.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trainable, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        trainable, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def run_length(recipe: Recipe, batches_per_epoch: int) -> tuple[int, int]:
    """Optimisation steps of an epoch, and of the whole run."""
    steps_per_epoch = max(1, batches_per_epoch // recipe.accumulate)
    return steps_per_epoch, recipe.max_steps or recipe.epochs * steps_per_epoch


def learning_rate(recipe: Recipe, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The rate of a step (0-based): linear in the batch, linear warm-up, then the schedule.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    rate = recipe.lr * recipe.batch_size / recipe.base_batch
    if step < recipe.warmup_steps:
        rate *= recipe.warmup_start + (1 - recipe.warmup_start) * step / recipe.warmup_steps
    if recipe.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    passed = sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    return float(rate * 0.1**passed)

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


def run_length(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimisation steps of the whole run."""
    return recipe.max_steps or recipe.epochs * steps_per_epoch


Told = list[tuple[str, str]]
"""What was found, and what to do about it."""


def endless_warmup(recipe: Recipe, total_steps: int) -> Told:
    """Of a warm-up that is not over when the run is."""
    if recipe.warmup_steps < total_steps:
        return []
    found = f"warmup_steps {recipe.warmup_steps} in a run of {total_steps}"
    return [(f"{found}: the learning rate is never reached", shorter_warmup(total_steps))]


def shorter_warmup(total_steps: int) -> str:
    """What to do about a warm-up that takes too much of the run."""
    return f"--set warmup_steps={max(1, total_steps // 20)}, or a longer run"


def milestones_beyond(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> Told:
    """Of milestones that the run does not reach."""
    beyond = [epoch for epoch in recipe.milestones if epoch * steps_per_epoch >= total_steps]
    if not beyond or recipe.schedule != "step":
        return []
    found = f"milestones {beyond}, which are epochs, lie beyond the end of the run"
    epochs = total_steps / steps_per_epoch
    usual = sorted({int(epochs * 2 / 3), int(epochs * 11 / 12)} - {0})
    advice = f"--set milestones={usual}, or a longer run" if usual else "--set schedule=cosine"
    return [(f"{found}: lr is never lowered there", advice)]


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

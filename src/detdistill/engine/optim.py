"""Optimiser and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from detdistill.parts.backbones import BATCH_NORMS
from detdistill.recipe import Recipe

NORMS = (*BATCH_NORMS, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over everything that is trainable; `set_rate` sets the rates of its groups.

    A bias is every parameter of that name, a method's own ones included. Its decay is
    `bias_weight_decay`; its rate is `bias_lr_factor` times the others', in layers that do not
    normalise. So MMEngine 0.4 and later read `bias_decay_mult` and `bias_lr_mult`; their
    documentation, and MMCV before them, leave the biases of normalisation out of both. What they
    exempt besides, the layer that makes the offsets of a deformable convolution, no detector has
    here.
    """
    groups = _groups(model, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """By factor of the rate and decay, each in the model's order: one where biases are as all."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decay = 1.0, recipe.weight_decay
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            decay = decay if recipe.bias_weight_decay is None else recipe.bias_weight_decay
            if not isinstance(model.get_submodule(layer), NORMS):
                factor = recipe.bias_lr_factor
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group: `rate` times its own factor."""
    for group in optimizer.param_groups:
        # A checkpoint from before there were factors restores its one group without.
        group["lr"] = rate * group.get("lr_factor", 1.0)


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
    """The rate of a step (0-based): linear in the batch, the warm-up, then the schedule.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    rate = recipe.lr * recipe.batch_size / recipe.base_batch
    if step < recipe.warmup_steps:
        risen = step if recipe.warmup == "linear" else 0
        rate *= recipe.warmup_start + (1 - recipe.warmup_start) * risen / recipe.warmup_steps
    if recipe.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    passed = sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    return float(rate * 0.1**passed)

"""Whether the recipe's learning rate, length and warm-ups suit each other and the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detdistill.data.transforms import out_of_reach
from detdistill.detectors import FPNDetector
from detdistill.distill.schedule import NamedSchedule
from detdistill.doctor.finding import Finding, counted
from detdistill.engine.optim import endless_warmup, milestones_beyond, shorter_warmup
from detdistill.recipe import Recipe

LONG_WARMUP = 0.1
"""Share of the run beyond which a warm-up is worth a word."""

FULL_WIDTH = 64
"""`base_channels` of the ResNets that ImageNet weights are for."""

ADAMW_LARGEST = 0.002
"""Learning rate beyond which AdamW seldom converges; ten times what detectors are trained with."""


def check_recipe(
    recipe: Recipe, images: int, steps_per_epoch: int, total_steps: int
) -> list[Finding]:
    """The optimiser's settings.

    Args:
        recipe: the settings.
        images: of the training split.
        steps_per_epoch: optimisation steps.
        total_steps: of the run.
    """
    beyond = milestones_beyond(recipe, steps_per_epoch, total_steps)
    wrong = out_of_reach(recipe)
    return [
        *([] if wrong is None else [Finding("problem", *wrong)]),
        _check_rate(recipe),
        _check_length(recipe, images, steps_per_epoch, total_steps),
        *_check_batch(recipe, images),
        *_check_warmup(recipe, total_steps),
        *(Finding("warning", *told) for told in beyond),
    ]


def scaled_rate(recipe: Recipe) -> float:
    """The highest rate of the run, linear in the batch; `bias_lr_factor` aside."""
    return recipe.lr * recipe.batch_size / recipe.base_batch


def _check_rate(recipe: Recipe) -> Finding:
    rate = scaled_rate(recipe)
    text = (
        f"lr {recipe.lr:g} x batch {recipe.batch_size} / {recipe.base_batch} = {rate:g}, "
        f"{recipe.optimizer}, {recipe.schedule} schedule"
    )
    if recipe.optimizer == "adamw" and rate > ADAMW_LARGEST:
        return Finding("warning", f"{text}: much for adamw", "--set lr=0.0001, or optimizer=sgd")
    return Finding("ok", text)


def _check_length(recipe: Recipe, images: int, steps_per_epoch: int, total_steps: int) -> Finding:
    seen = total_steps * recipe.batch_size / images
    text = (
        f"{counted(total_steps, 'step')} of {recipe.batch_size} images, {steps_per_epoch} an "
        f"epoch: each of the {images} training images is seen {seen:.1f} times"
    )
    if seen < 1:
        advice = "more epochs, or a larger max_steps; as it is this is a trial of the machinery"
        return Finding("warning", text, advice)
    return Finding("ok", text)


def _check_batch(recipe: Recipe, images: int) -> list[Finding]:
    if recipe.batch_size <= images:
        return []
    text = f"the batch of {recipe.batch_size} is filled up: there are {images} training images"
    largest = max(1, images // 2)
    return [Finding("warning", text, f"--set batch_size={largest}, or more images")]


def _check_warmup(recipe: Recipe, total_steps: int) -> list[Finding]:
    endless = [Finding("problem", *told) for told in endless_warmup(recipe, total_steps)]
    if endless:
        return endless
    share = recipe.warmup_steps / total_steps
    text = f"warm-up of {counted(recipe.warmup_steps, 'step')}, {share:.0%} of the run"
    if share > LONG_WARMUP:
        return [Finding("warning", text, shorter_warmup(total_steps))]
    return [Finding("ok", text)]


def check_start(student: FPNDetector, recipe: Recipe) -> list[Finding]:
    """Whether the student's backbone starts from scratch where it need not."""
    options = student.options
    given = options.get("pretrained") or recipe.student_options.get("backbone_weights")
    if given or options.get("base_channels", FULL_WIDTH) != FULL_WIDTH:
        return []
    text = "the student's backbone starts from random weights, which takes much data and time"
    advice = (
        "--set student_options.pretrained=true (ImageNet, a download), or backbone_weights with a "
        "local file"
    )
    return [Finding("note", text, advice)]


def check_schedules(schedules: Sequence[NamedSchedule], total_steps: int) -> list[Finding]:
    """The methods' own starts and warm-ups (HEAD's is 2000 steps) against the length of the run."""
    findings = []
    for name, options, schedule in schedules:
        prefix = f"--set {options}"
        if schedule.start >= total_steps:
            text = f"{name} starts at step {schedule.start}, the run has {total_steps}: never"
            findings.append(Finding("problem", text, f"{prefix}start=0, or a longer run"))
            continue
        end = schedule.start + schedule.warmup
        advice = f"{prefix}warmup={max(1, total_steps // 20)}, or a longer run"
        if schedule.warmup and end >= total_steps:
            reached = (total_steps - schedule.start) / schedule.warmup
            text = (
                f"{name} warms up over {schedule.warmup} steps, longer than the run: its weights "
                f"reach {reached:.0%}"
            )
            findings.append(Finding("problem", text, advice))
        elif schedule.warmup > LONG_WARMUP * total_steps:
            share = schedule.warmup / total_steps
            text = f"{name} warms up over {schedule.warmup} steps, {share:.0%} of the run"
            findings.append(Finding("warning", text, advice))
    return findings


def recipe_numbers(recipe: Recipe, steps_per_epoch: int, total_steps: int) -> dict[str, Any]:
    """For the JSON file."""
    return {
        "lr": scaled_rate(recipe),
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "warmup_share": recipe.warmup_steps / total_steps,
    }

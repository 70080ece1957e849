"""What would show only late in a run or a study, looked at before it begins."""

from __future__ import annotations

import warnings
from functools import partial

from detdistill.data import DetectionDataset
from detdistill.data.splits import decode_images
from detdistill.data.transforms import out_of_reach
from detdistill.engine.optim import endless_warmup, milestones_beyond
from detdistill.errors import UserError, UserNotice
from detdistill.progress import Counts
from detdistill.recipe import Recipe


def look_ahead(
    recipe: Recipe,
    steps_per_epoch: int,
    total_steps: int,
    train: DetectionDataset,
    *measured: DetectionDataset,
) -> None:
    """Tells of a schedule that cannot be followed, and of images both trained and measured on.

    Decodes all images that will be measured on.

    Raises:
        UserError: for sizes that no image can have, and the first image that is broken.
    """
    if wrong := out_of_reach(recipe):
        raise UserError("; ".join(wrong))
    if recipe.max_steps is None:  # else a trial, which need not learn
        told = endless_warmup(recipe, total_steps)
        told += milestones_beyond(recipe, steps_per_epoch, total_steps)
        for text, advice in told:
            warnings.warn(f"{text}; {advice}", UserNotice, stacklevel=2)
    learned = {record.path for record in train.records}  # `doctor` compares their bytes, too
    for dataset in measured:
        shared = sum(record.path in learned for record in dataset.records)
        if shared:
            text = (
                f"{shared} of {len(dataset)} {dataset.split} images are training images, too, so "
                f"AP on {dataset.split} says little; keep them apart, see detdistill data split"
            )
            warnings.warn(text, UserNotice, stacklevel=2)
    names = " and ".join(dataset.split for dataset in measured)
    with Counts() as counts:
        decode_images(measured, partial(counts.update, f"{names} images checked"))

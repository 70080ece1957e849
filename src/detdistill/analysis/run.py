"""Shows every image to both models, once, and lets each measure add it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from detdistill.analysis.conflict import Conflict
from detdistill.analysis.imitation import Imitation
from detdistill.analysis.pair import Pair, Sample
from detdistill.analysis.ranks import Ranks
from detdistill.analysis.similarity import Similarity
from detdistill.data import DetectionDataset, make_eval_batches
from detdistill.distill.assistants import DenseAssistant, RoIAssistant
from detdistill.evaluation.run import category_ids_of
from detdistill.recipe import Recipe
from detdistill.structures import IGNORE, Batch, Targets

EXAMPLES = 3  # per part


@dataclass
class Findings:
    """What was measured on a pair.

    Attributes:
        pair: the models.
        similarity: always there; the other three are None where `left_out` says why.
        left_out: a sentence by the name of the part.
        images, objects: how many were seen.
    """

    pair: Pair
    similarity: Similarity
    conflict: Conflict | None = None
    ranks: Ranks | None = None
    imitation: Imitation | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    images: int = 0
    objects: int = 0

    def add(self, sample: Sample) -> None:
        """Adds one image to every part."""
        self.images += 1
        self.objects += len(sample.areas)
        for part in (self.conflict, self.ranks, self.imitation, self.similarity):
            if part is not None:
                part.add(sample)

    def numbers(self) -> dict[str, Any]:
        """For the JSON file; a part that was left out is null."""
        parts = {
            "conflict": self.conflict,
            "ranks": self.ranks,
            "imitation": self.imitation,
            "similarity": self.similarity,
        }
        return {
            "images": self.images,
            "objects": self.objects,
            **{name: part and part.numbers() for name, part in parts.items()},
            "left_out": self.left_out,
        }


def analyze(
    pair: Pair,
    dataset: DetectionDataset,
    recipe: Recipe,
    *,
    images: int | None = None,
    examples: int = EXAMPLES,
    assistant: DenseAssistant | RoIAssistant | None = None,
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Measures what teacher and student disagree on.

    Args:
        pair: a trained teacher and a trained student, on one device.
        dataset: an opened split.
        recipe: its resize settings and `workers` are used, no augmentation.
        images: at most so many, evenly spread over the split; None takes all.
        examples: images or objects to keep per part, to be drawn.
        assistant: that HEAD trained for the student (see `load_assistant`).
        progress: called after each image with 1.

    Returns:
        The numbers, and what is needed to draw them. Memory does not grow with the split but for a
        few numbers per object.

    Raises:
        UserError: when the data's classes are not the models'.
    """
    labels = _labels(pair, dataset)
    # One image at a time: memory stays bounded, and no number depends on what shares its batch.
    batches = make_eval_batches(dataset, recipe.model_copy(update={"eval_batch": 1}), most=images)
    findings = _empty(pair, len(batches), examples, Similarity(pair, assistant))
    for batch, (index,) in batches:
        findings.add(_sample(pair, batch, index, dataset, labels))
        if progress is not None:
            progress(1)
    return findings


def _empty(pair: Pair, images: int, examples: int, similarity: Similarity) -> Findings:
    reasons = {
        "conflict": Conflict.left_out(pair),
        "ranks": Ranks.left_out(pair),
        "imitation": Imitation.left_out(pair),
    }
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    return Findings(
        pair,
        similarity,
        conflict=None if "conflict" in left_out else Conflict(pair, examples),
        ranks=None if "ranks" in left_out else Ranks(pair, examples),
        imitation=None if "imitation" in left_out else Imitation(pair, images, examples),
        left_out=left_out,
    )


def _labels(pair: Pair, dataset: DetectionDataset) -> torch.Tensor:
    """(K,) the models' label of each label of the data set."""
    named = pair.student if pair.student.classes is not None else pair.teacher
    ids = category_ids_of(named, dataset)
    return torch.tensor([ids.index(number) for number in dataset.category_ids])


def _sample(
    pair: Pair, batch: Batch, index: int, dataset: DetectionDataset, labels: torch.Tensor
) -> Sample:
    (height, width), record = batch.sizes[0], dataset.records[index]
    targets = batch.padded_targets()
    renamed = torch.where(targets.present, labels[targets.labels.clamp(min=0)], IGNORE)
    device = pair.student.pixel_mean.device
    teacher, student = pair.look(batch.to(device))
    return Sample(
        index,
        batch.images[0, :, :height, :width],
        Targets(targets.boxes, renamed, targets.sizes).to(device),
        record.areas[~record.crowd],
        teacher,
        student,
    )

"""RM, rank mimicking (Li et al., arXiv 2112.04840, AAAI 2022).

Among the candidate boxes of one object the teacher scores some anchors higher than others. RM
teaches the student this order: a softmax over an object's candidates, not over classes.

The paper's body was not at hand. The formula is reconstructed from third-party implementations;
where they disagree there is an option, and the default is our choice.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from annotated_types import Gt
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.distill.adapters import check_same_anchors, check_same_classes, require_dense
from detdistill.distill.method import METHODS, Method, Step
from detdistill.parts.losses import mean_over_processes
from detdistill.registry import check_choice, check_positive
from detdistill.structures import rows_of_maps

PADDED = torch.finfo(torch.float32).min
"""Score of no candidate: no share in a softmax, but finite, so that an empty row has a gradient."""


@METHODS.register("rm")
class RM(Method):
    """KL(teacher || student) between the distributions over each object's candidate anchors.

    Term: `rm/rank`, the mean over the objects. The score of a candidate is that of its object's
    class, without any quality branch. An object with fewer than two candidates has no rank: 0.

    Args:
        weight: factor of `rm/rank`.
        score: what the softmax runs over: scores after the sigmoid, or logits.
        align: candidates compared "anchor" by anchor, or each side "sorted" by score on its own,
            as one implementation does: which anchor is the best no longer counts.
        candidates: whose assignment says which anchors are an object's candidates.
        normalizer: the mean over the objects of the "batch", or over those of each "image", then
            over the images, where an image without any counts as 0.
        count: which objects the mean is over: the "ranked", which have at least two candidates, or
            "all", as in the implementation known to us, which has the normalizer "image".
        temperature: divides the scores; the loss is multiplied by its square.
    """

    def __init__(
        self,
        *,
        weight: float = 4.0,
        score: Literal["prob", "logit"] = "prob",
        align: Literal["anchor", "sorted"] = "anchor",
        candidates: Literal["teacher", "student"] = "teacher",
        normalizer: Literal["batch", "image"] = "batch",
        count: Literal["ranked", "all"] = "ranked",
        temperature: Annotated[float, Gt(0)] = 1.0,
    ) -> None:
        """The weight is that of the implementations; the paper's is unknown."""
        super().__init__()
        check_choice("rm: score", score, ("prob", "logit"))
        check_choice("rm: align", align, ("anchor", "sorted"))
        check_choice("rm: candidates", candidates, ("teacher", "student"))
        check_choice("rm: normalizer", normalizer, ("batch", "image"))
        check_choice("rm: count", count, ("ranked", "all"))
        check_positive("rm: temperature", temperature)
        self.weights = {"rank": weight}
        self.score, self.sort, self.temperature = score, align == "sorted", temperature
        self.candidates, self.per_image = candidates, normalizer == "image"
        self.count_all = count == "all"

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair."""
        teacher = require_dense(teacher, "rm", "teacher")
        student = require_dense(student, "rm", "student")
        check_same_classes(student, teacher, "rm")
        check_same_anchors(student, teacher, "rm")

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Raw term `rank`."""
        assert step.teacher is not None
        of_teacher = self.candidates == "teacher"
        assignment = step.teacher_assignment if of_teacher else step.dense_assignment
        image, row = assignment.positive.nonzero(as_tuple=True)
        label = assignment.labels[image, row]
        found, wanted = (
            self._scores(output.predictions.logits, image, row, label)
            for output in (step.student, step.teacher)
        )
        images, slots = step.targets.labels.shape
        owner = image * slots + assignment.matched[image, row]
        counts = owner.bincount(minlength=images * slots)
        tables = (candidate_table(scores, owner, counts) for scores in (found, wanted))
        divergence = rank_divergence(*tables, sort=self.sort).reshape(images, slots)
        divergence = divergence * self.temperature**2
        # An object with one candidate has nothing to rank: its divergence is 0.
        ranked = counts.reshape(images, slots) > 1
        counted = step.targets.present if self.count_all else ranked
        if self.per_image:
            return {"rank": (divergence.sum(1) / counted.sum(1).clamp(min=1)).mean()}
        model = step.teacher_model if of_teacher else step.student_model
        reduce = cast(DenseDetector, model).reduce  # `prepare` has made sure
        objects = mean_over_processes(counted.sum().float(), reduce, at_least=1)
        return {"rank": divergence.sum() / objects}

    def _scores(self, logits: list[Tensor], image: Tensor, row: Tensor, label: Tensor) -> Tensor:
        """(M,) scores of one class each at M anchors, over the temperature; float32."""
        chosen = rows_of_maps(logits, image, row).gather(1, label[:, None])[:, 0]
        return (chosen.sigmoid() if self.score == "prob" else chosen) / self.temperature


def candidate_table(scores: Tensor, owner: Tensor, counts: Tensor) -> Tensor:
    """Scores (M,) of candidates as a table (objects, T), `PADDED` beyond an object's candidates.

    Unlike a softmax by scattered sums and maxima this has a deterministic CUDA kernel.

    Args:
        scores: (M,) float32.
        owner: (M,) int64, 0..objects-1: whose candidate each is.
        counts: (objects,) int64 candidates of each object; T is the greatest.
    """
    order = owner.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(owner)
    place[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
    table = scores.new_full((len(counts), int(counts.max())), PADDED)
    return table.index_put((owner, place), scores)


def rank_divergence(student: Tensor, teacher: Tensor, *, sort: bool) -> Tensor:
    """KL(teacher || student) of the softmax over each object's candidates.

    Args:
        student: (objects, T) scores of the candidates, `PADDED` where there are none.
        teacher: (objects, T) scores of the same candidates.
        sort: compare an object's scores by their order, not by their anchors.

    Returns:
        (objects,) divergences; 0 with fewer than two candidates.
    """
    if sort:
        student, teacher = (table.sort(-1).values for table in (student, teacher))
    found, wanted = student.log_softmax(-1), teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)

"""What heads of unlike kinds, and HEAD's assistant between them, make of the same inputs.

HEAD (Wang et al., arXiv 2207.05345) argues that a student's own head cannot imitate one of another
kind, while an assistant of the teacher's kind on the student's pyramid can. A two-stage teacher's
head looks at boxes, so there all of them are shown the same ones: the student's best proposals.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from detdistill.analysis.pair import Pair, Place, Sample, tower_places
from detdistill.detectors import DenseDetector, FPNDetector
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.stages import RoIStages
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill import HEAD, create_method
from detdistill.distill.assistants import DenseAssistant, RoIAssistant
from detdistill.distill.projectors import gather_cells
from detdistill.engine.checkpoint import load_checkpoint
from detdistill.errors import UserError
from detdistill.recipe import read_yaml
from detdistill.structures import DenseOutput, Proposals, Pyramid

BOXES = 128  # per image
ASSISTANT = "assistant "
METHOD = "head"
Rows = dict[str, tuple[Tensor, Tensor]]  # by stage: teacher and student, (R, C) each


def load_assistant(run: Path, pair: Pair) -> DenseAssistant | RoIAssistant | None:
    """The assistant that HEAD trained for the pair's student.

    Args:
        run: the student's run folder, whose recipe and resume checkpoint are read.
        pair: the student of the run, and its teacher.

    Returns:
        The assistant, frozen; None where the folder is no run of HEAD, or not a whole one.

    Raises:
        UserError: when the assistant is not of the kind of this teacher's head.
    """
    recipe, checkpoint = run / "recipe.yaml", run / "last.ckpt"
    if not recipe.is_file() or not checkpoint.is_file():
        return None
    values = read_yaml(recipe)
    options = (values.get("methods") or {}).get(METHOD)
    state = None if options is None else load_checkpoint(checkpoint)
    if options is None or state is None:
        return None
    method = cast(HEAD, create_method(METHOD, **options))
    prefix = f"methods.{METHOD}."
    weights = {k.removeprefix(prefix): v for k, v in state["distiller"].items() if prefix in k}
    own = values.get("teacher")
    try:
        method.prepare(pair.student, pair.teacher if own else None)
        method.load_state_dict(weights)
    except (UserError, RuntimeError):
        advice = f"give the run's own teacher, {own}" if own else "give the run's own student"
        raise UserError(
            f"The assistant of {run} is not of the kind of {pair.teacher.name}'s head, or not of "
            f"this student's pyramid; {advice}."
        ) from None
    if not own and not _looks_at_the_same(pair.teacher, method.link.assistant):
        raise UserError(
            f"The assistant of {run} learned without a teacher and is an R-CNN head of two shared "
            f"layers, which {pair.teacher.name} has not; give a teacher such as a Faster R-CNN."
        )
    method.requires_grad_(False).eval().to(pair.student.pixel_mean.device)
    return method.link.assistant


def _looks_at_the_same(teacher: FPNDetector, assistant: DenseAssistant | RoIAssistant) -> bool:
    """Whether both are RoI heads of as many shared layers."""
    if not isinstance(teacher, RoIStages) or not isinstance(assistant, RoIAssistant):
        return False
    first = cast(RoIHead, cast(TwoStageDetector, teacher).roi_heads[0])
    return len(first.shared) == len(assistant.head(0).shared)


def assistant_places(
    assistant: DenseAssistant, sample: Sample
) -> tuple[dict[Place, Tensor], dict[Place, Tensor]]:
    """The towers of the teacher and of a dense assistant, under the same names."""
    found = assistant(sample.student.pyramid)
    teacher, student = (
        tower_places(output, prefix=ASSISTANT) for output in (sample.teacher.dense, found)
    )
    return teacher, student


@torch.no_grad()
def rows_on_boxes(pair: Pair, sample: Sample, assistant: RoIAssistant | None) -> Rows:
    """What a two-stage teacher, the student's own head and an assistant make of the same boxes.

    Of the student's own head it is the last shared layer, or of a dense one the end of its class
    tower in the cell that the box came from. Empty for a teacher of another kind.
    """
    if not isinstance(pair.teacher, RoIStages):
        return {}
    teacher, student = cast(TwoStageDetector, pair.teacher), pair.student
    output = sample.student.output or student.head(sample.student.pyramid)
    propose = cast("DenseDetector | TwoStageDetector", student).propose
    rois = propose(output, sample.targets.sizes, max_per_image=BOXES)
    if not len(rois.scores[0]):
        return {}
    taught = teacher.roi(sample.teacher.pyramid, rois).features[-1]
    rows = {"own head": (taught, _own_features(student, output, rois))}
    if assistant is not None:
        rows |= _assistant_rows(assistant, teacher, sample, rois)
    return rows


def _own_features(student: FPNDetector, output: DenseOutput, rois: Proposals) -> Tensor:
    if isinstance(student, TwoStageDetector):
        return student.roi(output.pyramid, rois).features[-1]
    ends = [maps[-1] for maps in output.towers["cls"]]
    return gather_cells(ends, rois.image_index, torch.cat(rois.origin))


def _assistant_rows(
    assistant: RoIAssistant, teacher: TwoStageDetector, sample: Sample, rois: Proposals
) -> Rows:
    """Each shared layer of each stage; a later stage sees what the one before it moved."""
    own = sample.student.pyramid
    pyramid = Pyramid([assistant.adapter(level) for level in own], own.strides)
    rows: Rows = {}
    for stage in range(len(assistant.heads)):
        number = f"{stage + 1} " if len(assistant.heads) > 1 else ""
        found = assistant.head(stage).roi(pyramid, rois)
        taught = teacher.roi(sample.teacher.pyramid, rois, stage)
        for layer, pair in enumerate(zip(taught.features, found.features, strict=True), 1):
            rows[f"{ASSISTANT}{number}fc {layer}"] = pair
        if stage + 1 < len(assistant.heads):
            rois = assistant.head(stage).refine(found, rois, sample.targets.sizes)
    return rows

"""TF-HEAD, heterogeneous assistants without a teacher (arXiv 2207.05345 section on TF-HEAD).

Heads of other kinds learn beside the student's own, on its pyramid and from the ground truth alone;
the student's head learns from their features as they come to be. All gradients of the assistants'
own losses reach the student's pyramid; the distillation reaches the student alone.

Only results are published. The settings for RetinaNet and FCOS students are those of the authors'
development configurations.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal, cast, get_args

from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.roi_head import Samples
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill.adapters import mean_square_of_levels, require_own_head, tower_maps
from detdistill.distill.assistants import (
    AssistedMethod,
    DenseAssistant,
    RoIAssistant,
    fresh_dense_head,
    fresh_roi_assistant,
    prefixed,
)
from detdistill.distill.method import METHODS, Step
from detdistill.distill.projectors import (
    PROJECTORS,
    Projector,
    cell_projector,
    cross_kind_loss,
    shared_width,
)
from detdistill.errors import UserError
from detdistill.registry import AtLeastOne, Width, check_choice

Kind = Literal["fcos", "retinanet", "rcnn"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LOSS_WEIGHT = {"fcos": 0.5, "retinanet": 1.0, "rcnn": 1.0}
"""Of each of an assistant's own losses."""


@METHODS.register("tf_head")
class TFHEAD(AssistedMethod):
    """Assistants of other kinds that learn beside the student and teach it; no teacher.

    Terms: `tf_head/fcos_...`, `tf_head/retinanet_...`, `tf_head/rcnn_...`, the assistants' own
    losses; `tf_head/ckd_fcos`, `tf_head/ckd_retinanet`, the mean squared difference between the
    student's class tower and the assistant's (detached) on every level of a stride that both have;
    `tf_head/ckd_rcnn` that between the student's class tower where each box came from and the
    second shared layer.

    Without arguments FCOS and R-CNN assistants for RetinaNet; RetinaNet and R-CNN for FCOS (the
    mirror image); for a two-stage student, of which no configuration is known, RetinaNet and FCOS
    assistants that teach the RPN's shared layer, which is ours. All terms warm up over 2000 steps
    (`warmup`). The published early stop of CKD is `stop`: the first step at the lower rate, e.g.
    58640 for COCO's images with boxes at batch 16; assistants go on learning.

    Args:
        assistants: kinds, other than the student's own.
        ckd: distil into the student's head; False leaves assistants that only learn beside it.
        dense_weight: factor of `ckd_fcos` and `ckd_retinanet`.
        rcnn_weight: factor of `ckd_rcnn`.
        ckd_projector: "per_anchor" as in the development configurations, a projection for each
            anchor of a cell, or "single".
        assistant_warmup: the assistants' own losses warm up too.
        proposals: of the student, per image, of which at most `roi_samples` are drawn.
        roi_channels: width of the R-CNN assistant's shared layers.
        roi_samples: boxes of an image that the R-CNN assistant looks at, at most.
    """

    needs_teacher = False
    takes_teacher = False

    def __init__(
        self,
        *,
        assistants: Sequence[Kind] | None = None,
        ckd: bool = True,
        dense_weight: float = 1.0,
        rcnn_weight: float = 1.3,
        ckd_projector: Projector = "per_anchor",
        assistant_warmup: bool = True,
        proposals: AtLeastOne = 1000,
        roi_channels: Width = 1024,
        roi_samples: Samples = 512,
    ) -> None:
        """None means the assistants above."""
        super().__init__()
        check_choice("tf_head: ckd_projector", ckd_projector, PROJECTORS)
        for kind in assistants or ():
            check_choice("tf_head: assistants", kind, KINDS)
        if assistants is not None and len(set(assistants)) != max(1, len(assistants)):
            raise UserError(
                f"tf_head: assistants is {list(assistants)}; name each of {list(KINDS)} at most "
                f"once, and at least one"
            )
        self.wanted = assistants
        self.ckd, self.projector = ckd, ckd_projector
        self.ckd_weights = {"fcos": dense_weight, "retinanet": dense_weight, "rcnn": rcnn_weight}
        self.assistant_warmup, self.proposals = assistant_warmup, proposals
        self.roi_channels, self.roi_samples = roi_channels, roi_samples
        self.assistants, self.projectors = nn.ModuleDict(), nn.ModuleDict()

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Chooses and builds assistants and projectors; a teacher of other methods is ignored."""
        weights: dict[str, float] = {}
        for kind in self._choose(student):
            assistant = self._build(kind, student)
            self.assistants[kind] = assistant
            weights |= prefixed(kind, dict.fromkeys(assistant.terms, LOSS_WEIGHT[kind]))
        self.truth_terms = frozenset(weights)
        if self.ckd:
            for name, module in self.assistants.items():
                self.projectors[name] = self._projector(student, module)
                weights[f"ckd_{name}"] = self.ckd_weights[name]
        self.weights = weights

    def _choose(self, student: FPNDetector) -> Sequence[Kind]:
        own: tuple[Kind, ...]
        require_own_head(student, "tf_head")
        own = ("rcnn",) if isinstance(student, TwoStageDetector) else (student.family,)  # type: ignore[assignment]
        fitting = [kind for kind in KINDS if kind not in own]
        if self.wanted is None:
            # Two, as the authors have; where all three would do, those of an anchor-based student.
            return fitting if len(fitting) == 2 else ("fcos", "rcnn")
        unfit = [kind for kind in self.wanted if kind not in fitting]
        if unfit:
            raise UserError(
                f"tf_head: an assistant {unfit[0]!r} is no other kind of head than "
                f"{student.name}'s own; choose from {fitting}"
            )
        return self.wanted

    def _build(self, kind: Kind, student: FPNDetector) -> RoIAssistant | DenseAssistant:
        channels = student.pyramid_channels
        if kind == "rcnn":
            return fresh_roi_assistant(
                student.num_classes, channels, self.roi_channels, self.roi_samples
            )
        head = fresh_dense_head(kind, student.num_classes, channels)
        return DenseAssistant(head, student.strides, channels, channels, "tf_head")

    def _projector(self, student: FPNDetector, assistant: nn.Module) -> nn.Module:
        """From the student's class tower to the assistant's features."""
        if isinstance(assistant, RoIAssistant):
            width = shared_width(assistant.head(0))
            return cell_projector(cast(DenseDetector, student), width, self.projector)
        head = cast(DenseAssistant, assistant).head
        width = student.pyramid_channels
        if isinstance(student, DenseDetector):
            width = student.tower_channels_at(student.tower_depth)
        return nn.Conv2d(width, head.tower_channels_at(head.tower_depth), 1)

    def acting_terms(self, step: Step, acting: Set[str]) -> dict[str, Tensor]:
        """Raw terms of a step."""
        terms: dict[str, Tensor] = {}
        for kind, assistant in self.assistants.items():
            if isinstance(assistant, RoIAssistant):
                terms |= self._roi_terms(step, assistant, acting)
            else:
                dense = cast(DenseAssistant, assistant)
                terms |= self._dense_terms(step, kind, dense, acting)
        return terms

    def _roi_terms(
        self, step: Step, assistant: RoIAssistant, acting: Set[str]
    ) -> dict[str, Tensor]:
        rois = assistant.boxes(step, self.proposals)
        seen = assistant(step.student.pyramid, rois, step.targets)
        terms = prefixed("rcnn", assistant.losses(seen))
        if "ckd" in acting:
            features = seen[0][1].features[-1].detach()
            terms["ckd_rcnn"] = cross_kind_loss(self.projectors["rcnn"], step, rois, features)
        return terms

    def _dense_terms(
        self, step: Step, kind: str, assistant: DenseAssistant, acting: Set[str]
    ) -> dict[str, Tensor]:
        output = assistant(step.student.pyramid)
        terms = prefixed(kind, assistant.losses(output, step.targets))
        if "ckd" in acting:
            branch = "cls" if "cls" in step.student.towers else "shared"
            depth = len(step.student.towers[branch][0]) - 1
            strides = step.student.pyramid.strides
            own = dict(zip(strides, tower_maps(step.student, branch, depth), strict=True))
            end = assistant.head.tower_depth
            wanted = dict(zip(assistant.head.strides, tower_maps(output, "cls", end), strict=True))
            common = [stride for stride in wanted if stride in own]
            found = [self.projectors[kind](own[stride]) for stride in common]
            taught = [wanted[stride].detach() for stride in common]
            terms[f"ckd_{kind}"] = mean_square_of_levels(found, taught)
        return terms

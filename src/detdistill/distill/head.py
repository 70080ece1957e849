"""HEAD, heterogeneous assistants (Wang et al., arXiv 2207.05345, ECCV 2022).

Student and teacher have heads of different kinds, so their features do not compare. An assistant, a
head of the teacher's kind on the student's pyramid, stands between: it learns from the ground truth
and from the teacher's features (AKD), and the student's own head from the teacher's too (CKD). All
gradients reach the student; the assistant is dropped after training.

Settings are those of the released code for RetinaNet with a Faster R-CNN teacher. For other pairs
nothing is released; their settings are those of the authors' development configurations, and
whether these made the published rows is unknown. What neither settles is said to be reconstructed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import untrained
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.distill.adapters import (
    check_same_classes,
    match_levels,
    mean_square,
    mean_square_of_levels,
    require_own_head,
    tower_maps,
)
from detdistill.distill.assistants import (
    AssistedMethod,
    DenseAssistant,
    RoIAssistant,
    fresh_roi_assistant,
    prefixed,
)
from detdistill.distill.method import METHODS, Step
from detdistill.distill.projectors import (
    PROJECTORS,
    Projector,
    cell_projector,
    cross_kind_loss,
    shared_projector,
    shared_width,
)
from detdistill.distill.schedule import TIMING, Schedule, Steps
from detdistill.errors import UserError
from detdistill.registry import AtLeastOne, check_choice
from detdistill.structures import DenseOutput, Proposals

Weights = Literal["teacher", "fresh"]


@dataclass(frozen=True)
class Settings:
    """What HEAD does for a pair; None where it is left to the kind of the pair."""

    akd: bool
    ckd: bool | None
    akd_weight: float | None
    ckd_weight: float | None
    assistant_warmup: bool | None
    projector: Projector
    proposals: int

    def completed(
        self, *, ckd: bool, akd_weight: float, ckd_weight: float, assistant_warmup: bool
    ) -> Settings:
        """The same with the authors' values where none were given."""
        return replace(
            self,
            ckd=ckd if self.ckd is None else self.ckd,
            akd_weight=akd_weight if self.akd_weight is None else self.akd_weight,
            ckd_weight=ckd_weight if self.ckd_weight is None else self.ckd_weight,
            assistant_warmup=(
                assistant_warmup if self.assistant_warmup is None else self.assistant_warmup
            ),
        )


@METHODS.register("head")
class HEAD(AssistedMethod):
    """Distillation between heads of different kinds; the settings of a pair are its authors'.

    Terms: `head/assistant_...`, the assistant's own losses; `head/akd_...`, the mean squared
    difference between its features, after an adapter, and the teacher's; `head/ckd...`, the same
    for the student's own features. Three kinds of pairs:

    - RetinaNet, FCOS or another dense student with a two-stage teacher. The assistant is a copy of
      the teacher's RoI head on the student's four finest levels, its boxes are the student's own
      detections. `akd_1`, `akd_2`: the shared layers. `ckd`: the student's class tower where each
      box came from, towards the second shared layer.
    - A dense teacher, e.g. RepPoints. The assistant is a copy of its dense head. `akd_tower_cls`,
      `akd_tower_box` and, for RepPoints, `akd_init`, `akd_cls`, `akd_refine`: maps, on every level.
      `ckd_cls`, `ckd_box` (reconstructed): the middle of the student's towers towards the end of
      the teacher's. Off, as in the authors' development configuration for FCOS; on in one for
      MobileNetV2; which of them a published row used is unknown.
    - A two-stage student with a two-stage teacher of another family, e.g. Cascade R-CNN. As the
      first, on the student's sampled boxes; `akd_1_1` to `akd_3_2` for three stages. `ckd`: the
      student's second shared layer towards that of the teacher's first stage. Off, as in one of
      the authors' two development configurations; which the published row used is unknown.

    AKD and CKD warm up over 2000 steps (`warmup`). For a pair of one family HEAD is the imitation
    of the pyramid: `FeatureImitation(adapter="per_level", transfer_head=True)`.

    Args:
        akd: distil into the assistant.
        ckd: distil into the student's own head. With both off the assistant learns from the ground
            truth alone and needs no teacher; one that is given only says its form.
        akd_weight: factor of each AKD term.
        ckd_weight: factor of each CKD term.
        ckd_start: `start` of CKD alone; None, as of the next two, is that of AKD.
        ckd_stop: `stop` of CKD alone.
        ckd_warmup: `warmup` of CKD alone.
        ckd_projector: "single" as released, or "per_anchor", a projection for each anchor of a
            cell, as in the development configurations.
        assistant_warmup: the assistant's own losses warm up too.
        assistant_weights: with which the assistant starts: the "teacher"'s or "fresh" ones; None
            as published, those of the teacher where it distils, else fresh ones.
        proposals: of the student, per image, of which at most 512 are drawn.
    """

    def __init__(
        self,
        *,
        akd: bool = True,
        ckd: bool | None = None,
        akd_weight: float | None = None,
        ckd_weight: float | None = None,
        ckd_start: Steps | None = None,
        ckd_stop: AtLeastOne | None = None,
        ckd_warmup: Steps | None = None,
        ckd_projector: Projector = "single",
        assistant_warmup: bool | None = None,
        assistant_weights: Weights | None = None,
        proposals: AtLeastOne = 1000,
    ) -> None:
        """None means the authors' value for the pair."""
        super().__init__()
        check_choice("head: ckd_projector", ckd_projector, PROJECTORS)
        check_choice("head: assistant_weights", assistant_weights or "fresh", get_args(Weights))
        self.assistant_weights = assistant_weights
        self.needs_teacher = akd or ckd is not False or assistant_weights == "teacher"
        self.settings = Settings(
            akd, ckd, akd_weight, ckd_weight, assistant_warmup, ckd_projector, proposals
        )
        own = zip(TIMING, (ckd_start, ckd_stop, ckd_warmup), strict=True)
        self.ckd_timing = {key: value for key, value in own if value is not None}
        self.link: RoILink | DenseLink

    def prepare(self, student: FPNDetector, teacher: FPNDetector | None) -> None:
        """Checks the pair, fills in the authors' settings, builds assistant and adapters."""
        for model in (student, teacher):
            require_own_head(model, "head")
        if teacher is not None:
            _check_pair(student, teacher)
        self.settings = _completed(self.settings, student, teacher)
        _check_ckd_timing(self.ckd_timing, self.schedule, ckd=bool(self.settings.ckd))
        pattern = self._pattern(teacher)
        if isinstance(pattern, DenseDetector):
            self.link = DenseLink(student, pattern, self.settings)
            self.teacher_stage = "head"
        else:
            self.link = RoILink(student, cast("TwoStageDetector | None", pattern), self.settings)
            self.teacher_stage = "pyramid"
        self.assistant_warmup = bool(self.settings.assistant_warmup)
        self.weights = self.link.weights
        self.truth_terms = frozenset(t for t in self.weights if t.startswith("assistant"))
        self.needs_teacher = self.weights.keys() > self.truth_terms

    def _pattern(self, teacher: FPNDetector | None) -> FPNDetector | None:
        """Whose head the assistant copies: the teacher, or an untrained detector like it."""
        distils = self.settings.akd or self.settings.ckd
        weights = self.assistant_weights or ("teacher" if distils else "fresh")
        if teacher is None or weights == "teacher":
            return teacher
        try:
            return untrained(teacher)
        except UserError as error:
            raise UserError(
                f"head: the assistant starts untrained in the form of the teacher's head, but "
                f"{error}, or set assistant_weights to 'teacher'"
            ) from None

    def acting_terms(self, step: Step, acting: Set[str]) -> dict[str, Tensor]:
        """Raw terms of a step."""
        return self.link(step, acting)  # type: ignore[no-any-return]


def _check_pair(student: FPNDetector, teacher: FPNDetector) -> None:
    if student.family == teacher.family:
        raise UserError(
            f"head is for heads of different kinds, and {student.name} and {teacher.name} are both "
            f"{student.family}; between such a pair it is FitNet on the pyramid: use the method "
            f"'feature' with adapter 'per_level' and transfer_head true, as in the authors' code"
        )
    check_same_classes(student, teacher, "head")


def _check_ckd_timing(own: Mapping[str, int], of_akd: Schedule, *, ckd: bool) -> None:
    """Refuses a schedule of CKD by which it never acts, or where there is no CKD."""
    if own and not ckd:
        key, value = next(iter(own.items()))
        raise UserError(
            f"head: ckd_{key} is {value}, but CKD is off, as asked for or by default for this "
            f"pair; set ckd to true, or leave ckd_{key} out"
        )
    start, stop = own.get("start", of_akd.start), own.get("stop", of_akd.stop)
    if stop is not None and stop <= start:
        raise UserError(
            f"head: CKD stops at step {stop} and starts at step {start}, so it would never act; "
            f"raise ckd_stop (without it: stop), or lower ckd_start (without it: start)"
        )


def _completed(settings: Settings, student: FPNDetector, teacher: FPNDetector | None) -> Settings:
    if isinstance(teacher, DenseDetector):
        return settings.completed(akd_weight=1.0, ckd=False, ckd_weight=1.0, assistant_warmup=True)
    if isinstance(student, TwoStageDetector):
        return settings.completed(akd_weight=1.0, ckd=False, ckd_weight=2.0, assistant_warmup=True)
    fcos = student.family == "fcos"
    return settings.completed(
        akd_weight=2.0, ckd=True, ckd_weight=1.0 if fcos else 2.0, assistant_warmup=fcos
    )


class RoILink(nn.Module):
    """Assistant and distillation where the teacher's head looks at boxes.

    Args:
        student: any detector that makes proposals.
        teacher: two-stage, or None for an untrained assistant.
        settings: complete.

    Raises:
        UserError: when the student or its boxes are not what the settings need.
    """

    def __init__(
        self, student: FPNDetector, teacher: TwoStageDetector | None, settings: Settings
    ) -> None:
        """Builds assistant, adapters and projector, and fills `weights`."""
        super().__init__()
        self.settings = settings
        self.assistant = _roi_assistant(student, teacher)
        taught = {} if teacher is None else teacher.loss_weights
        self.weights = {f"assistant_{t}": taught.get(t, 1.0) for t in self.assistant.terms}
        self.adapters = nn.ModuleDict()
        if settings.akd:
            self._add_akd()
        self.projector: nn.Module | None = None
        if settings.ckd:
            self._add_ckd(student)

    def _add_akd(self) -> None:
        assert self.settings.akd_weight is not None
        for stage, suffix in enumerate(self.assistant.suffixes):
            for layer, shared in enumerate(self.assistant.head(stage).shared, 1):
                width = cast(nn.Linear, shared).out_features
                self.adapters[f"akd{suffix}_{layer}"] = nn.Linear(width, width)
        self.weights |= dict.fromkeys(self.adapters, self.settings.akd_weight)

    def _add_ckd(self, student: FPNDetector) -> None:
        assert self.settings.ckd_weight is not None
        width = shared_width(self.assistant.head(0))
        if isinstance(student, DenseDetector):
            self.projector = cell_projector(student, width, self.settings.projector)
        else:
            owner, option = cast(TwoStageDetector, student), "head: ckd_projector"
            self.projector = shared_projector(owner, width, self.settings.projector, option)
        self.weights["ckd"] = self.settings.ckd_weight

    def forward(self, step: Step, acting: Set[str]) -> dict[str, Tensor]:
        """Raw terms of a step; AKD and CKD where they are in `acting`."""
        rois = self.assistant.boxes(step, self.settings.proposals)
        seen = self.assistant(step.student.pyramid, rois, step.targets)
        terms = prefixed("assistant", self.assistant.losses(seen))
        stages = len(seen) if "akd" in acting else int("ckd" in acting)
        for stage in range(stages):
            rois, found = seen[stage]
            wanted = self._teacher_features(step, rois, stage)
            if "akd" in acting:
                for layer, pair in enumerate(zip(found.features, wanted, strict=True), 1):
                    name = f"akd{self.assistant.suffixes[stage]}_{layer}"
                    terms[name] = mean_square(self.adapters[name](pair[0]), pair[1])
            if stage == 0 and "ckd" in acting:
                assert self.projector is not None
                terms["ckd"] = cross_kind_loss(self.projector, step, rois, wanted[-1])
        return terms

    @torch.no_grad()
    def _teacher_features(self, step: Step, rois: Proposals, stage: int) -> list[Tensor]:
        """The teacher's shared layers on the same boxes, from its own pyramid."""
        assert step.teacher is not None
        teacher = cast(TwoStageDetector, step.teacher_model)
        head = cast(RoIHead, teacher.roi_heads[stage])
        return head.shared_features(head.pool(step.teacher.pyramid, rois))


def _roi_assistant(student: FPNDetector, teacher: TwoStageDetector | None) -> RoIAssistant:
    """A copy of the teacher's RoI heads, which is trained on, or an untrained one."""
    if teacher is not None:
        heads = copy.deepcopy(teacher.roi_heads)
        return RoIAssistant(heads, student.pyramid_channels, teacher.pyramid_channels)
    if isinstance(student, TwoStageDetector):
        raise UserError(
            f"head without a teacher gives the student an R-CNN assistant, and {student.name} has "
            f"such a head itself; choose a dense student, or the method 'tf_head'"
        )
    return fresh_roi_assistant(student.num_classes, student.pyramid_channels)


class DenseLink(nn.Module):
    """Assistant and distillation where the teacher's head is dense.

    Args:
        student: of any kind; with class and box towers for CKD.
        teacher: dense.
        settings: complete.

    Raises:
        UserError: when the pyramids do not fit or CKD has no towers to read.
    """

    def __init__(self, student: FPNDetector, teacher: DenseDetector, settings: Settings) -> None:
        """Builds assistant and adapters, and fills `weights`."""
        super().__init__()
        assert settings.akd_weight is not None and settings.ckd_weight is not None
        self.assistant = DenseAssistant(
            teacher.head_only(),
            student.strides,
            student.pyramid_channels,
            teacher.pyramid_channels,
            "head",
        )
        self.inner, self.end = teacher.inner_maps, teacher.tower_depth
        self.weights = prefixed("assistant", dict(teacher.loss_weights))
        width = teacher.tower_channels_at(self.end)
        self.adapters, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        if settings.akd:
            for name in ("tower_cls", "tower_box", *self.inner):
                self.adapters[name] = nn.Conv2d(width, width, 1)
            self.weights |= prefixed("akd", dict.fromkeys(self.adapters, settings.akd_weight))
        if settings.ckd:
            self._add_ckd(student, teacher, settings.projector)
            self.weights |= prefixed("ckd", dict.fromkeys(self.projectors, settings.ckd_weight))

    def _add_ckd(self, student: FPNDetector, teacher: DenseDetector, projector: Projector) -> None:
        if not isinstance(student, DenseDetector):
            raise UserError(
                f"head: ckd with the dense teacher {teacher.name} needs a student with class and "
                f"box towers, which {student.name} has not; leave ckd out"
            )
        if projector == "per_anchor":
            raise UserError(
                f"head: ckd_projector 'per_anchor' is for boxes that came from anchors, and the "
                f"dense teacher {teacher.name} needs none; use 'single'"
            )
        self.levels = match_levels(student.strides, teacher.strides, "head")
        self.depth = student.tower_depth // 2  # the authors': the second of four
        widths = student.tower_channels_at(self.depth), teacher.tower_channels_at(self.end)
        for branch in ("cls", "box"):
            self.projectors[branch] = nn.Conv2d(*widths, 1)

    def forward(self, step: Step, acting: Set[str]) -> dict[str, Tensor]:
        """Raw terms of a step; AKD and CKD where they are in `acting`."""
        output = self.assistant(step.student.pyramid)
        terms = prefixed("assistant", self.assistant.losses(output, step.targets))
        if "akd" in acting:
            assert step.teacher is not None
            own, wanted = self._maps(output), self._maps(step.teacher)
            for name, adapter in self.adapters.items():
                found = [adapter(level) for level in own[name]]
                terms[f"akd_{name}"] = mean_square_of_levels(found, wanted[name])
        for branch, projector in self.projectors.items() if "ckd" in acting else ():
            assert step.teacher is not None
            towers = tower_maps(step.student, branch, self.depth)
            found = [projector(towers[level]) for level in self.levels]
            taught = tower_maps(step.teacher, branch, self.end)
            terms[f"ckd_{branch}"] = mean_square_of_levels(found, taught)
        return terms

    def _maps(self, output: DenseOutput) -> dict[str, list[Tensor]]:
        """By the names of the adapters."""
        towers = {f"tower_{b}": tower_maps(output, b, self.end) for b in ("cls", "box")}
        return towers | {name: output.features[name] for name in self.inner}

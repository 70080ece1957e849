"""A detector that knows more classes than a data set, or the same in another order, cut to it."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.roi_head import RoIHead
from detdistill.detectors.two_stage import TwoStageDetector
from detdistill.detectors.view_base import TorchvisionView
from detdistill.errors import UserError, UserNotice
from detdistill.parts.heads import with_outputs
from detdistill.registry import nearest

ClassMap = Mapping[str, str | int]
"""What a detector calls a class of the data, or its label there."""


def match_classes(
    detector: FPNDetector, classes: Sequence[str], class_map: ClassMap | None = None
) -> None:
    """Leaves the detector, in place, with the classes of a data set, in their order.

    What it finds of them stays as it was (see `keep_classes`).

    Args:
        detector: that knows all these classes, perhaps under other names.
        classes: names; class k of the detector is then `classes[k]`.
        class_map: where names differ, or the detector's file has none.

    Raises:
        UserError: for a class that it does not know, or that would stand for two, and for what are
            no names or no map.
    """
    class_map = {} if class_map is None else class_map
    _require_names(classes, class_map)
    for name in class_map:
        if name not in classes:
            raise UserError(
                f"class_map: {name!r} is no class of the data; {nearest(name, classes)}"
            )
    rows = [_row(detector, name, class_map.get(name)) for name in classes]
    for i, row in enumerate(rows):
        if row in rows[:i]:
            raise UserError(
                f"class_map: {classes[rows.index(row)]!r} and {classes[i]!r} are one class of "
                f"{detector.name}, which cannot tell them apart; train a teacher that does"
            )
    _tell_labels(detector, class_map)
    if rows != list(range(detector.num_classes)):
        keep_classes(detector, rows)
    detector.classes = list(classes)


def match_if_known(
    detector: FPNDetector, classes: Sequence[str], class_map: ClassMap | None = None
) -> None:
    """`match_classes` where a map is given or the detector knows all of the classes by name.

    Any other is left as it is: some methods need no classes in common, the others refuse it.
    """
    if class_map or (classes and set(classes) <= set(detector.classes or ())):
        match_classes(detector, classes, class_map)


def known_classes(detector: FPNDetector) -> int:
    """How many classes it knew before it was cut."""
    return detector.num_classes if detector.cut is None else detector.cut[1]


def map_option(name: str, value: str) -> str:
    """The option of a command that maps a class of the data, as a shell takes it."""
    if set(name) & set(".="):
        return f"--set {shlex.quote(f'class_map={{{json.dumps(name)}: {value}}}')}"
    return f"--set {shlex.quote(f'class_map.{name}={value}')}"


def keep_classes(detector: FPNDetector, kept: Sequence[int]) -> None:
    """Leaves all classes out but these labels of 0..K-1, for good; class k is `kept[k]` then.

    What the detector finds of the classes that stay does not change. A sigmoid head loses rows of
    its last layer; the softmax of an RoI head counts what is left out as background. A cascade
    averages the logits of its stages, each with a background of its own then, so that its final
    scores do change where the stages disagree. A torchvision model stays whole: its view reads
    fewer labels.

    Raises:
        UserError: for a family of others whose class predictor is not known.
    """
    known = detector.num_classes
    if not kept or len(set(kept)) < len(kept) or not 0 <= min(kept) <= max(kept) < known:
        raise ValueError(f"kept is {list(kept)}; expected different labels of 0..{known - 1}")
    if isinstance(detector, TorchvisionView):
        labels = detector.labels or list(detector.known)
        detector.labels = [labels[label] for label in kept]
    if isinstance(detector, TwoStageDetector):
        for head in detector.roi_heads:
            cast(RoIHead, head).keep_classes(list(kept))
    elif not isinstance(detector, TorchvisionView):
        _cut_logits(detector, kept)
    first, of_all = detector.cut or (list(range(known)), known)
    detector.cut = [first[label] for label in kept], of_all
    detector.num_classes = len(kept)
    if detector.classes is not None:
        detector.classes = [detector.classes[label] for label in kept]


def _cut_logits(detector: FPNDetector, kept: Sequence[int]) -> None:
    logits = getattr(detector, "logits", None)
    if not isinstance(logits, nn.Conv2d):
        raise UserError(
            f"{detector.name} has no convolution `logits`, so its classes cannot be cut; train a "
            f"teacher on the student's classes"
        )
    first = range(0, logits.out_channels, detector.num_classes)  # of each anchor
    rows = [start + label for start in first for label in kept]
    detector.logits = with_outputs(logits, rows)


def _require_names(classes: Any, class_map: Any) -> None:
    named = isinstance(classes, Sequence) and not isinstance(classes, str) and len(classes) > 0
    if not named or not all(isinstance(name, str) for name in classes):
        raise UserError(f"classes is {classes!r}; expected a list of names, such as ['cat', 'dog']")
    if not isinstance(class_map, Mapping):
        raise UserError(
            f"class_map is {class_map!r}; expected a mapping of names, such as {{'cat': 'kitten'}}"
        )
    for name, known in class_map.items():
        if isinstance(known, bool) or not isinstance(known, (str, int)):
            raise UserError(
                f"class_map: {name!r} is {known!r}; expected what the detector calls the class, or "
                f"its label there, a whole number from 0 on"
            )


def _tell_labels(detector: FPNDetector, class_map: ClassMap) -> None:
    """What the labels in a map stand for, where the detector knows: one notice for all."""
    own = detector.classes
    if own is None:
        return
    labels = {name: label for name, label in class_map.items() if isinstance(label, int)}
    if labels:
        told = "; ".join(f"{k} is its {own[k]!r}, here {name}" for name, k in labels.items())
        text = f"class_map takes labels of {detector.name}: {told}"
        warnings.warn(text, UserNotice, stacklevel=3)


def _row(detector: FPNDetector, name: str, mapped: str | int | None) -> int:
    """The detector's label of a class of the data."""
    count, own = detector.num_classes, detector.classes
    if isinstance(mapped, int):
        if not 0 <= mapped < count:
            raise UserError(
                f"class_map: {name} is {mapped}, but {detector.name} has labels 0..{count - 1}"
            )
        return mapped
    wanted = name if mapped is None else mapped
    if own is None:
        raise UserError(
            f"{detector.name} names none of its {count} classes; say by class_map which label each "
            f"class of the data has there, a number without quotes, e.g. {map_option(name, '0')}"
        )
    if wanted not in own:
        way_out = "" if mapped is not None else f"; map it: {map_option(name, 'NAME')}"
        if mapped is not None and mapped.isdecimal():
            way_out = f"; a label is a number without quotes: {map_option(name, mapped)}"
        raise UserError(
            f"{detector.name} knows no class {wanted!r} among its {count}{way_out}; "
            f"{nearest(wanted, own)}"
        )
    return own.index(wanted)

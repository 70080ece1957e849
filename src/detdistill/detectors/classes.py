"""A detector that knows more classes than a data set, or the same in another order, cut to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detdistill.detectors.base import FPNDetector
from detdistill.errors import UserError
from detdistill.registry import nearest

ClassMap = Mapping[str, str | int]
"""What a detector calls a class of the data, or its label there."""


def match_classes(
    detector: FPNDetector, classes: Sequence[str], class_map: ClassMap | None = None
) -> None:
    """Leaves the detector, in place, with the classes of a data set, in their order.

    What it finds of them stays as it was (see `FPNDetector.keep_classes`).

    Args:
        detector: that knows all these classes, perhaps under other names.
        classes: names; class k of the detector is then `classes[k]`.
        class_map: where names differ, or the detector's file has none.

    Raises:
        UserError: for a class that it does not know, or that would stand for two.
    """
    class_map = class_map or {}
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
    if rows != list(range(detector.num_classes)):
        detector.keep_classes(rows)
    detector.classes = list(classes)


def match_if_known(
    detector: FPNDetector, classes: Sequence[str], class_map: ClassMap | None = None
) -> None:
    """`match_classes` where a map is given or the detector knows all of the classes by name.

    Any other is left as it is: some methods need no classes in common, the others refuse it.
    """
    if class_map or (classes and set(classes) <= set(detector.classes or ())):
        match_classes(detector, classes, class_map)


def _row(detector: FPNDetector, name: str, mapped: str | int | None) -> int:
    """The detector's label of a class of the data."""
    count, own = detector.num_classes, detector.classes
    if isinstance(mapped, int):
        if mapped >= count:
            raise UserError(
                f"class_map: {name} is {mapped}, but {detector.name} has labels 0..{count - 1}"
            )
        return mapped
    wanted = name if mapped is None else mapped
    if own is None:
        raise UserError(
            f"{detector.name} names none of its {count} classes; say by class_map which label each "
            f"class of the data has there, e.g. --set class_map.{name}=0"
        )
    if wanted not in own:
        way_out = "" if mapped is not None else f", and map it: --set class_map.{name}=NAME"
        raise UserError(
            f"{detector.name} knows no class {wanted!r} among its {count}; "
            f"{nearest(wanted, own)}{way_out}"
        )
    return own.index(wanted)

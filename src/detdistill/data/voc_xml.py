"""One XML file of Pascal VOC data; nothing in it is followed or expanded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from detdistill.data.collector import Box
from detdistill.errors import UserError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocObject:
    """An object as the file states it.

    Attributes:
        name: of its class; empty where there is none.
        corners: xmin, ymin, xmax, ymax, pixels that count from 1, the last ones inside; None where
            they are not finite numbers in this order.
        shown: the corners as they stand in the file.
        difficult: hard to recognise, says who drew it.
    """

    name: str
    corners: Box | None
    shown: str
    difficult: bool


@dataclass(frozen=True)
class VocAnnotation:
    """An image's annotations.

    Attributes:
        size: (h, w) as stated, None where the file gives no usable one.
        objects: in the order of the file.
    """

    size: tuple[int, int] | None
    objects: list[VocObject]


def read_annotation(path: Path) -> VocAnnotation | None:
    """The content of an XML file; None when there is no such file."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    # Without a document type there are no entities to expand. The zeros are UTF-16's; no other
    # encoding that expat reads spells this otherwise.
    if b"<!DOCTYPE" in content.replace(b"\0", b""):
        raise UserError(
            f"{path}: has a DOCTYPE, which could make the file unfold without end and which VOC "
            "annotations do not need; remove it"
        )
    try:
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(
            f"{path}: not XML, or cut off ({error}); expected a Pascal VOC annotation"
        ) from None
    if root.tag != "annotation":
        raise UserError(
            f"{path}: not a Pascal VOC annotation: found <{root.tag}> at the top, not <annotation>"
        )
    return VocAnnotation(_size(root), [_object(entry) for entry in root.findall("object")])


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    height, width = (_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    if 1 <= height < 1e9 and 1 <= width < 1e9:  # many tools write 0
        return round(height), round(width)
    return None


def _object(entry: ElementTree.Element) -> VocObject:
    texts = [entry.findtext(f"bndbox/{side}") for side in _CORNERS]
    left, top, right, bottom = corners = tuple(_number(text) for text in texts)
    usable = all(map(math.isfinite, corners)) and left <= right and top <= bottom
    return VocObject(
        (entry.findtext("name") or "").strip(),
        (left, top, right, bottom) if usable else None,
        "[" + ", ".join("none" if text is None else text.strip() for text in texts) + "]",
        (entry.findtext("difficult") or "").strip() == "1",
    )


def _number(text: str | None) -> float:
    """NaN for what is no number."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan

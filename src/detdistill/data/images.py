"""Image files to uint8 RGB tensors, upright, whatever the file holds.

Pillow is the one decoder: torchvision's own decoders are deprecated since 0.29, give the same
pixels in the same time, and decode before one can look at the size.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from detdistill.errors import UserError

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded."""

# A closed list: some of Pillow's other readers start programs (EPS) or are rarely exercised.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)
# The last bytes of a complete file; anything may follow, so their absence only raises suspicion.
# Other formats have no such mark: of them only decoding tells whether the file is whole.
_ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 64

# Pillow warns from 89 megapixels on; the limit here is MAX_PIXELS and an error of ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of a damaged file Pillow warns before it raises; the error says all.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


@dataclass(frozen=True)
class ImageHeader:
    """Size as stored, and the EXIF orientation (1 = upright, 5..8 = turned by 90 degrees)."""

    height: int
    width: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """(h, w) after the EXIF orientation is applied."""
        turned = self.orientation in _TURNED
        return (self.width, self.height) if turned else (self.height, self.width)

    def frame(self, stated: tuple[int, int] | None) -> tuple[int, int]:
        """The (h, w) in which this image is read, see `read_image`."""
        stored = (self.height, self.width)
        return stored if stated == stored else self.upright


def read_header(path: Path) -> ImageHeader:
    """Size and orientation; a file that may be cut off is decoded to be sure."""
    with _opened(path) as image:
        header = _header(path, image)
        ending = _ENDINGS.get(image.format or "")
        if ending is None or ending not in _last_bytes(path):
            image.load()
    return header


def check_image(path: Path) -> None:
    """Decodes a file as `read_image` does, to see that it can be; `UserError` if not.

    A JPEG is decoded at an eighth of its size: of its bytes all are read, and the rest is the
    longer part of the work.
    """
    with _opened(path) as image:
        _header(path, image)
        image.draft(None, (1, 1))
        _to_rgb(path, image)


def read_image(path: Path, stated: tuple[int, int] | None = None) -> Tensor:
    """Decodes a file to (3, h, w) uint8 RGB.

    Args:
        path: the file; grey, palette, alpha (dropped), CMYK and 16-bit images are converted.
        stated: (h, w) that the annotations state. EXIF orientation is applied unless the stated
            size fits the stored pixels only: then the boxes were drawn on those.
    """
    with _opened(path) as image:
        header = _header(path, image)
        pixels = _to_rgb(path, image)
        if header.frame(stated) == header.upright and header.orientation in _UPRIGHT:
            pixels = pixels.transpose(_UPRIGHT[header.orientation])
        array = np.array(pixels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An opened image; every way in which reading can fail becomes a `UserError`."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        raise UserError(
            f"{path}: image file not found; check the folder and the file name"
        ) from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: a folder; an image file was expected, e.g. {path}/*.jpg")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a file; an image file was expected")
    if status.st_size == 0:
        raise UserError(f"{path}: the image file is empty (0 bytes); copy it again or remove it")
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(path, "more than 179") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: not an image that can be read; expected one of {', '.join(FORMATS)}"
        ) from None
    except PermissionError:
        raise UserError(f"{path}: the image file may not be read; see to its rights") from None
    except Exception as error:  # on damaged bytes Pillow's readers raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: the image is damaged or cut off ({reason}); copy it again or remove it"
        ) from None


def _header(path: Path, image: Image.Image) -> ImageHeader:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width}x{height} =", width * height)
    if image.format == "TIFF":
        image.load()  # Pillow turns a TIFF as it loads it, and then forgets the tag
        width, height = image.size
    return ImageHeader(height, width, _orientation(image))


def _too_large(path: Path, found: str, pixels: int | None = None) -> UserError:
    count = f" {pixels / 1e6:.0f}" if pixels else ""
    return UserError(
        f"{path}: the image has {found}{count} megapixels, the limit is {MAX_PIXELS // 10**6}; "
        "cut it into tiles or shrink it"
    )


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode the whole file to look for a late chunk
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF, of which Pillow raises nearly anything, is no EXIF
        return 1


def _last_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _TAIL))
        return file.read()


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UserError(
            f"{path}: the image has float pixels of unknown range; convert it to 8 bits"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")

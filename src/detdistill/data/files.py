"""Files and folders of data sets, whatever their format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from detdistill.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
)
"""How files that hold images end, in lower case; others beside them are passed over."""

_AT_ONCE = 32

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def in_threads(
    function: Callable[[_In], _Out],
    items: Sequence[_In],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[_Out]:
    """The function of each item, in order; small files wait for the disk, not for the CPU.

    `progress` is called with (items done, all).
    """
    # Several items a task: of a cached file the exchange with the pool costs more than the reading.
    parts = [items[i : i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE)]
    with ThreadPoolExecutor(8) as pool:
        found: list[_Out] = []
        for results in pool.map(lambda part: [function(item) for item in part], parts):
            found += results
            progress(len(found), len(items))
        return found


def require_folder(path: Path, what: str) -> Path:
    """The path, when it is a folder."""
    if not path.exists():
        raise UserError(f"{path}: {what} not found; check the path")
    if not path.is_dir():
        raise UserError(f"{path}: {what} must be a folder, found a file")
    return path


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; hidden ones are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_text(path: Path) -> str | None:
    """A text file in UTF-8, with or without a byte order mark; None when there is none."""
    try:
        with open(path, "rb") as file:  # a `Path` method more is felt in 100,000 files
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8; write it again as one") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped, each once; none without the file."""
    lines = (line.strip() for line in (read_text(path) or "").splitlines())
    return list(dict.fromkeys(filter(None, lines)))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A place to write a data set, which becomes `folder` when the block ends without an error.

    Raises:
        UserError: when the folder holds something, or cannot be written.
    """
    absolute = folder.absolute()  # "." has no name
    unfinished = absolute.with_name(f".{absolute.name}.{os.getpid()}.tmp")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and holds something else; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        unfinished.replace(absolute)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the data set: {error.strerror}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

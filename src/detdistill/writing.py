"""Files that appear whole or not at all, and what is said when there is no room for them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from detdistill.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE)


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which then replaces `path`; when that fails, `path` stays as it was."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def disk_faults_told() -> Iterator[None]:
    """Turns a full disk and the like, which are nobody's bug, into a `UserError`."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in FULL:
            raise UserError(
                f"{place}{error.strerror}; make room and give the same command again (train and "
                f"distill: with --resume)"
            ) from None
        if error.errno in FORBIDDEN:
            raise UserError(f"{place}{error.strerror}; see to it, or choose other files") from None
        raise

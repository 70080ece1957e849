"""Published checkpoints of the papers: which there are, and how to get one."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from detdistill.errors import UserError
from detdistill.registry import nearest

OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0/"
TIMEOUT = 30  # seconds without an answer
CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """One published file.

    Attributes:
        name: its owner's name of the configuration, or ours of a released student.
        detector: what `load_detector` builds from it.
        role: which paper used it and as what.
        ap: published COCO AP on val2017, 0..100; None where none was found.
        folder: between the owner's server and the file; None where no address was verified, which
            holds for all students: their files are on the authors' own pages.
        file: ends with "-" and the first 8 digits of its SHA-256; None where it is not known.
    """

    name: str
    detector: str
    role: str
    ap: float | None
    folder: str | None = None
    file: str | None = None

    @property
    def address(self) -> str | None:
        """Where the owner's own list of models says it is; None where that was not to be seen."""
        if self.folder is None or self.file is None:
            return None
        # As in a web page: "+" stands for itself only when it is written out.
        return OPENMMLAB + f"{self.folder}/{self.file}".replace("+", "%2B")

    @property
    def digest(self) -> str | None:
        """The first 8 hexadecimal digits of the file's SHA-256."""
        return None if self.file is None else self.file.rpartition("-")[2].removesuffix(".pth")


def _openmmlab(
    family: str,
    name: str,
    detector: str,
    role: str,
    ap: float,
    ending: str,
    stem: str | None = None,
) -> Checkpoint:
    """A file of MMDetection's list; the address is as its metafiles and README files have it."""
    file = f"{stem or name}{ending}.pth"
    return Checkpoint(name, detector, role, ap, f"{family}/{name}", file)


CHECKPOINTS: tuple[Checkpoint, ...] = (
    _openmmlab(
        "gfl",
        "gfl_r101_fpn_mstrain_2x_coco",
        "gfl_r101",
        "CrossKD teacher",
        44.9,
        "_20200629_200126-dd12f847",
    ),
    _openmmlab(
        "gfl",
        "gfl_r50_fpn_1x_coco",
        "gfl_r50",
        "CrossKD teacher",
        40.2,
        "_20200629_121244-25944287",
    ),
    _openmmlab(
        "retinanet",
        "retinanet_r101_fpn_2x_coco",
        "retinanet_r101",
        "CrossKD and RM/PFI teacher",
        38.9,
        "_20200131-5560aee8",
    ),
    _openmmlab(
        "retinanet",
        "retinanet_r50_fpn_1x_coco",
        "retinanet_r50",
        "CrossKD teacher",
        36.5,
        "_20200130-c2398f9e",
    ),
    _openmmlab(
        "fcos",
        "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco",
        "fcos_r101_caffe_gn",
        "CrossKD teacher",
        40.8,
        "-511424d6",
    ),
    _openmmlab(
        "atss",
        "atss_r101_fpn_1x_coco",
        "atss_r101",
        "CrossKD teacher",
        41.5,
        "_20200825-dfcadd6f",
        stem="atss_r101_fpn_1x",
    ),
    _openmmlab(
        "faster_rcnn",
        "faster_rcnn_r50_fpn_mstrain_3x_coco",
        "faster_rcnn_r50",
        "HEAD teacher",
        40.3,
        "_20210524_110822-e10bd31c",
    ),
    _openmmlab(
        "reppoints",
        "reppoints_moment_r50_fpn_gn-neck+head_2x_coco",
        "reppoints_r50_gn",
        "HEAD teacher",
        38.6,
        "_20200329-91babaa2",
    ),
    _openmmlab(
        "retinanet",
        "retinanet_r50_fpn_mstrain_3x_coco",
        "retinanet_r50",
        "HEAD, teacher of FitNet",
        39.5,
        "_20210718_220633-88476508",
    ),
    Checkpoint("crosskd_teacher_retinanet_swin_t", "retinanet_swin_t", "CrossKD teacher", 37.3),
    Checkpoint("head_teacher_cascade_rcnn_r50", "cascade_rcnn_r50", "HEAD teacher", None),
    Checkpoint("crosskd_gfl_r50", "gfl_r50", "CrossKD student", 43.7),
    Checkpoint("crosskd_retinanet_r50", "retinanet_r50", "CrossKD student", 39.7),
    Checkpoint("crosskd_fcos_r50", "fcos_r50_caffe_gn", "CrossKD student", 41.1),
    Checkpoint("crosskd_atss_r50", "atss_r50", "CrossKD student", 41.8),
    Checkpoint("crosskd_retinanet_r50_swin_t", "retinanet_r50", "CrossKD student", 38.0),
    Checkpoint("head_assistant_retinanet_r18", "retinanet_r18", "HEAD student", 33.4),
    Checkpoint("head_akd_retinanet_r18", "retinanet_r18", "HEAD student", 35.7),
    Checkpoint("head_retinanet_r18", "retinanet_r18", "HEAD student", 36.1),
    Checkpoint(
        "head_assistant_retinanet_mobilenetv2", "retinanet_mobilenetv2_head", "HEAD student", 28.9
    ),
    Checkpoint(
        "head_akd_retinanet_mobilenetv2", "retinanet_mobilenetv2_head", "HEAD student", 32.2
    ),
    Checkpoint("head_retinanet_mobilenetv2", "retinanet_mobilenetv2_head", "HEAD student", 33.1),
)
"""AP as the papers' own releases quote it, else as MMDetection's list does."""


def list_checkpoints(pattern: str = "*") -> list[Checkpoint]:
    """Those whose name or detector matches a shell pattern."""
    return [c for c in CHECKPOINTS if fnmatch(c.name, pattern) or fnmatch(c.detector, pattern)]


def cache_folder() -> Path:
    """Where `fetch` keeps files: `DETDISTILL_CACHE`, else detdistill in the user's cache."""
    own = os.environ.get("DETDISTILL_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detdistill"


def find_checkpoint(name: str) -> Checkpoint:
    """By name; `UserError` with the nearest for an unknown one."""
    for checkpoint in CHECKPOINTS:
        if checkpoint.name == name:
            return checkpoint
    raise UserError(f"unknown checkpoint {name!r}; {nearest(name, (c.name for c in CHECKPOINTS))}")


def fetch(
    name: str, folder: Path | None = None, progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """The file of a published checkpoint, downloaded once and verified by its hash.

    Args:
        name: see `list_checkpoints`.
        folder: where it is kept; `cache_folder()` if None.
        progress: called with the bytes read so far and in all (None where the server does not say).

    Raises:
        UserError: no such name, no verified address, no network, another file at the address.
    """
    checkpoint = find_checkpoint(name)
    if checkpoint.address is None or checkpoint.file is None:
        raise UserError(
            f"{name}: its address could not be verified and is left out; get the file from the "
            f"authors' own page and load it: load_detector({checkpoint.detector!r}, FILE)"
        )
    target = (folder or cache_folder()) / checkpoint.file
    if target.exists():
        with target.open("rb") as stream:
            _check(hashlib.file_digest(stream, "sha256").hexdigest(), checkpoint, target)
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _download(checkpoint.address, partial, progress or (lambda done, total: None))
        _check(digest, checkpoint, Path(checkpoint.address))
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(_unreachable(checkpoint, target, error)) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _download(address: str, target: Path, progress: Callable[[int, int | None], None]) -> str:
    """Writes what is at an address; its SHA-256."""
    digest, done = hashlib.sha256(), 0
    with _open(address) as answer, target.open("wb") as file:
        length = answer.headers.get("Content-Length")
        total = int(length) if length is not None and length.isdigit() else None
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and done != total:
        raise ConnectionError(f"it ended after {done} of {total} bytes")
    return digest.hexdigest()


def _open(address: str) -> Any:
    return urllib.request.urlopen(address, timeout=TIMEOUT)


def _check(digest: str, checkpoint: Checkpoint, place: Path | str) -> None:
    if not digest.startswith(str(checkpoint.digest)):
        raise UserError(
            f"{place}: the SHA-256 starts with {digest[:8]}, {checkpoint.name} has "
            f"{checkpoint.digest}; it is another file or a damaged one: delete it and fetch again"
        )


def _unreachable(checkpoint: Checkpoint, target: Path, error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        reason = f"the server answers {error.code}"
    else:
        reason = " ".join(str(getattr(error, "reason", error)).split())
    return (
        f"{checkpoint.name} could not be fetched ({reason}); without a network, download "
        f"{checkpoint.address} elsewhere and save it as {target}"
    )

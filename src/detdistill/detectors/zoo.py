"""Published checkpoints of the papers: which there are, and how to get one."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from detdistill.errors import UserError
from detdistill.registry import nearest

OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0/"
DRIVE = "https://drive.google.com/"
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
        folder: between OpenMMLab's server and the file; None where the file is elsewhere.
        file: ends with "-" and the first 8 digits of its SHA-256; None where it is not known.
        page: for a browser, where the authors' README links the file; without a hash, so that
            nothing could verify a download. None where no link was found.
    """

    name: str
    detector: str
    role: str
    ap: float | None
    folder: str | None = None
    file: str | None = None
    page: str | None = None

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


def _crosskd(name: str, detector: str, ap: float, file_id: str) -> Checkpoint:
    """A file that CrossKD's README links (https://github.com/jbwang1997/CrossKD)."""
    role = "CrossKD teacher" if name.startswith("teacher") else "CrossKD student"
    role = "CrossKD + PKD student" if name.startswith("pkd") else role
    page = f"{DRIVE}file/d/{file_id}/view"
    return Checkpoint(f"crosskd_{name}", detector, role, ap, page=page)


def _head(name: str, detector: str, ap: float) -> Checkpoint:
    """A file in the folder that HEAD's README links (https://github.com/LutingWang/HEAD)."""
    page = f"{DRIVE}drive/folders/1cs9WWyBaZmstsKlwnMv7PE9ky-i98WUh"
    return Checkpoint(f"head_{name}", detector, "HEAD student", ap, page=page)


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
        "faster_rcnn",
        "faster_rcnn_r50_fpn_1x_coco",
        "faster_rcnn_r50",
        "CrossKD teacher",
        37.4,
        "_20200130-047c8118",
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
    _openmmlab(
        "retinanet",
        "retinanet_r50_fpn_2x_coco",
        "retinanet_r50",
        "CrossKD, student without a teacher",
        37.4,
        "_20200131-fdb43119",
    ),
    _openmmlab(
        "fcos",
        "fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco",
        "fcos_r50_caffe_gn",
        "CrossKD, student without a teacher",
        38.5,
        "-d92ceeea",
    ),
    _openmmlab(
        "atss",
        "atss_r50_fpn_1x_coco",
        "atss_r50",
        "CrossKD, student without a teacher",
        39.4,
        "_20200209-985f7bd0",
    ),
    # MMDetection's list has no Cascade R-CNN of this schedule; the authors' own is not linked.
    Checkpoint("head_teacher_cascade_rcnn_r50", "cascade_rcnn_r50", "HEAD teacher", None),
    _crosskd(
        "teacher_retinanet_swin_t", "retinanet_swin_t", 37.3, "1W2KGR77XfQ5SRomgIyxCjqUNGJichcgh"
    ),
    _crosskd("gfl_r50", "gfl_r50", 43.7, "1S7fyDkFSAauJry0ZGS-ZW-P3CJb7RlsO"),
    _crosskd("retinanet_r50", "retinanet_r50", 39.7, "1fjwtuoKd4a_b5CHf6X0tKDmSNlwzYfWb"),
    _crosskd("fcos_r50", "fcos_r50_caffe_gn", 41.1, "1ll5vOGFMEfOsNCkgbPuqh0uMNFnfICbE"),
    _crosskd("atss_r50", "atss_r50", 41.8, "1qyxOMaxQrwJ20tEgIwU8pi31O8A1hsEG"),
    _crosskd("retinanet_r50_swin_t", "retinanet_r50", 38.0, "17rbkcXgqKfVUweRgzK7NtqFcLC-PohKX"),
    _crosskd("pkd_gfl_r50", "gfl_r50", 43.9, "1LJZ27al2omdXb3cUty-RX37pMLp8L-4B"),
    _crosskd("pkd_retinanet_r50", "retinanet_r50", 39.8, "1Ha9r5DrzaZ_9tz8x9PVxOkGaKAApIBGd"),
    _crosskd("pkd_fcos_r50", "fcos_r50_caffe_gn", 41.3, "1r-UzxAOYOfPJFIV5e7Rd3P3uC9gXP09v"),
    _crosskd("pkd_atss_r50", "atss_r50", 41.8, "1LkuKau1Na843ZPSNz77DqV8v8111b2_y"),
    _head("assistant_retinanet_r18", "retinanet_r18", 33.4),
    _head("akd_retinanet_r18", "retinanet_r18", 35.7),
    _head("retinanet_r18", "retinanet_r18", 36.1),
    _head("assistant_retinanet_mobilenetv2", "retinanet_mobilenetv2_head", 28.9),
    _head("akd_retinanet_mobilenetv2", "retinanet_mobilenetv2_head", 32.2),
    _head("retinanet_mobilenetv2", "retinanet_mobilenetv2_head", 33.1),
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
        UserError: no such name, no address to download from, no network, another file there.
    """
    checkpoint = find_checkpoint(name)
    if checkpoint.address is None or checkpoint.file is None:
        raise UserError(_not_fetched(checkpoint))
    target = (folder or cache_folder()) / checkpoint.file
    if target.exists():
        with target.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        _check(digest, checkpoint, str(target), ": delete it and fetch again")
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    made = [place for place in (target.parent, *target.parent.parents) if not place.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _download(checkpoint.address, partial, progress or (lambda done, total: None))
        _check(digest, checkpoint, checkpoint.address, " and was not kept; try again later")
        os.replace(partial, target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(_unreachable(checkpoint, target, error)) from None
    finally:
        partial.unlink(missing_ok=True)
        with suppress(OSError):  # nothing half-made is left; what holds a file stays
            for place in made:
                place.rmdir()
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


def _check(digest: str, checkpoint: Checkpoint, place: str, way_out: str) -> None:
    if not digest.startswith(str(checkpoint.digest)):
        raise UserError(
            f"{place}: the SHA-256 starts with {digest[:8]}, {checkpoint.name} has "
            f"{checkpoint.digest}; it is another file or a damaged one{way_out}"
        )


def _not_fetched(checkpoint: Checkpoint) -> str:
    if checkpoint.page is None:
        return (
            f"{checkpoint.name}: no address of this file could be verified; ask its authors for "
            f"it, then load_detector({checkpoint.detector!r}, FILE) reads it"
        )
    return (
        f"{checkpoint.name} is on a page for browsers, and no hash is published that could verify "
        f"a download; save it from {checkpoint.page}, then "
        f"load_detector({checkpoint.detector!r}, FILE) reads it"
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

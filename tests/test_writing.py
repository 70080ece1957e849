"""Files that appear whole or not at all, and disks that are full."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from detdistill.engine import checkpoint
from detdistill.errors import UserError
from detdistill.writing import disk_faults_told, written


def test_a_file_is_replaced_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_name_that_is_no_utf8_can_be_written_down(tmp_path: Path) -> None:
    checkpoint.write_text(tmp_path / "faults.txt", os.fsdecode(b"gr\xfcn.jpg") + ": damaged")
    assert (tmp_path / "faults.txt").read_text() == "gr\\udcfcn.jpg: damaged"


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written(path) as file:
        file.write(b"half of the ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (errno.ENOSPC, "run/last.ckpt: No space left on device; make room and give the same"),
        (errno.EACCES, "run/last.ckpt: Permission denied; see to it"),
        (errno.EROFS, "run/last.ckpt: Read-only file system; see to it"),
    ],
)
def test_faults_of_the_disk_are_told(code: int, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"), disk_faults_told():
        raise OSError(code, os.strerror(code), "run/last.ckpt")


def test_other_faults_are_bugs() -> None:
    with pytest.raises(FileNotFoundError), disk_faults_told():
        raise FileNotFoundError(errno.ENOENT, "gone", "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_a_checkpoint_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[BinaryIO]:
        with open("/dev/full", "wb", buffering=0) as file:
            yield file

    monkeypatch.setattr(checkpoint, "written", full)
    with pytest.raises(UserError, match=r"^No space left on device; make room"), disk_faults_told():
        checkpoint.save_checkpoint(tmp_path / "last.ckpt", {"weights": torch.zeros(99999)})


def test_a_checkpoint_interrupted_is_an_interruption(tmp_path: Path) -> None:
    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes == 5:
                raise KeyboardInterrupt
            return super().write(data)

    @contextmanager
    def interrupted(path: Path) -> Iterator[BinaryIO]:
        yield Interrupted()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "written", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_checkpoint(tmp_path / "last.ckpt", {"weights": torch.zeros(99999)})

"""Published checkpoints: the list, and a download that trusts nothing but the hash."""

import hashlib
import io
import re
import urllib.error
from dataclasses import replace
from types import SimpleNamespace

import pytest

from detdistill import UserError
from detdistill.detectors import zoo
from detdistill.detectors.registry import FAMILIES

CONTENT = b"weights" * 1000
NAME = "gfl_r50_fpn_1x_coco"


class Answer(io.BytesIO):
    def __init__(self, content, length=None):
        super().__init__(content)
        self.headers = {} if length is None else {"Content-Length": str(length)}


@pytest.fixture
def server(monkeypatch):
    """Serves `CONTENT` at every address, for a checkpoint of its hash; counts the visits."""
    digest = hashlib.sha256(CONTENT).hexdigest()[:8]
    entry = replace(zoo.find_checkpoint(NAME), file=f"gfl_r50-{digest}.pth")
    monkeypatch.setattr(zoo, "CHECKPOINTS", (entry, *zoo.CHECKPOINTS[2:]))
    served = SimpleNamespace(visits=[], answer=lambda: Answer(CONTENT, len(CONTENT)))

    def visit(address):
        served.visits.append(address)
        return served.answer()

    monkeypatch.setattr(zoo, "_open", visit)
    return served


def test_a_file_is_fetched_once_and_verified(server, tmp_path):
    seen = []
    path = zoo.fetch(NAME, tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert zoo.fetch(NAME, tmp_path / "new") == path
    [address] = server.visits
    assert address.startswith("https://download.openmmlab.com/mmdetection/v2.0/gfl/")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda: Answer(b"another file"),
            r"https://down\S+: the SHA-256 starts with \w{8}, gfl_r50_fpn_1x_coco has.* not kept",
        ),
        (lambda: Answer(CONTENT[:99], len(CONTENT)), "ended after 99 of 7000 bytes"),
        (lambda: Answer(CONTENT[:99]), "SHA-256 starts with"),
    ],
)
def test_another_or_a_truncated_file_is_not_kept(server, answer, message, tmp_path):
    server.answer = answer
    with pytest.raises(UserError, match=message):
        zoo.fetch(NAME, tmp_path)
    with pytest.raises(UserError, match=message):
        zoo.fetch(NAME, tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_told(server, tmp_path):
    path = zoo.fetch(NAME, tmp_path)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=rf"{path.name}: the SHA-256.*delete it and fetch again"):
        zoo.fetch(NAME, tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "Name or service"),
        (urllib.error.HTTPError("https://a", 404, "", None, None), "the server answers 404"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_without_a_network_it_says_what_to_do(server, error, reason, tmp_path):
    def fail():
        raise error

    server.answer = fail
    with pytest.raises(UserError, match=rf"could not be fetched \(.*{reason}") as told:
        zoo.fetch(NAME, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    assert "download https://download.openmmlab.com/" in str(told.value)
    assert str(tmp_path / "new" / "gfl_r50-") in str(told.value)


def test_unverified_addresses_and_unknown_names(tmp_path):
    page = r"save it from https://drive.google.com/\S+, then load_detector\('gfl_r50', FILE\)"
    with pytest.raises(UserError, match=f"no hash is published.*{page}"):
        zoo.fetch("crosskd_gfl_r50", tmp_path)
    with pytest.raises(UserError, match="no address of this file could be verified; ask its"):
        zoo.fetch("head_teacher_cascade_rcnn_r50", tmp_path)
    with pytest.raises(UserError, match="did you mean 'gfl_r50_fpn_1x_coco'"):
        zoo.fetch("gfl_r50_fpn_1x", tmp_path)


def test_the_list():
    names = [c.name for c in zoo.CHECKPOINTS]
    assert len(set(names)) == len(names)
    # The hashes that the papers' released configurations name; the last is of the teacher of
    # CrossKD's two-stage variant, of which none names any, by MMDetection's own list.
    published = "dd12f847 25944287 5560aee8 c2398f9e 511424d6 dfcadd6f e10bd31c 91babaa2 88476508"
    published += " fdb43119 d92ceeea 985f7bd0 047c8118"
    assert {c.digest for c in zoo.CHECKPOINTS if c.file} == set(published.split())
    for checkpoint in zoo.CHECKPOINTS:
        assert (checkpoint.address is None) == (checkpoint.file is None)
        assert checkpoint.file is None or checkpoint.page is None
        if checkpoint.file:
            assert re.fullmatch(r"[0-9a-f]{8}", checkpoint.digest)
            assert "+" not in checkpoint.address
    pages = [c.page for c in zoo.CHECKPOINTS if c.page and "/file/" in c.page]
    assert len(set(pages)) == len(pages) == 10
    assert [c.name for c in zoo.list_checkpoints("atss_r101")] == ["atss_r101_fpn_1x_coco"]
    assert {c.detector.split("_")[0] for c in zoo.list_checkpoints("gfl*")} == {"gfl"}
    known = [c for c in zoo.CHECKPOINTS if c.detector.startswith(tuple(FAMILIES.names()))]
    assert len(known) >= 20


def test_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("DETDISTILL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / "detdistill"
    monkeypatch.setenv("DETDISTILL_CACHE", str(tmp_path / "own"))
    assert zoo.cache_folder() == tmp_path / "own"

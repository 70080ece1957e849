"""Weights and names that no command can use: one sentence, nothing written, nothing run."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detdistill import save_detector
from detdistill.detectors import to_mmdetection_state, zoo
from detdistill.errors import UserError
from tests.cli.conftest import Run
from tests.cli.test_cli_bad_input import refused
from tests.helpers import narrow

CLASSES = 10  # of the built-in data
SMALL = [
    *("--set", "max_steps=1", "--set", "resize_short=[64]", "--set", "resize_long=64"),
    *("--set", "batch_size=2", "--set", "workers=0"),
]
NARROW = ["--set", "student_options={base_channels: 8, fpn_channels: 16, tower_channels: 16}"]
CHECKPOINT = "gfl_r50_fpn_1x_coco"


class Evil:
    """A pickle that would make a folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("hacked",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good weights and bad ones; no test writes here."""
    folder = tmp_path_factory.mktemp("weights")
    good, other = narrow("gfl_r18", CLASSES), narrow("retinanet_r18", CLASSES)
    save_detector(good, folder / "good.safetensors")
    save_detector(other, folder / "other.safetensors")
    ours, facts = ((folder / f"good.{end}").read_bytes() for end in ("safetensors", "json"))
    theirs = to_mmdetection_state(good)
    torch.save(theirs, folder / "good.pth")
    torch.save(to_mmdetection_state(other), folder / "retinanet.pth")
    torch.save({"state_dict": theirs, "hook": Evil()}, folder / "evil_hook.pth")
    torch.save({"a": torch.zeros(1)}, folder / "alien.pth")
    torch.save({"epoch": 3}, folder / "no_table.pth")
    contents = {
        "cut.safetensors": ours[:-999],
        "cut.json": facts,
        "other.json": facts,
        "evil.safetensors": pickle.dumps(Evil()),
        "evil.json": facts,
        "evil.pth": pickle.dumps({"state_dict": Evil()}),
        "misspelt.safetensors": ours,
        "misspelt.json": facts.replace(b"gfl_r18", b"glf_r18"),
        "damaged.safetensors": ours,
        "damaged.json": facts[:99],
        "lone.safetensors": (folder / "other.safetensors").read_bytes(),
        "cut.pth": (folder / "good.pth").read_bytes()[:5000],
        "page.pth": b"<!DOCTYPE html>",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "unfinished").mkdir()
    return folder


FAULTS: dict[str, tuple[str | None, str, list[str]]] = {
    "truncated": (None, "cut.safetensors", ["cut.safetensors: not a readable", "truncated"]),
    "truncated pickle": ("gfl_r18", "cut.pth", ["cut.pth: not a readable", "truncated"]),
    "web page": ("gfl_r18", "page.pth", ["page.pth: not a readable", "b'<!DOCTYPE html>'"]),
    "pickle of code": ("gfl_r18", "evil.pth", ["evil.pth", "could run code", "torch.save("]),
    "code beside": ("gfl_r18", "evil_hook.pth", ["mkdir), which could run code"]),
    "code, renamed": (None, "evil.safetensors", ["holds what a .pth file holds"]),
    "another family": ("gfl_r18", "retinanet.pth", ["of retinanet_r18, not of gfl_r18; name it"]),
    "another's facts": (None, "other.safetensors", ["does not fit gfl_r18", "choose the detector"]),
    "another framework": ("gfl_r18", "alien.pth", ["not the weights of gfl_r18", "called a; name"]),
    "no tensors": ("gfl_r18", "no_table.pth", ["no table of tensors", "save one: torch.save("]),
    "no facts": (None, "lone.safetensors", ["no lone.json beside it", "--detector gfl_r50"]),
    "damaged facts": (None, "damaged.safetensors", ["damaged.json: not a model.json", "copy it"]),
    "misspelt facts": (None, "misspelt.safetensors", ["misspelt.json: ", "'gfl_r18'?"]),
    "unfinished run": (None, "unfinished", ["no model.safetensors in this", "run finished?"]),
    "no such file": (None, "gone.safetensors", ["gone.safetensors: no such", "run folder"]),
    "misspelt": ("glf_r18", "good.pth", ["unknown detector 'glf_r18'; did you mean 'gfl_r18'?"]),
    "too few levels": ("gfl_test_vit", "good.pth", ["[16, 16, 16]", "needs 8, 16 and 32", "timm"]),
}


def commands(name: str | None, file: str, good: str, data: str) -> dict[str, list[str]]:
    """Each command that takes trained weights."""
    weights = ["--weights", file, *([] if name is None else ["--detector", name])]
    model = file if name is None else f"{name}={file}"
    run = ["--data", data, "--out", "run"]
    student = ["--student", "gfl_r18", *SMALL, *NARROW]
    return {
        "eval": ["eval", *weights, "--data", data],
        "predict": ["predict", *weights, f"{data}/images/test_000000.jpg", "--out", "run"],
        "export": ["export", *weights, "--out", "run/model.onnx"],
        "convert": ["convert", *weights, "--out", "run/new.safetensors"],
        "convert back": ["convert", *weights, "--out", "run/new.pth"],
        "distill": ["distill", "--teacher", model, "--method", "crosskd", *student, *run],
        "compare": ["compare", "--teacher", model, "--methods", "crosskd", *student, *run],
        "analyze teacher": ["analyze", "--teacher", model, "--student", good, *run],
        "analyze student": ["analyze", "--student", model, "--teacher", good, *run],
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_trained_weights(fault: str, run: Run, folder: Path, tiny_data: Path) -> None:
    name, file, fragments = FAULTS[fault]
    good = str(folder / "good.safetensors")
    if file in ("damaged.safetensors", "misspelt.safetensors"):
        good = str(folder / "other.safetensors")  # `analyze` refuses equal weights before
    for arguments in commands(name, str(folder / file), good, str(tiny_data)).values():
        if arguments[:2] == ["analyze", "--student"] and "other" in good:
            continue  # its teacher could not be loaded either
        refused(run, arguments, *fragments)
        assert not Path("hacked").exists()


@pytest.mark.parametrize(
    "fault", ["truncated pickle", "pickle of code", "another family", "misspelt", "too few levels"]
)
def test_doctor_lists_a_teacher_that_cannot_be_loaded(
    fault: str, run: Run, folder: Path, tiny_data: Path
) -> None:
    """A finding among others, exit code 1."""
    name, file, fragments = FAULTS[fault]
    model = str(folder / file) if name is None else f"{name}={folder / file}"
    arguments = ["doctor", "--teacher", model, "--student", "gfl_r18", "--data", str(tiny_data)]
    arguments += ["--method", "crosskd", "--images", "2", *SMALL, *NARROW]
    code, out, err = run(*arguments)
    assert (code, err) == (1, "")
    [_, teacher] = out.split("\nTeacher\n")
    problem, advice, *_ = teacher.splitlines()
    assert problem.startswith("  problem ") and advice.lstrip().startswith("-> ")
    sentence = f"{problem}; {advice.partition('-> ')[2]}"
    assert all(fragment in sentence for fragment in fragments), sentence
    assert os.listdir() == []


BACKBONES = {
    "cut.pth": ["cut.pth: not a readable", "truncated"],
    "evil.pth": ["evil.pth", "could run code"],
    "evil_hook.pth": ["mkdir), which could run code"],
    "alien.pth": ["alien.pth does not fit the backbone resnet", "the file of this very network"],
    "gone.pth": ["gone.pth: no such file with weights of the backbone resnet"],
}


@pytest.mark.parametrize("file", BACKBONES)
def test_weights_of_a_backbone(file: str, run: Run, folder: Path, tiny_data: Path) -> None:
    given = ["--data", str(tiny_data), *SMALL, "--set"]
    pair = ["--teacher", str(folder / "good.safetensors"), "--student", "gfl_r18"]
    unborn = ["--teacher", "gfl_r34", *pair[2:]]
    own = f"student_options={{base_channels: 8, backbone_weights: {folder / file}}}"
    teachers = f"teacher_options={{base_channels: 8, backbone_weights: {folder / file}}}"
    for arguments in (
        ["train", "--detector", "gfl_r18", "--out", "run", *given, own],
        ["distill", *pair, "--method", "crosskd", "--out", "run", *given, own],
        ["compare", *pair, "--methods", "crosskd", "--out", "run", *given, own],
        ["compare", *unborn, "--methods", "crosskd", "--out", "run", *NARROW, *given, teachers],
        ["doctor", *pair, *given, own],
    ):
        refused(run, arguments, *BACKBONES[file])
        assert not Path("hacked").exists()


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("glf_r18", ["glf_r18", "did you mean 'gfl_r18'?"]),
        ("gfl_test_vit", ["'test_vit'", "strides [16, 16, 16], a pyramid needs 8, 16 and 32"]),
    ],
)
def test_names_of_detectors(
    name: str, fragments: list[str], run: Run, folder: Path, tiny_data: Path
) -> None:
    given = ["--data", str(tiny_data), *SMALL]
    teacher = ["--teacher", str(folder / "good.safetensors")]
    unborn = ["--teacher", name, "--student", "gfl_r18", *NARROW]
    for arguments in (
        ["train", "--detector", name, "--out", "run", *given],
        ["distill", *teacher, "--student", name, "--method", "crosskd", "--out", "run", *given],
        ["compare", *teacher, "--student", name, "--methods", "crosskd", "--out", "run", *given],
        ["compare", *unborn, "--methods", "crosskd", "--out", "run", *given],
        ["doctor", "--student", name, *given],
        ["doctor", *unborn, *given],
    ):
        refused(run, arguments, *fragments)


def test_a_checkpoint_to_go_on_from(
    run: Run, folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(run: object) -> None:
        raise UserError("stopped")

    monkeypatch.setattr("detdistill.engine.train._loop", stop)
    train = ["train", "--detector", "gfl_r18", "--data", str(tiny_data), "--out", "begun"]
    assert run(*train, *SMALL, *NARROW)[0] == 2
    before = sorted(os.listdir("begun"))
    for file in ("evil.pth", "evil_hook.pth", "cut.pth", "good.pth"):
        Path("begun/last.ckpt").write_bytes((folder / file).read_bytes())
        refused(run, [*train, *SMALL, *NARROW, "--resume"], "last.ckpt: not a checkpoint", "delete")
        Path("begun/last.ckpt").unlink()
        assert sorted(os.listdir("begun")) == before and not Path("hacked").exists()


def test_a_download_with_another_hash(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BytesIO):
        headers = SimpleNamespace(get=lambda name: None)

    monkeypatch.setattr(zoo, "_open", lambda address: Answer(b"another file"))
    told = refused(run, ["fetch", CHECKPOINT, "--out", "cache"], "SHA-256", "try again later")
    assert zoo.find_checkpoint(CHECKPOINT).address in told and not os.path.exists("cache")
    entry = replace(zoo.find_checkpoint(CHECKPOINT), file="gfl_r50-00000000.pth")
    monkeypatch.setattr(zoo, "CHECKPOINTS", (entry,))
    Path("cache").mkdir()
    Path("cache/gfl_r50-00000000.pth").write_bytes(b"truncated")
    refused(run, ["fetch", CHECKPOINT, "--out", "cache"], "SHA-256", "delete it and fetch again")
    assert Path("cache/gfl_r50-00000000.pth").read_bytes() == b"truncated"
    refused(run, ["fetch", "gfl_r50_fpn_1x", "--out", "run"], f"did you mean '{CHECKPOINT}'?")
    place = "cache/gfl_r50-00000000.pth/here"
    refused(run, ["fetch", CHECKPOINT, "--out", place], f"--out {place}", "is a file")

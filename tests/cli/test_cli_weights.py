"""convert and fetch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detdistill import create_detector, load_detector, save_detector
from detdistill.detectors import to_mmdetection_state, zoo
from tests.cli.conftest import Run
from tests.detectors.test_torchvision_models import build
from tests.helpers import narrow


def test_from_mmdetection_and_back(run: Run) -> None:
    state = to_mmdetection_state(narrow("gfl_r18", 4))
    torch.save({"meta": {}, "state_dict": state}, "theirs.pth")
    convert = ["convert", "--detector", "gfl_r18", "--weights", "theirs.pth"]
    code, out, err = run(*convert, "--out", "new/ours.safetensors")
    assert code == 0, err
    assert "wrote new/ours.safetensors: gfl_r18 with 4 classes" in out
    assert "Next: detdistill eval --weights new/ours.safetensors --data FOLDER" in out

    code, out, err = run("convert", "--weights", "new/ours.safetensors", "--out", "back.pth")
    assert code == 0, err
    assert f"{len(state)} tensors under MMDetection's names" in out
    back = torch.load("back.pth", weights_only=True)["state_dict"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_from_torchvision_and_back(run: Run) -> None:
    state = build("fcos").state_dict()
    torch.save({"model": state}, "theirs.pth")
    convert = ["convert", "--detector", "fcos_r18", "--weights", "theirs.pth"]
    code, out, err = run(*convert, "--out", "ours.safetensors", "--set", "labels=[1, 2]")
    assert code == 0, err
    assert "torchvision_fcos_r18 with 2 classes" in out
    code, out, err = run("convert", "--weights", "ours.safetensors", "--out", "back.pth")
    assert code == 0, err
    assert "under torchvision's names" in out and "model.load_state_dict(torch.load(" in out
    back = torch.load("back.pth", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_classes_travel_and_options_are_taken(run: Run) -> None:
    detector = narrow("fcos_r18", 2, center_sampling=True)
    torch.save(to_mmdetection_state(detector), "theirs.pth")
    convert = ["convert", "--detector", "fcos_r18", "--weights", "theirs.pth"]
    sampling = ["--set", "center_sampling=true"]
    assert run(*convert, "--out", "ours.safetensors", *sampling)[0] == 0
    loaded = load_detector("ours.safetensors")
    assert loaded.options["center_sampling"] is True
    loaded.classes = ["cat", "dog"]
    save_detector(loaded, Path("named.safetensors"))
    assert run("convert", "--weights", "named.safetensors", "--out", "named.pth")[0] == 0
    meta = torch.load("named.pth", weights_only=True)["meta"]
    assert meta == {"CLASSES": ["cat", "dog"], "dataset_meta": {"classes": ["cat", "dog"]}}


def test_what_is_left_out_is_a_plain_sentence(run: Run) -> None:
    state = to_mmdetection_state(narrow("retinanet_r18"))
    state = {key.replace("bbox_head.", "rpn_head."): tensor for key, tensor in state.items()}
    torch.save({"state_dict": {**state, "roi_head.a": torch.zeros(1)}}, "head.pth")
    convert = ["convert", "--detector", "retinanet_r18", "--weights", "head.pth"]
    code, _, err = run(*convert, "--out", "student.safetensors")
    assert code == 0, err
    assert err.startswith("detdistill: head.pth: the student alone is loaded; left out: 1 tensors")
    assert len(err.splitlines()) == 1


def test_partial(run: Run) -> None:
    state = to_mmdetection_state(narrow("gfl_r18"))
    del state["bbox_head.gfl_reg.bias"]
    torch.save(state, "theirs.pth")
    convert = ["convert", "--detector", "gfl_r18", "--weights", "theirs.pth", "--out"]
    code, _, err = run(*convert, "ours.safetensors")
    assert code == 2 and "missing distributions.bias" in err
    assert not Path("ours.safetensors").exists()
    code, _, err = run(*convert, "ours.safetensors", "--partial")
    assert code == 0 and "1 tensors, which were left as they are: missing distributions.bias" in err


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--weights", "gone.pth", "--out", "a.safetensors"], "gone.pth: no such weights file"),
        (["--weights", "gone.pth", "--out", "a.onnx"], "--out a.onnx: expected a name that ends"),
        (["--weights", "ours.safetensors", "--out", "ours.safetensors"], "already exists"),
        (["--weights", "ours.safetensors", "--out", "ours.json/a.pth"], "ours.json is a file"),
        (["--weights", "ours.safetensors", "--out", "a.pth"], "no backbone 'mobilenetv3_small_050"),
        (
            ["--weights", "x.pth", "--out", "a.safetensors", "--detector", "gfl_r81"],
            "did you mean 'gfl_r18'",
        ),
        (
            "--weights x.pth --out a.safetensors --detector gfl_r18 --set fpn_chanels=3".split(),
            "did you mean 'fpn_channels'",
        ),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_refusals(arguments: list[str], fragment: str, run: Run) -> None:
    torch.save(to_mmdetection_state(narrow("gfl_r18")), "x.pth")
    options = {"backbone": "mobilenetv3_small_050", "fpn_channels": 8, "tower_channels": 8}
    save_detector(create_detector("gfl", 2, **options), Path("ours.safetensors"))
    code, _, err = run("convert", *arguments)
    assert code == 2
    [sentence] = err.splitlines()
    assert sentence.startswith("detdistill: ") and fragment in sentence
    assert not any(Path(name).exists() for name in ("a.safetensors", "a.pth", "a.json"))


def test_fetch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "atss_r101_fpn_1x_coco"
    monkeypatch.setattr(zoo, "fetch", lambda name, out, progress: Path("cache/atss.pth"))
    code, out, err = run("fetch", name)
    assert (code, out) == (0, "cache/atss.pth\n")
    assert "--weights cache/atss.pth --detector atss_r101 --data FOLDER" in err
    code, _, err = run("fetch", "atss_r101")
    assert code == 2 and "did you mean 'atss_r101_fpn_1x_coco'?" in err


def test_list_checkpoints(run: Run) -> None:
    code, out, err = run("list", "checkpoints", "*retinanet_r18")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines][-1] == "head_retinanet_r18"
    assert all("not fetched, see https://drive.google.com/drive/folders/" in line for line in lines)
    assert "AP 36.1" in lines[-1] and "Next: detdistill fetch NAME" in err

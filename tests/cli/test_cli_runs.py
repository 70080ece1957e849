"""The commands in the order in which a user gives them, on images of 64 pixels."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from detdistill import create_detector, save_detector
from detdistill.cli import training, using
from detdistill.evaluation.coco import NUMBERS
from detdistill.recipe import Recipe
from tests.cli.conftest import Run

NARROW = {"base_channels": 8, "fpn_channels": 32, "tower_channels": 64}
SMALL = [
    *("--set", "max_steps=2", "--set", "resize_short=[64]", "--set", "resize_long=64"),
    *("--set", "batch_size=2", "--set", "workers=0", "--set", "epochs=1"),
    *("--set", "student_options={base_channels: 8, fpn_channels: 32, tower_channels: 64}"),
]
TRAIN = ["train", "--detector", "gfl_r18", "--data", "my_coco", "--out", "teacher", *SMALL]


def test_from_data_to_comparison(run: Run, my_coco: Path) -> None:
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert "Next: detdistill distill --teacher teacher" in out
    assert "--set 'resize_short=[64]'" in out and "student_options" not in out
    assert Path("teacher/model.safetensors").exists()

    distill = ["distill", "--teacher", "teacher", "--student", "gfl_r18", "--method", "crosskd"]
    code, out, err = run(*distill, "--data", "my_coco", "--out", "distilled", *SMALL)
    assert code == 0, err
    assert "Next: detdistill eval --weights distilled" in out
    assert "the teacher was trained at" not in err
    larger = ["--set", "resize_long=96", "--out", "larger", "--resume"]
    code, out, err = run(*distill, "--data", "my_coco", *SMALL, *larger)
    assert code == 0, err
    told = "trained at short side 64, long 64; this run shows images at short side 64, long 96"
    assert told in err and "nothing to go on with in this folder; it starts anew" in err

    code, out, err = run("eval", "--weights", "distilled", "--data", "my_coco")
    assert code == 0, err
    assert err == ""
    header, numbers = out.splitlines()[1:3]
    assert header.split() == list(NUMBERS) and len(numbers.split()) == 12
    assert "Next: detdistill predict --weights distilled" in out

    images = sorted(str(path) for path in Path("my_coco/images").glob("test_*"))
    predict = ["predict", "--weights", "distilled", *images, "--out", "pictures"]
    code, out, err = run(*predict)
    assert code == 0, err
    records = json.loads(Path("pictures/predictions.json").read_text())
    assert [record["image"] for record in records] == images
    assert all(Path("pictures", record["picture"]).stat().st_size > 0 for record in records)
    code, _, err = run(*predict)
    assert code == 2
    assert "already holds predictions.json" in err
    assert run(*predict[:-1], "low", "--score", "0")[0] == 0
    [low, *_] = json.loads(Path("low/predictions.json").read_text())
    assert min(found["score"] for found in low["detections"]) < 0.05


def test_predict_overwrites_nothing_and_leaves_no_half(
    run: Run, my_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_foreign(Path("weights.safetensors"))
    image = next((my_coco / "images").glob("test_*"))
    named = Path("n" * 240 + image.suffix)
    shutil.copy(image, named)
    command = ["predict", "--weights", "weights.safetensors", str(named), str(named)]
    assert run(*command, "--out", "out")[0] == 0
    assert len(list(Path("out").glob("*.png"))) == 2

    Path("out/predictions.json").unlink()
    code, _, err = run(*command, "--out", "out")
    assert code == 2 and "already exists; choose another --out" in err

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("detdistill.cli.predictions.write_text", full)
    code, _, err = run(*command, "--out", "full")
    assert code == 2 and "No space left on device; make room" in err
    assert list(Path("full").iterdir()) == []


def save_foreign(path: Path, num_classes: int = 10, seed: int = 0) -> None:
    """Weights that do not say at which size they were trained."""
    torch.manual_seed(seed)
    save_detector(create_detector("gfl_r18", num_classes, **NARROW), path)


def test_eval_tells_of_faults_and_sizes(run: Run, my_coco: Path) -> None:
    save_foreign(Path("foreign.safetensors"))
    annotations = my_coco / "annotations/test.json"
    values = json.loads(annotations.read_text())
    image = values["images"][1]["id"]
    values["annotations"] = [
        {"id": 7, "image_id": image, "category_id": 1, "bbox": [1, 1, 0, 5], "iscrowd": 0}
    ]
    annotations.rename("moved.json")
    Path("moved.json").write_text(json.dumps(values))
    command = ["eval", "--weights", "foreign.safetensors", "--set", "workers=0"]
    code, _, err = run(*command)
    assert code == 2 and "--data FOLDER" in err

    explicit = ["--set", "test_images=my_coco/images", "--set", "test_annotations=moved.json"]
    code, out, err = run(*command, *explicit, "--set", "resize_short=[64]")
    assert code == 0, err
    fault, size = err.splitlines()
    assert fault.startswith(f"moved.json: image {image}, annotation 7: box [1, 1, 0, 5]")
    assert "resize_short=[64], resize_long=544" in size
    assert set(out.splitlines()[2].split()) == {"-"}
    assert "moved.json holds no boxes" in out

    code, _, err = run(*command, *explicit, "--strict")
    assert code == 2 and f"image {image}" in err
    code, _, err = run(*command, *explicit, "--set", "resize_short=[800]")
    assert code == 2 and "resize_short 800 is never reached" in err


def test_analyze_writes_a_page_and_its_numbers(run: Run, my_coco: Path) -> None:
    save_foreign(Path("teacher.safetensors"))
    save_foreign(Path("student.safetensors"), seed=1)
    command = ["analyze", "--teacher", "teacher.safetensors", "--student", "student.safetensors"]
    command += ["--data", "my_coco", "--split", "test", "--images", "3", "--out", "analysis"]
    small = ["--set", "workers=0", "--set", "resize_short=[64]", "--set", "resize_long=64"]
    code, out, err = run(*command, *small)
    assert code == 0, err
    *sentences, following = out.splitlines()
    assert len(sentences) == 4 and sentences[0].startswith("Labels and teacher differ")
    assert following == "Next: open analysis/report.html in a browser"
    assert "resize_short=[64]" in err
    numbers = json.loads(Path("analysis/analysis.json").read_text())
    assert numbers["images"] == 3
    assert numbers["about"]["data"].endswith("test.json, test: 3 of 4 images")
    assert sentences[0] in Path("analysis/report.html").read_text()


def test_analyze_shows_the_assistant_of_a_run(run: Run, my_coco: Path) -> None:
    torch.manual_seed(1)
    narrow = {"base_channels": 8, "fpn_channels": 16}
    save_detector(
        create_detector("faster_rcnn_r18", 10, **narrow, roi_channels=32), "teacher.safetensors"
    )
    pair = ["--teacher", "teacher.safetensors", "--data", "my_coco"]
    options = "student_options={base_channels: 8, fpn_channels: 16, tower_channels: 16}"
    size = ["--set", "resize_short=[64]", "--set", "resize_long=64", "--set", "workers=0"]
    few = ["--set", "max_steps=2", "--set", "batch_size=2", "--set", "epochs=1", "--set", options]
    distill = ["distill", "--student", "retinanet_r18", "--method", "head", *pair, "--out", "run"]
    code, _, err = run(*distill, "--set", "methods.head.warmup=0", *size, *few)
    assert code == 0, err
    command = ["analyze", "--student", "run", *pair, "--images", "2", *size]
    code, _, err = run(*command, "--out", "analysis")
    assert code == 0, err
    numbers = json.loads(Path("analysis/analysis.json").read_text())
    page = Path("analysis/report.html").read_text()
    stages = numbers["similarity"]["stages"]
    for layer in ("assistant fc 1", "assistant fc 2"):
        assert 0 < stages[layer]["boxes"] <= 1 and f">{layer}<" in page
    # Without the run the same weights have no assistant.
    command[2] = "run/model.safetensors"
    code, _, err = run(*command, "--out", "alone")
    assert code == 0, err
    alone = json.loads(Path("alone/analysis.json").read_text())["similarity"]["stages"]
    assert [stage for stage in stages if stage not in alone] == ["assistant fc 1", "assistant fc 2"]
    assert "assistant fc" not in Path("alone/report.html").read_text()


@pytest.mark.parametrize(
    ("own", "given", "used"),
    [
        ((64, 96), {}, ([64], 96)),
        ((64, 96), {"resize_short": [32]}, ([32], 96)),
        ((64, 96), {"resize_short": [32], "resize_long": 48}, ([32], 48)),
        (None, {}, ([320], 544)),
        (None, {"resize_long": 48}, ([320], 48)),
    ],
)
def test_the_size_of_an_evaluation(own: object, given: dict[str, object], used: object) -> None:
    settings = using.at_input_size(Recipe(**given), SimpleNamespace(input_size=own))
    assert (settings.resize_short, settings.resize_long) == used


@pytest.mark.parametrize("name", ["demo_quick", "bccd"])
def test_compare_takes_all_from_a_recipe(name: str, run: Run, my_coco: Path) -> None:
    teacher = ["--set", "teacher=gfl_r18"]
    teacher += ["--set", "teacher_options={base_channels: 8, fpn_channels: 32, tower_channels: 64}"]
    command = ["compare", "--recipe", name, "--seeds", "0", "--data", "my_coco", "--out", "study"]
    code, out, err = run(*command, *SMALL, *teacher)
    assert code == 0, err
    assert "ΔAP" in out
    assert "Next: open study/report.html" in out
    assert Path("study/report.html").stat().st_size > 0


def test_compare_and_distill_without_a_teacher(run: Run, my_coco: Path) -> None:
    given = ["--student", "retinanet_r18", "--data", "my_coco", *SMALL]
    code, out, err = run(
        "compare", "--methods", "tf_head", "--seeds", "0", "--out", "study", *given
    )
    assert code == 0, err
    assert "TF-HEAD" in out and "gap closed" not in out
    assert not Path("study/teacher").exists()
    # The study's recipe names a teacher, which this arm of it leaves alone.
    distill = ["distill", "--recipe", "small/head", "--method", "tf_head", "--out", "run", *given]
    code, _, err = run(*distill)
    assert code == 0, err
    facts = json.loads(Path("run/model.json").read_text())
    assert facts["provenance"]["teacher"] is None
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["teacher"] is None


def test_a_folder_with_a_run_is_kept(run: Run, my_coco: Path) -> None:
    assert run(*TRAIN)[0] == 0
    before = Path("teacher/model.safetensors").read_bytes()

    code, _, err = run(*TRAIN)
    assert code == 2
    assert "teacher holds another run" in err

    code, _, err = run(*TRAIN, "--resume", "--set", "lr=0.5")
    assert code == 2
    assert "lr: 0.02, now it is 0.5" in err

    code, _, err = run(*TRAIN, "--resume")
    assert code == 0, err
    assert Path("teacher/model.safetensors").read_bytes() == before


def test_a_recipe_trains_its_teacher_with_the_teachers_options(
    run: Run, my_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(training, "_run", lambda settings, out, resume: seen.append(settings))
    data = ["--recipe", "deeppcb", "--data", "my_coco", "--out", "run"]
    assert run("train", "--detector", "gfl_r50", *data)[0] == 0
    assert run("train", *data)[0] == 0
    assert run("train", *data, "--seed", "3", "--set", "seed=4", "--strict")[0] == 0
    assert [s.student for s in seen] == ["gfl_r50", "gfl_r18", "gfl_r18"]
    assert [s.student_options["base_channels"] for s in seen] == [32, 16, 16]
    assert all(s.teacher is None and s.methods == {} for s in seen)
    assert (seen[2].seed, seen[2].strict) == (4, True)
    data[1] = "bccd"  # both are gfl_r18
    assert run("train", "--detector", "gfl_r18", *data)[0] == 0
    assert run("train", *data)[0] == 0
    assert [s.student_options["base_channels"] for s in seen[3:]] == [32, 16]


def test_distill_keeps_the_recipes_method_options(
    run: Run, my_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.yaml").write_text(
        "student: gfl_r18\nteacher: gfl_r50\nteacher_options: {base_channels: 32}\n"
        "methods: {crosskd: {depth: 2}}\n"
    )
    Path("teacher.pth").write_bytes(b"")
    seen = []
    monkeypatch.setattr(training, "_run", lambda settings, out, resume: seen.append(settings))
    command = ["distill", "--recipe", "recipe.yaml", "--teacher", "teacher.pth"]
    command += ["--data", "my_coco", "--out", "run"]
    assert run(*command, "--method", "crosskd")[0] == 0
    assert run(*command, "--method", "crosskd", "--set", "methods.crosskd.align=false")[0] == 0
    assert [s.methods for s in seen] == [
        {"crosskd": {"depth": 2}},
        {"crosskd": {"depth": 2, "align": False}},
    ]
    # The options are of the recipe's teacher, not of the one that was given.
    assert all(s.teacher == "teacher.pth" and s.teacher_options == {} for s in seen)


def test_distill_takes_an_arm_of_the_recipe(
    run: Run, my_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("recipe.yaml").write_text("student: gfl_r18\narms: {deep: {crosskd: {depth: 4}}}\n")
    Path("teacher.pth").write_bytes(b"")
    seen = []
    monkeypatch.setattr(training, "_run", lambda settings, out, resume: seen.append(settings))
    command = ["distill", "--recipe", "recipe.yaml", "--teacher", "teacher.pth", "--method", "deep"]
    assert run(*command, "--data", "my_coco", "--out", "run")[0] == 0
    assert (seen[0].methods, seen[0].arms) == ({"crosskd": {"depth": 4}}, {})


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (TRAIN, f"{' '.join(TRAIN[:7])} "),
        ([*TRAIN, "--resume"], "from the last checkpoint"),
    ],
)
def test_interruption_tells_how_to_go_on(
    arguments: list[str], answer: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_run", interrupted)
    code, _, err = run(*arguments)
    assert code == 130
    assert answer in err
    assert err.rstrip().endswith("--resume")
    assert err.count("--resume") == 1


def test_termination_tells_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training, "_run", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        code, _, err = run(*TRAIN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert code == 130
        assert "this goes on from the last checkpoint" in err
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a wrapper's wish
        assert run(*TRAIN)[0] == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_demo_writes_data_and_report(run: Run) -> None:
    code, out, err = run("demo", "--quick", "--set", "max_steps=2", "--set", "epochs=1")
    assert code == 0, err
    assert Path("demo/data/annotations/test.json").exists()
    assert Path("demo/study/report.html").exists()
    assert "ΔAP" in out

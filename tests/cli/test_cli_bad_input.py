"""Bad input: one sentence on stderr that names what is wrong, exit code 2, nothing written."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.test_cli_runs import save_foreign
from tests.data.test_image_files import bomb

SMALL = [
    *("--set", "max_steps=1", "--set", "resize_short=[64]", "--set", "resize_long=64"),
    *("--set", "batch_size=2", "--set", "workers=0"),
    *("--set", "student_options={base_channels: 8, fpn_channels: 32, tower_channels: 64}"),
]
TRAIN = ["train", "--detector", "gfl_r18", "--data", "my_coco", "--out", "run", *SMALL]
DISTILL = ["distill", "--teacher", "teacher.safetensors", "--student", "gfl_r18"]
DISTILL += ["--method", "crosskd", "--data", "my_coco", "--out", "run", *SMALL]
DOCTOR = ["doctor", "--student", "gfl_r18", "--data", "my_coco"]
ANALYZE = ["analyze", "--teacher", "t.safetensors", "--student", "s.safetensors"]
ANALYZE += ["--data", "my_coco", "--out", "run"]
COMPARE = ["compare", "--teacher", "gfl_r18", "--student", "gfl_r18", "--methods", "crosskd"]
COMPARE += ["--data", "my_coco", "--out", "run", *SMALL]


def refused(run: Run, arguments: list[str], *fragments: str) -> str:
    """The one sentence, after the checks that hold for every refusal."""
    code, _, err = run(*arguments)
    assert code == 2, err
    [sentence] = err.strip().splitlines()
    assert sentence.startswith("detdistill: ")
    assert "Traceback" not in sentence
    for fragment in fragments:
        assert fragment in sentence
    assert not Path("run").exists()
    return sentence


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train", "--data", "my_coco", "--out", "run"], ["--detector NAME"]),
        (["train", "--detector", "gfl_r18", "--out", "run"], ["--data FOLDER"]),
        (["train", "--detector", "glf_r18", "--data", "d", "--out", "run"], ["'gfl_r18'"]),
        ([*TRAIN, "--set", "bach_size=2"], ["'bach_size'", "'batch_size'"]),
        ([*TRAIN, "--set", "batch_size=many"], ["batch_size", "'many'"]),
        ([*TRAIN, "--set", "batch_size=0"], ["batch_size", "0"]),
        ([*TRAIN, "--set", "batch_size"], ["key=value"]),
        ([*TRAIN, "--set", "schedule=step"], ["milestones"]),
        ([*TRAIN, "--set", "lr=abc"], ["--set lr=abc: lr:"]),
        ([*TRAIN, "--set", "epochs=true"], ["--set epochs=true: epochs:", "not true or false"]),
        ([*TRAIN, "--seed", "-1"], ["--seed -1: seed:"]),
        ([*TRAIN[:5], "--out", "my_coco/annotations/val.json"], ["val.json is a file"]),
        ([*TRAIN[:5], "--out", "my_coco/annotations/val.json/run"], ["val.json is a file"]),
        ([*DISTILL, "--out", "my_coco/annotations/val.json/run"], ["val.json is a file"]),
        ([*TRAIN, "--set", "student_options.base_chanels=8"], ["base_channels"]),
        ([*TRAIN, "--set", "methods.crosskd={}"], ["detdistill distill"]),
        ([*TRAIN, "--set", "teacher=runs/teacher"], ["detdistill distill"]),
        ([*TRAIN, "--recipe", "missing.yaml"], ["missing.yaml"]),
        ([*TRAIN, "--recipe", "deeppbc"], ["'deeppbc'", "'deeppcb'"]),
        (["distill", "--student", "gfl_r18", "--data", "d", "--out", "run"], ["--teacher"]),
        (DISTILL[:1] + DISTILL[3:], ["--teacher"]),
        (DISTILL, ["teacher.safetensors", "no such run folder or weights file"]),
        ([*DISTILL, "--method", "croskd"], ["'croskd'", "'crosskd'"]),
        ([*DISTILL, "--method", "crosskd+fgd"], ["'fgd'"]),
        ([*DISTILL, "--method", "pkd + pkd"], ["pkd+pkd names pkd more than once"]),
        ([*DISTILL, "--teacher", "gfl_r50"], ["detdistill train --detector gfl_r50"]),
        ([*COMPARE, "--out", "my_coco/annotations/val.json/run"], ["val.json is a file"]),
        (["demo", "--quick", "--out", "my_coco/annotations/val.json"], ["val.json is a file"]),
        (COMPARE[:1] + COMPARE[3:], ["no teacher was given, and crosskd needs one"]),
        (
            [*DISTILL, "--teacher", "my_coco", "--student", "retinanet_r18", "--method", "tf_head"],
            ["--teacher my_coco: tf_head learns without a teacher"],
        ),
        ([*COMPARE, "--seeds", f"{2**63}"], ["--seeds"]),
        ([*COMPARE, "--seeds", "0,x"], ["--seeds 0,x"]),
        ([*COMPARE, "--seeds", "1,1"], ["--seeds 1,1"]),
        ([*COMPARE, "--methods", "croskd"], ["'croskd'", "'crosskd'"]),
        ([*COMPARE, "--methods", "pfi,pkd+rm+pkd"], ["pkd+rm+pkd names pkd more than once"]),
        ([*COMPARE, "--teacher", "gone.pth"], ["gone.pth"]),
        (
            [*COMPARE, "--teacher", "my_coco/annotations/val.json", "--teacher-epochs", "3"],
            ["--teacher-epochs 3: the teacher my_coco/annotations/val.json is trained already"],
        ),
        (
            [
                *("compare", "--student", "retinanet_r18", "--methods", "tf_head", *COMPARE[7:]),
                *("--teacher-epochs", "3"),
            ],
            ["--teacher-epochs 3: there is no teacher to train; leave it out"],
        ),
        (["compare", "--teacher", "gfl_r18", "--data", "d", "--out", "run"], ["--student"]),
        (["eval", "--weights", "gone.safetensors", "--data", "my_coco"], ["gone.safetensors"]),
        (["eval", "--weights", "my_coco", "--data", "my_coco"], ["my_coco"]),
        (["eval", "--weights", "my_coco"], ["--data FOLDER"]),
        (
            ["eval", "--weights", "a", "--data", "b", "--set", "student_options.norm_on_bbox=true"],
            ["--set student_options.norm_on_bbox=true", "convert --set OPTION=VALUE"],
        ),
        (["predict", "--weights", "gone.pth", "a.jpg", "--out", "run"], ["gone.pth"]),
        (
            ["predict", "--weights", "gone.pth", "a.jpg", "--out", "my_coco/annotations/val.json"],
            ["val.json is a file"],
        ),
        (ANALYZE[:1] + ANALYZE[3:], ["no teacher was given", "--teacher RUN_OR_FILE"]),
        (ANALYZE[:3] + ANALYZE[5:], ["no student was given", "--student RUN_OR_FILE"]),
        (ANALYZE, ["--teacher t.safetensors", "no such run folder or weights file"]),
        ([*ANALYZE[:-1], "my_coco/annotations/val.json"], ["val.json is a file"]),
        (["doctor", "--data", "my_coco"], ["no student was given", "--student NAME"]),
        (DOCTOR[:3], ["no data was given", "--data FOLDER"]),
        ([*DOCTOR[:3], "--data", "gone"], ["gone", "not found"]),
        ([*DOCTOR, "--student", "glf_r18"], ["'glf_r18'", "'gfl_r18'"]),
        ([*DOCTOR, "--teacher", "gone.pth"], ["--teacher gone.pth", "no such"]),
        ([*DOCTOR, "--method", "croskd"], ["'croskd'", "'crosskd'"]),
        ([*DOCTOR, "--method", "pkd+pkd"], ["pkd+pkd names pkd more than once"]),
        ([*DOCTOR, "--set", "methods.crosskd.dept=1"], ["'dept'", "'depth'"]),
        ([*DOCTOR, "--set", "precision=fp16", "--set", "accelerator=cpu"], ["fp16"]),
        ([*DOCTOR, "--json", "my_coco/annotations/val.json"], ["--json", "already exists"]),
        ([*DOCTOR, "--json", "my_coco/annotations/val.json/a"], ["--json", "is a file"]),
        (["train", "--outt", "run"], ["no such option: --outt", "see detdistill train --help"]),
        (["eval", "--data", "my_coco"], ["missing option '--weights'", "detdistill eval --help"]),
        (["eval", "--weights", "a", "--split", "tset"], ["'--split'", "'tset'", "'test'"]),
        (["train", "--seed", "one"], ["'--seed'", "valid integer", "see detdistill train --help"]),
        (["predict", "a.jpg", "--weights"], ["--weights", "see detdistill predict --help"]),
        (["list", "things"], ["'things'", "'methods'", "see detdistill list --help"]),
        (["list"], ["missing argument", "see detdistill list --help"]),
        (["trian"], ["no such command 'trian'", "'train'", "; see detdistill --help"]),
        (["data", "bultin"], ["'bultin'", "see detdistill data --help"]),
        (["--quick"], ["no such option: --quick", "; see detdistill --help"]),
        (["list", "detectors", "gfl"], ["matches 'gfl'", "'*gfl*'"]),
        (["recipe", "copy", "dem"], ["'dem'", "'demo'"]),
        (["data", "builtin", "--out", "run", "--train", "0"], ["at least 1 image"]),
        (["data", "builtin", "--out", "my_coco"], ["my_coco"]),
        (["data", "builtin", "--out", "my_coco/annotations/val.json"], ["val.json is a file"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_arguments(arguments: list[str], fragments: list[str], run: Run, my_coco: Path) -> None:
    refused(run, arguments, *fragments)


@pytest.mark.parametrize("group", [[], ["data"]])
def test_a_group_alone_shows_its_help(group: list[str], run: Run) -> None:
    _, out, err = run(*group)
    assert f"Usage: {' '.join(['detdistill', *group])}" in out + err
    assert "Commands:" in out + err


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:  # type: ignore[type-arg]
    """A fault of the training annotations."""

    def apply(folder: Path) -> None:
        path = folder / "annotations" / "train.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def first_image(folder: Path) -> Path:
    return min((folder / "images").glob("train_*"))


DATA_FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no annotations": (lambda f: (f / "annotations/train.json").unlink(), ["train"]),
    "no val": (lambda f: (f / "annotations/val.json").unlink(), ["val"]),
    "not JSON": (
        lambda f: (f / "annotations/train.json").write_text("images: []"),
        ["train.json"],
    ),
    "truncated JSON": (
        lambda f: (f / "annotations/train.json").write_text('{"images": [{"id": 1,'),
        ["train.json"],
    ),
    "not COCO": (lambda f: (f / "annotations/train.json").write_text("[1, 2]"), ["train.json"]),
    "no box": (edit(lambda v: v.update(annotations=[])), ["train.json"]),
    "duplicate image id": (edit(lambda v: v["images"].append(v["images"][0])), ["train.json"]),
    "duplicate annotation id": (
        edit(lambda v: v["annotations"].append(v["annotations"][0])),
        ["train.json: annotation id", "occurs twice"],
    ),
    "other categories": (
        edit(lambda v: v["categories"][0].update(name="zebra")),
        ["val.json", "train.json", "'zebra'", "all splits need the same categories"],
    ),
    "empty folder": (
        lambda f: [shutil.rmtree(f), f.mkdir()],
        ["my_coco: the data folder is empty", "annotations/train.json"],
    ),
    "leaves the folder": (
        edit(lambda v: v["images"][0].update(file_name="../../secret.jpg")),
        ["secret.jpg"],
    ),
    "missing image": (lambda f: first_image(f).unlink(), ["train_000000"]),
    "empty image": (lambda f: first_image(f).write_bytes(b""), ["train_000000"]),
    "not an image": (lambda f: first_image(f).write_text("hello"), ["train_000000"]),
    "bomb": (
        lambda f: first_image(f).write_bytes(bomb(60_000, 60_000)),
        ["train_000000", "megapixels, the limit is 100"],
    ),
    "truncated image": (
        lambda f: first_image(f).write_bytes(first_image(f).read_bytes()[:400]),
        ["train_000000"],
    ),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data(fault: str, run: Run, my_coco: Path) -> None:
    damage, fragments = DATA_FAULTS[fault]
    damage(my_coco)
    refused(run, TRAIN, *fragments)


@pytest.mark.parametrize(
    ("box", "category"),
    [([1, 1, 0, 5], 1), ([1, 1, float("nan"), 5], 1), ([500, 500, 9, 9], 1), ([1, 1, 9, 9], 999)],
)
def test_strict_stops_at_single_annotations(
    box: list[float], category: int, run: Run, my_coco: Path
) -> None:
    def add(values: dict) -> None:  # type: ignore[type-arg]
        image = values["images"][2]["id"]
        values["annotations"].append(
            {"id": 10**6, "image_id": image, "category_id": category, "bbox": box}
            | {"area": 25, "iscrowd": 0}
        )
        values["info"]["broken"] = image

    edit(add)(my_coco)
    broken = json.loads((my_coco / "annotations/train.json").read_text())["info"]["broken"]
    sentence = refused(run, [*TRAIN, "--strict"], "train.json")
    assert re.search(rf"\b{broken}\b", sentence)


def test_an_unwritable_folder(run: Run, my_coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: False)
    refused(run, TRAIN, "--out run: . cannot be written")


@pytest.mark.parametrize(("rank", "sentences"), [("0", 1), ("1", 0)])
def test_one_process_of_many_speaks(
    rank: str, sentences: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    code, _, err = run("train", "--out", "run")
    assert code == 2
    assert len(err.splitlines()) == sentences


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.mkdir, (Path("hacked"),))  # type: ignore[return-value]


def test_a_pickle_with_code_does_not_run(run: Run, my_coco: Path) -> None:
    Path("evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    refused(run, ["eval", "--weights", "evil.pth", "--detector", "gfl_r18", "--data", "my_coco"])
    assert not Path("hacked").exists()


def test_teacher_as_student(run: Run, my_coco: Path) -> None:
    Path("teacher.safetensors").write_bytes(b"one")
    both = [*DISTILL, "--student", "./teacher.safetensors"]
    refused(run, both, "--teacher and --student are both")
    Path("teacher").mkdir()
    Path("teacher/model.safetensors").write_bytes(b"one")
    for same in ("teacher", "teacher/model.safetensors"):
        refused(run, [*DISTILL, "--student", same], "--teacher and --student are both")
    Path("teacher/model.safetensors").write_bytes(b"two")
    refused(run, [*DISTILL, "--student", "teacher"], "--student teacher: the student is a detector")


def test_a_run_may_be_called_as_its_detector(run: Run, my_coco: Path) -> None:
    Path("gfl_r18").mkdir()
    refused(run, [*DISTILL, "--teacher", "gfl_r18"], "gfl_r18: no model.safetensors in this folder")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("methods: crosskd", "methods"),
        ("methods: {crosskd: 3}", "methods.crosskd"),
        ("arms: 3", "arms"),
        ("arms: {deep: [crosskd]}", "arms.deep"),
        ("student_options: 3", "student_options"),
        ("teacher_options: []", "teacher_options"),
    ],
)
@pytest.mark.parametrize("command", [TRAIN, DISTILL, COMPARE], ids=lambda command: command[0])
def test_groups_of_a_recipe(
    command: list[str], text: str, field: str, run: Run, my_coco: Path
) -> None:
    Path("teacher.safetensors").write_bytes(b"")
    Path("mine.yaml").write_text(text)
    refused(run, [*command, "--recipe", "mine.yaml"], f"mine.yaml: {field}: Input should be a")


@pytest.mark.parametrize("same", ["./t.safetensors", "copy/../t.safetensors", "a_copy.safetensors"])
def test_analyze_needs_two_models(same: str, run: Run, my_coco: Path) -> None:
    Path("copy").mkdir()
    save_foreign(Path("t.safetensors"))
    shutil.copy("t.safetensors", "a_copy.safetensors")
    refused(run, [*ANALYZE, "--student", same], "--teacher and --student are both")


def test_analyze_knows_a_run_by_its_weights(run: Run, my_coco: Path) -> None:
    Path("teacher").mkdir()
    save_foreign(Path("teacher/model.safetensors"))
    both = ["--teacher", "teacher", "--student", "teacher/model.safetensors"]
    refused(run, [*ANALYZE, *both], "--teacher and --student are both")


def test_analyze_needs_equal_classes_and_a_split(run: Run, my_coco: Path) -> None:
    save_foreign(Path("t.safetensors"))
    save_foreign(Path("s.safetensors"), 9)
    refused(run, [*ANALYZE], "10 classes, the student gfl_r18 9")
    save_foreign(Path("s.safetensors"), seed=1)
    (my_coco / "annotations/val.json").unlink()
    refused(run, [*ANALYZE], "no val split", "annotations/val.json")
    no_data = [argument for argument in ANALYZE if argument not in ("--data", "my_coco")]
    refused(run, no_data, "--data FOLDER")


def test_analyze_keeps_what_is_there(run: Run, my_coco: Path) -> None:
    Path("done").mkdir()
    Path("done/analysis.json").write_text("mine")
    refused(run, [*ANALYZE, "--out", "done"], "already holds analysis.json")
    assert Path("done/analysis.json").read_text() == "mine"

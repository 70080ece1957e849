"""Every published recipe, by its own command: it builds both models and takes one step.

The small forms of the same experiments, too.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detdistill.cli.checks import need_teacher
from detdistill.data import generate_dataset
from detdistill.data.voc import VOC_CLASSES
from detdistill.detectors import create_detector, load_detector, save_detector
from detdistill.detectors.zoo import list_checkpoints
from detdistill.recipes import list_recipes, recipe_path
from tests.cli.conftest import Run
from tests.data.other_formats import opened, write_devkit

SMALL = {
    "resize_short": [64],
    "resize_long": 64,
    "resize_mode": "choice",
    "batch_size": 2,
    "workers": 0,
    "epochs": 1,
    "milestones": [1],
    "max_steps": 1,
    "log_every": 1,
    "accelerator": "cpu",
}
PUBLISHED = [name for name in list_recipes() if "/" in name and not name.startswith("small/")]
VOC = (
    "rm_pfi/retinanet_r50_r101_voc"  # makes its data and its teacher by the commands of its header
)
ON_COCO = [name for name in PUBLISHED if name != VOC]
NARROW = {"base_channels": 8, "fpn_channels": 32}
ARMS = [
    pytest.param(name, arm, id=f"{name}-{arm}", marks=[pytest.mark.slow] if i else [])
    for name in sorted(set(list_recipes()) - set(PUBLISHED))
    for i, arm in enumerate(yaml.safe_load(recipe_path(name).read_text("utf-8")).get("arms", ()))
]
SETTING = r"--set [\w.]+=\w+(?:\.\w+)*"
VARIANT = re.compile(
    r"(train the latter with )?"
    rf"((?:--(?:student|detector) \S+|--method [\w+]+|{SETTING})(?: {SETTING})*)"
)
"""What a header adds to a command: to `train`, for the student alone, or else to `distill`."""
AP = re.compile(r"\b\d\d\.\d\b")
ROWS = {
    "crosskd/atss_r50_r101_1x": [
        *("teacher 41.5", "student 39.4", "CrossKD 41.8", "--method crosskd+pkd 41.8"),
    ],
    "crosskd/faster_rcnn_r18_r50_1x": ["student 33.5"],
    "crosskd/fcos_r50_r101_2x_ms": [
        *("teacher 40.8", "student 38.5", "CrossKD 41.1", "(41.3 in the paper"),
        "--method crosskd+pkd 41.3",
    ],
    "crosskd/gfl_r18_r50_1x": [
        *("student 35.8", "depth0 38.2", "depth1 38.3", "depth2 38.6", "depth3 38.7"),
        *("depth4 38.2", "mimicking by LD 37.8", "crosskd+mimic 38.1", "place for PKD 38.0"),
    ],
    "crosskd/gfl_r50_atss_r101_1x": ["student 40.2", "CrossKD 42.1", "mimicking 39.7"],
    "crosskd/gfl_r50_r101_1x": [
        *("teacher 44.9", "student 40.2", "CrossKD 43.7", "--method crosskd+pkd 43.9"),
        *("PKD 43.3", "LD 43.0", "teacher of 44.6", "student of 40.1"),
        *("positives alone 41.1", "with classes and VLR 42.1"),
    ],
    "crosskd/gfl_r50_retinanet_r101_1x": ["student 40.2", "CrossKD 41.2", "--method mimic 30.3"],
    "crosskd/retinanet_mobilenetv2_r50_1x": ["student 30.9", "CrossKD 34.1", "PKD 33.2"],
    "crosskd/retinanet_r18_r50_1x": [],
    "crosskd/retinanet_r50_r101_2x": [
        *("teacher 38.9", "student 37.4", "CrossKD 39.7", "--method crosskd+pkd 39.8"),
    ],
    "crosskd/retinanet_r50_swin_t_1x": [
        *("teacher 37.3", "student 36.5", "CrossKD 38.0", "PKD 37.2"),
    ],
    "feature/retinanet_r18_r50_1x_ms": ["student 31.7", "FitNet 35.6"],
    "head/faster_rcnn_r18_cascade_rcnn_r50_1x": ["student 33.9", "HEAD 36.7"],
    "head/fcos_mobilenetv2_faster_rcnn_r50_1x": ["student 30.0", "HEAD 33.5", "teacher 40.3"],
    "head/fcos_r18_faster_rcnn_r50_1x": ["student 32.5", "HEAD 36.0", "teacher 40.3"],
    "head/fcos_r18_reppoints_r50_1x": ["student 32.5"],
    "head/retinanet_mobilenetv2_faster_rcnn_r50_1x": [
        *("released code: student 27.8", "assistant alone 28.9", "AKD 32.2", "AKD + CKD 33.1"),
        *("paper: student 28.5", "HEAD 32.8"),
    ],
    "head/retinanet_r18_faster_rcnn_r50_1x": [
        *("released code: student 31.7", "assistant alone 33.4", "AKD 35.7", "AKD + CKD 36.1"),
        *("paper: AKD 35.5", "HEAD 36.2", "teacher 40.3", "G-DetKD 35.4"),
    ],
    "head/retinanet_r18_reppoints_r50_1x": ["student 31.7", "AKD 34.2", "SGFI 31.6"],
    "rm_pfi/retinanet_r50_r101_2x": [
        *("teacher 38.9", "student 37.4", "PFI 39.6", "RetinaNet R50 40.4"),
    ],
    "rm_pfi/retinanet_r50_r101_voc": [],
    "tf_head/faster_rcnn_r50_2x": ["student 39.4", "TF-HEAD 40.5"],
    "tf_head/fcos_r50_2x": ["student 41.0", "TF-HEAD 42.3", "plain FCOS has 38.5"],
    "tf_head/retinanet_r18_1x": [
        *("student 31.7", "FCOS assistant 32.9", "R-CNN assistant 33.4", "both with CKD 33.8"),
        "33.9 with CKD stopped at epoch 8",
    ],
    "tf_head/retinanet_r50_2x": ["student 38.7", "TF-HEAD 40.2"],
}
"""What each header says was published, an AP with its row."""


@pytest.fixture(scope="session")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "images"
    return generate_dataset(folder, train=2, val=1, test=1, size=64)


def one_step(name: str, data: Path, run: Run, size: dict[str, int]) -> None:
    """Trains every row of a recipe for a step, the student alone, too; both changed by `size`."""
    text = recipe_path(name).read_text(encoding="utf-8")
    values, command = yaml.safe_load(text), text.splitlines()[0]
    assert command.startswith(f"# detdistill distill --recipe {name} ")
    teacher = re.search(r"--teacher (\w+)=FILE", command)
    if teacher is not None:
        model = create_detector(teacher[1], 10, **fitting(teacher[1], size))
        save_detector(model, Path("teacher.safetensors"))
    # There is no network in a test.
    changes = {"student_options.pretrained": False} | {
        f"student_options.{key}": width for key, width in fitting(values["student"], size).items()
    }
    sets = [f"--set={key}={json.dumps(value)}" for key, value in {**SMALL, **changes}.items()]
    arguments = command.replace("=FILE", "=teacher.safetensors").replace("FOLDER", str(data))
    *given, _ = shlex.split(arguments)[2:]  # all but the folder after --out
    for i, (chosen, methods) in enumerate(rows_of(name, values).items()):
        out = Path(f"run{i}")
        code, _, err = run(*given, str(out), *chosen.split(), *sets)
        assert code == 0, err
        check_settings(out, chosen)
        terms = terms_of(out)
        assert {term.split("/")[0] for term in terms} == {"task", *methods}
        check_printed(terms, err)
    for chosen in variants_of(name, alone=True) or [""]:
        alone = ("train", "--recipe", name, "--data", str(data), "--out", "alone")
        code, _, err = run(*alone, *chosen.split(), *sets)
        assert code == 0, err
        check_settings(Path("alone"), chosen)
        assert {term.split("/")[0] for term in terms_of(Path("alone"))} == {"task"}


def check_printed(terms: list[str], err: str) -> None:
    """Whether the line of the only step has every term."""
    [line] = [line for line in err.splitlines() if ": step 1/1, " in line]
    assert all(re.search(rf" {term} -?\d", line) for term in terms), line


def check_settings(out: Path, chosen: str) -> None:
    """Whether a run had what was set."""
    for key, text in re.findall(r"--set (\S+)=(\S+)", chosen):
        value = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
        for part in key.split("."):
            value = value[part]
        assert value == yaml.safe_load(text)


def rows_of(name: str, values: dict[str, Any]) -> dict[str, Collection[str]]:
    """What each row adds to the command, with its methods: the arms, and what the header adds."""
    arms: dict[str, Collection[str]] = values.get("arms") or {}
    rows: dict[str, Collection[str]] = {f"--method {arm}": arms[arm] for arm in arms}
    for added in ["", *variants_of(name, alone=False)]:
        words = added.split()
        named = words[1] if "--method" in words else None
        rows[added] = values["methods"] if named is None else arms.get(named, named.split("+"))
    return rows


def variants_of(name: str, *, alone: bool) -> list[str]:
    """What the header adds to the one or the other command; a FILE has a test of its own."""
    found = VARIANT.findall(header_of(name))
    return [added for train, added in found if bool(train) == alone and "=FILE" not in added]


def terms_of(out: Path) -> list[str]:
    """Of the only step of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [step] = [line for line in lines if line["kind"] == "step"]
    return list(step["raw"])


def fitting(detector: str, size: dict[str, int]) -> dict[str, int]:
    """Only ResNets can be made narrower."""
    resnet = re.search(r"_r\d+", detector)
    return {key: value for key, value in size.items() if resnet or key != "base_channels"}


@pytest.mark.parametrize("name", ON_COCO)
def test_a_published_recipe_takes_a_step_with_every_term(
    name: str, two_images: Path, run: Run
) -> None:
    one_step(name, two_images, run, NARROW)


@pytest.mark.parametrize("size", [NARROW, pytest.param({}, marks=pytest.mark.slow, id="full")])
def test_from_the_devkit_to_the_recipe_of_voc(size: dict[str, int], run: Run) -> None:
    """By the commands of the header as they stand, with settings that make them short."""
    write_devkit(Path("VOCdevkit"))
    lines = recipe_path(VOC).read_text(encoding="utf-8").splitlines()
    commands = [line[len("# detdistill ") :] for line in lines if line.startswith("# detdistill ")]
    distill, split, train, measure = map(shlex.split, commands)
    changes = {"student_options.pretrained": False}  # there is no network in a test
    changes |= {f"student_options.{key}": width for key, width in size.items()}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in {**SMALL, **changes}.items()]
    printed = []
    for arguments in (split, [*train, *sets], [*distill, *sets], measure):
        code, out, err = run(*arguments)
        assert code == 0, err
        assert "are training images, too" not in err
        printed.append(err)
    assert out.splitlines()[1].startswith("AP ")
    terms = terms_of(Path("runs/rm_pfi_voc"))
    assert {term.split("/")[0] for term in terms} == {"task", "rm", "pfi"}
    check_printed(terms, printed[2])
    train_set, val, test = (opened(Path("voc0712"), name) for name in ("train", "val", "test"))
    assert (len(train_set), len(val), len(test)) == (21, 1, 4)
    names = {record.path.name for part in (train_set, val, test) for record in part.records}
    assert names == {path.name for path in Path("VOCdevkit").glob("*/JPEGImages/*")}
    assert test.records[0].path.name == "test0.jpg" and test.classes == list(VOC_CLASSES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_header_says_what_was_published_of_which_row(name: str) -> None:
    told = header_of(name)
    missing = [row for row in ROWS[name] if not re.search(rf"{re.escape(row)}(?![\d.]\d)", told)]
    assert not missing
    assert len(AP.findall(told)) == len(ROWS[name])  # and nothing else
    assert ROWS[name] or re.search(r"without a published AP|no published AP", told)
    assert not re.search("--(set|method|student|detector) ", VARIANT.sub("", told))  # all are tried


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_trains_on_images_with_boxes(name: str) -> None:
    assert yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))["drop_empty"] is True


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_names_the_checkpoint_of_its_teacher(name: str) -> None:
    told = header_of(name)
    teacher = re.search(r"--teacher (\w+)=FILE", told)
    named = re.search(r"checkpoint (\S+?)[.;]? ", told + " ")
    assert named is not None or teacher is None
    if named is not None and teacher is not None:
        assert [c.detector for c in list_checkpoints() if c.name == named[1]] == [teacher[1]]


def test_the_published_backbone_of_fcos_takes_its_place_as_the_header_says(
    two_images: Path, run: Run
) -> None:
    name, width = "crosskd/fcos_r50_r101_2x_ms", {"base_channels": 8, "fpn_channels": 32}
    added = re.search(r"--student \S+ --set \S+ --set \S+=FILE", header_of(name))
    assert added is not None
    backbone = create_detector("fcos_r50_caffe_gn", 10, **width).backbone.body
    torch.save(backbone.state_dict(), "backbone.pth")
    save_detector(create_detector("fcos_r101_caffe_gn", 10, **width), Path("teacher.safetensors"))
    sizes = {f"student_options.{key}": value for key, value in width.items()}
    code, _, err = run(
        *("distill", "--recipe", name, "--teacher", "teacher.safetensors"),
        *("--data", str(two_images), "--out", "run"),
        *shlex.split(added[0].replace("FILE", "backbone.pth")),
        *(f"--set={key}={json.dumps(value)}" for key, value in {**SMALL, **sizes}.items()),
    )
    assert code == 0, err
    trained = load_detector("run")
    assert trained.name == "fcos_r50_caffe_gn"
    stem = trained.backbone.body.conv1.weight  # the first stage is frozen
    assert torch.equal(stem, backbone.conv1.weight)


def header_of(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    header = re.match(r"(?:#.*\n)+", recipe_path(name).read_text(encoding="utf-8"))
    assert header is not None
    return " ".join(header[0].split()).replace(" # ", " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_COCO)
def test_a_published_recipe_takes_a_step_at_full_size(
    name: str, two_images: Path, run: Run
) -> None:
    one_step(name, two_images, run, {})


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_of_a_recipe_takes_a_step_with_every_term(
    name: str, arm: str, two_images: Path, run: Run
) -> None:
    values = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    assert f"detdistill compare --recipe {name} " in header_of(name)
    given = ["--recipe", name, "--method", arm, "--data", str(two_images), "--out", "run"]
    if "teacher" in values and need_teacher(values["arms"][arm]):
        options = values["teacher_options"] | {"base_channels": 8}
        teacher = create_detector(values["teacher"], 10, **options)
        save_detector(teacher, Path("teacher.safetensors"))
        given += ["--teacher", "teacher.safetensors"]
    narrow = fitting(values["student"], {"base_channels": 8})
    changes = SMALL | {f"student_options.{key}": width for key, width in narrow.items()}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    code, _, err = run("distill", *given, *sets)
    assert code == 0, err
    assert {term.split("/")[0] for term in terms_of(Path("run"))} == {"task", *values["arms"][arm]}

"""Every published recipe, by its own command: it builds both models and takes one step."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from detdistill.data import generate_dataset
from detdistill.detectors import create_detector, save_detector
from detdistill.detectors.zoo import list_checkpoints
from detdistill.recipes import list_recipes, recipe_path
from tests.cli.conftest import Run

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
WITHOUT_CHECKPOINT = ("crosskd/faster_rcnn_r18_r50_1x", "rm_pfi/retinanet_r50_r101_voc")
PUBLISHED = [name for name in list_recipes() if "/" in name and not name.startswith("small/")]


@pytest.fixture(scope="session")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "images"
    return generate_dataset(folder, train=2, val=1, test=1, size=64)


def one_step(name: str, data: Path, run: Run, size: dict[str, int]) -> None:
    """Trains every arm of a recipe for a step, teacher and student changed by `size`."""
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
    for arm, methods in (values.get("arms") or {"": values["methods"]}).items():
        out = Path(f"run{arm}")
        chosen = ["--method", arm] if arm else []
        code, _, err = run(*given, str(out), *chosen, *sets)
        assert code == 0, err
        terms = terms_of(out)
        assert {term.split("/")[0] for term in terms} == {"task", *methods}
        [line] = [line for line in err.splitlines() if ": step 1/1, " in line]
        assert all(re.search(rf" {term} -?\d", line) for term in terms), line


def terms_of(out: Path) -> list[str]:
    """Of the only step of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [step] = [line for line in lines if line["kind"] == "step"]
    return list(step["raw"])


def fitting(detector: str, size: dict[str, int]) -> dict[str, int]:
    """Only ResNets can be made narrower."""
    resnet = re.search(r"_r\d+", detector)
    return {key: value for key, value in size.items() if resnet or key != "base_channels"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_takes_a_step_with_every_term(
    name: str, two_images: Path, run: Run
) -> None:
    one_step(name, two_images, run, {"base_channels": 8, "fpn_channels": 32})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_says_what_was_published(name: str) -> None:
    told = header_of(name)
    assert re.search(r"Published AP\b.*?: .*\d\d\.\d|published AP|[Nn]o result is published", told)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_names_the_checkpoint_of_its_teacher(name: str) -> None:
    told = header_of(name)
    teacher = re.search(r"--teacher (\w+)=FILE", told)
    named = re.search(r"checkpoint (\S+?)[.;]? ", told + " ")
    assert named is not None or teacher is None or name in WITHOUT_CHECKPOINT
    if named is not None and teacher is not None:
        assert [c.detector for c in list_checkpoints() if c.name == named[1]] == [teacher[1]]


def header_of(name: str) -> str:
    """The comment at the top of a recipe, as one line."""
    header = re.match(r"(?:#.*\n)+", recipe_path(name).read_text(encoding="utf-8"))
    assert header is not None
    return " ".join(header[0].split()).replace(" # ", " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_takes_a_step_at_full_size(
    name: str, two_images: Path, run: Run
) -> None:
    one_step(name, two_images, run, {})

"""Every published recipe builds both models and takes one step."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from detdistill.data import generate_dataset
from detdistill.detectors import create_detector, save_detector
from detdistill.engine.train import train
from detdistill.recipe import validate_recipe
from detdistill.recipes import list_recipes, recipe_path

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
WEIGHTS = "teacher.safetensors"
PUBLISHED = [name for name in list_recipes() if "/" in name and not name.startswith("small/")]


@pytest.fixture(scope="session")
def two_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "images"
    return generate_dataset(folder, train=2, val=1, test=1, size=64)


def one_step(name: str, data: Path, folder: Path, size: dict[str, int]) -> None:
    """Trains every arm of a recipe for a step, teacher and student changed by `size`."""
    text = recipe_path(name).read_text(encoding="utf-8")
    command = text.splitlines()[0]
    assert command.startswith(f"# detdistill distill --recipe {name} ")
    values = yaml.safe_load(text)
    teacher = re.search(r"--teacher (\w+)=FILE", command)
    if teacher is not None:
        save_detector(
            create_detector(teacher[1], 10, **fitting(teacher[1], size)), folder / WEIGHTS
        )
        values["teacher"] = str(folder / WEIGHTS)
    # There is no network in a test.
    values["student_options"] |= {"pretrained": False, **fitting(values["student"], size)}
    for arm, methods in (values.pop("arms", None) or {"": values["methods"]}).items():
        changes = {**SMALL, "data": str(data), "methods": methods}
        out = folder / f"run{arm}"
        train(validate_recipe({**values, **changes}, name), out)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        [step] = [line for line in lines if line["kind"] == "step"]
        assert {term.split("/")[0] for term in step["raw"]} == {"task", *methods}


def fitting(detector: str, size: dict[str, int]) -> dict[str, int]:
    """Only ResNets can be made narrower."""
    resnet = re.search(r"_r\d+", detector)
    return {key: value for key, value in size.items() if resnet or key != "base_channels"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_takes_a_step_with_every_term(
    name: str, two_images: Path, tmp_path: Path
) -> None:
    one_step(name, two_images, tmp_path, {"base_channels": 8, "fpn_channels": 32})


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_takes_a_step_at_full_size(
    name: str, two_images: Path, tmp_path: Path
) -> None:
    one_step(name, two_images, tmp_path, {})

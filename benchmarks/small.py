"""How long the runs of the recipes under `small/` take on one CPU thread, evaluations left out.

    python benchmarks/small.py
    python benchmarks/small.py --recipes small/head small/tf_head --steps 100

The student alone and every arm train for some steps, with a teacher of random weights; minutes are
the processor time of one step times the steps of a whole run. It prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from detdistill import create_detector, save_detector
from detdistill.data import generate_dataset
from detdistill.engine.train import train
from detdistill.recipe import Recipe, read_yaml
from detdistill.recipes import list_recipes, recipe_path

IMAGES, SIZE, CLASSES = 2000, 128, 10  # of the built-in data that the recipes are made for
SHORT = {"log_every": 1000, "schedule": "cosine", "milestones": [], "accelerator": "cpu"}


def parse_arguments() -> argparse.Namespace:
    small = [name for name in list_recipes() if name.startswith("small/")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=small, choices=small)
    parser.add_argument("--steps", type=int, default=60)
    return parser.parse_args()


def runs_of(values: dict[str, Any], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The student alone and each arm, as settings of a recipe."""
    name, arms, weights = values.pop("teacher", None), values.pop("arms"), None
    widths = values.pop("teacher_options", {})
    yield "student", values
    if name is not None:
        weights = str(folder / "teacher.safetensors")
        save_detector(create_detector(name, CLASSES, **widths), weights)
    for arm, methods in arms.items():
        yield arm, {**values, "teacher": weights, "methods": methods}


def minutes(settings: dict[str, Any], data: Path, out: Path, steps: int) -> float:
    """Of a whole run, by the processor time of its first steps."""
    recipe = Recipe.model_validate({**settings, **SHORT, "data": str(data), "max_steps": steps})
    train(recipe, out)
    seconds = json.loads((out / "run.json").read_text())["processor_seconds"]
    return float(seconds) / steps * recipe.epochs * (IMAGES // recipe.batch_size) / 60


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one CPU thread, {options.steps} steps of each run\n")
    print("| recipe | minutes |\n|---|---|")
    for name in options.recipes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            data = generate_dataset(folder / "data", train=160, val=8, test=8, size=SIZE)
            runs = runs_of(read_yaml(recipe_path(name)), folder)
            found = [
                f"{arm} {minutes(settings, data, folder / arm, options.steps):.1f}"
                for arm, settings in runs
            ]
        print(f"| `{name}` | {', '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()

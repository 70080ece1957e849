"""Trains one narrow detector of each family on BCCD, from scratch, and tests it.

    python benchmarks/bccd.py --data FOLDER --out runs/bccd_detectors

Given again, it goes on where it stopped. All share the settings below; images keep their stored
size. The table goes to standard output and to `results.md` in --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from detdistill import list_detectors
from detdistill.engine.checkpoint import write_text
from detdistill.recipe import Recipe, validate_recipe
from detdistill.study.runs import RunScore, train_and_test
from detdistill.study.table import aligned, format_time

NARROW = {"base_channels": 16, "fpn_channels": 64}
DENSE = {"tower_channels": 64}
TWO_STAGE = {"roi_channels": 256, "roi_samples": 64}
OPTIONS = {
    "cascade_rcnn": TWO_STAGE,
    "faster_rcnn": TWO_STAGE,
    # The plain form, without GroupNorm, learns slowly from scratch.
    "fcos": {
        **DENSE,
        "group_norm": True,
        "center_sampling": True,
        "norm_on_bbox": True,
        "centerness_on_reg": True,
        "box_loss": "giou",
    },
    "reppoints": {"tower_channels": 32},  # deformable convolutions are slow on a CPU
}
LONGER = {"retinanet": 2}  # times the epochs: no GroupNorm there, either
# It starts slowly: twice the steps for the same time, and larger ones.
STEPS = {"reppoints": {"batch_size": 4, "base_batch": 4, "lr": 0.002}}
SETTINGS = {
    "resize_short": [312],
    "resize_long": 416,
    "optimizer": "adamw",
    "lr": 0.001,
    "weight_decay": 0.05,
    "clip_norm": 10.0,
    "warmup_steps": 100,
    "channels_last": True,
}
COLUMNS = ["detector", "AP", "AP50", "AP75", "parameters", "training"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="BCCD as a COCO folder")
    parser.add_argument("--out", required=True, type=Path, help="a run folder per detector")
    parser.add_argument("--detectors", nargs="+", default=list_detectors("*_r18"))
    parser.add_argument("--epochs", type=int, default=14, help="RetinaNet takes twice as many")
    return parser.parse_args()


def run_recipe(detector: str, data: str, epochs: int) -> Recipe:
    family = detector.rpartition("_")[0]
    options = NARROW | OPTIONS.get(family, DENSE)
    epochs *= LONGER.get(family, 1)
    run = {"student": detector, "student_options": options, "data": data, "epochs": epochs}
    settings = SETTINGS | STEPS.get(family, {})
    return validate_recipe(settings | run, "benchmarks/bccd.py")


def table_row(detector: str, score: RunScore) -> list[str]:
    aps = [f"{100 * score.numbers[name]:.1f}" for name in ("AP", "AP50", "AP75")]
    return [detector, *aps, f"{score.parameters / 1e6:.2f} M", format_time(score.seconds or 0.0)]


def main() -> None:
    options = parse_arguments()
    rows = [COLUMNS]
    for detector in options.detectors:
        recipe = run_recipe(detector, options.data, options.epochs)
        rows.append(table_row(detector, train_and_test(recipe, options.out / detector)))
    rows.insert(1, ["---"] * len(COLUMNS))
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    write_text(options.out / "results.md", text)
    print(aligned([rows[0], *rows[2:]]))


if __name__ == "__main__":
    main()

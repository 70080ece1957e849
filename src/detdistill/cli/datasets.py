"""The commands that make, convert and divide data sets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detdistill.cli import checks
from detdistill.cli.options import Data, Strict
from detdistill.cli.using import show_faults
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.data import DetectionDataset
    from detdistill.recipe import Recipe

HELD_OUT = 0.15
"""Share of the training images that a missing split takes."""

Share = Annotated[
    float | None, typer.Option(metavar="SHARE", help=f"Of the training images; {HELD_OUT}.")
]


def builtin_data(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder to write.")],
    train: Annotated[int, typer.Option(help="Training images.")] = 2000,
    val: Annotated[int, typer.Option(help="Validation images.")] = 400,
    test: Annotated[int, typer.Option(help="Test images.")] = 1000,
    size: Annotated[int, typer.Option(help="Height and width, pixels.")] = 192,
    seed: Annotated[int, typer.Option(help="Another seed, other images.")] = 0,
) -> None:
    """Generate the built-in data set, a COCO folder; needs no download."""
    checks.check_folder(out)
    write_builtin_data(out, {"train": train, "val": val, "test": test, "size": size}, seed)
    typer.echo(f"{out}: {train} training, {val} validation and {test} test images")
    _say_next(out)


def convert_data(
    data: Annotated[
        str, typer.Option("--data", metavar="FOLDER", help="COCO, YOLO or Pascal VOC data.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder to write.")],
    strict: Strict = False,
) -> None:
    """Write the same data as a COCO folder; images are hard links, or copies."""
    checks.check_folder(out)
    from detdistill.recipe import validate_recipe

    recipe = validate_recipe({"data": data, "strict": strict}, "command line")
    datasets = _all_splits(recipe)
    _write(out, datasets)
    counts = ", ".join(f"{len(dataset)} {dataset.split}" for dataset in datasets)
    typer.echo(f"{out}: {counts} images of {len(datasets[0].classes)} classes")
    _say_next(out)


def split_data(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder to write.")],
    data: Data = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Without --data: the images of --annotations."),
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(metavar="FILE", help="Without --data: one COCO file.")
    ] = None,
    val: Share = None,
    test: Share = None,
    trainval: Annotated[
        bool, typer.Option("--trainval", help="Take train and val together, and cut val anew.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Images in whose path it finds the same text stay together, e.g. a video's.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another division.")] = 0,
    strict: Strict = False,
) -> None:
    """Write data as a COCO folder, and cut the splits that it lacks from its training images."""
    checks.check_folder(out)
    recipe = _data_to_split(data, images, annotations, strict)
    from detdistill.data.divide import divide, join

    datasets = {dataset.split: dataset for dataset in _all_splits(recipe)}
    if trainval and {"train", "val"} <= datasets.keys():
        datasets["train"] = join(datasets["train"], datasets.pop("val"))
    shares = _shares({"val": val, "test": test}, datasets)
    parts = divide(datasets["train"], shares, seed=seed, group=group)
    datasets |= {part.split: part for part in parts}
    ordered = [datasets[name] for name in ("train", "val", "test")]
    _write(out, ordered)
    typer.echo(_class_table(ordered))
    _say_next(out)


def _data_to_split(
    data: str | None, images: str | None, annotations: str | None, strict: bool
) -> Recipe:
    if (data is None) == (annotations is None) or (annotations is None) != (images is None):
        raise UserError("give either --data FOLDER, or --images FOLDER with --annotations FILE")
    from detdistill.recipe import validate_recipe

    given = {"data": data, "train_images": images, "train_annotations": annotations}
    return validate_recipe({**given, "strict": strict}, "command line")


def _all_splits(recipe: Recipe) -> list[DetectionDataset]:
    """The splits that are there, checked; their faults are shown."""
    from typing import get_args

    from detdistill.data import open_dataset, require_same_classes
    from detdistill.data.splits import Split as Name
    from detdistill.data.splits import has_split

    names = [name for name in get_args(Name) if has_split(recipe, name)]
    # Without any split the sentence about the first says what to do.
    datasets = [open_dataset(recipe, name) for name in names or ["train"]]
    for dataset in datasets:
        require_same_classes(datasets[0], dataset)
        show_faults(f"{dataset.source}", dataset.faults)
    return datasets


def _shares(
    wanted: Mapping[str, float | None], there: Mapping[str, DetectionDataset]
) -> dict[str, float]:
    """The share of each part of the training images, train first."""
    if "train" not in there:
        source = next(iter(there.values())).source
        raise UserError(f"{source}: there is no train split to cut others from")
    for name, share in wanted.items():
        if share is not None and name in there:
            anew = ", or add --trainval to cut it from train and val" if name == "val" else ""
            raise UserError(
                f"--{name} {share:g}: the data has a {name} split, {there[name].source}; leave "
                f"--{name} out to keep it{anew}"
            )
    lacking = {name: share for name, share in wanted.items() if name not in there}
    if not lacking:
        raise UserError(
            f"{there['train'].source}: the data has all three splits already; `detdistill data "
            "convert` writes them as a COCO folder, --trainval cuts val anew"
        )
    held_out = {name: HELD_OUT if share is None else share for name, share in lacking.items()}
    if not (all(share > 0 for share in held_out.values()) and sum(held_out.values()) < 1):
        shown = " and ".join(f"--{name} {share:g}" for name, share in held_out.items())
        raise UserError(f"{shown}: expected shares above 0 that leave some images to train on")
    return {"train": 1 - sum(held_out.values()), **held_out}


def _class_table(datasets: Sequence[DetectionDataset]) -> str:
    """Images, and boxes of each class, per split."""
    import torch

    from detdistill.study.table import aligned

    classes = datasets[0].classes
    counts = [
        torch.cat([r.labels for r in dataset.records]).bincount(minlength=len(classes)).tolist()
        for dataset in datasets
    ]
    rows = [["", *(dataset.split for dataset in datasets)]]
    rows.append(["images", *(str(len(dataset)) for dataset in datasets)])
    for name, *numbers in zip(classes, *counts, strict=True):
        rows.append([f"boxes of {name}", *map(str, numbers)])
    return aligned(rows)


def _write(out: Path, datasets: Sequence[DetectionDataset]) -> None:
    from detdistill.data import write_coco_folder
    from detdistill.progress import Counts

    with Counts() as counts:
        write_coco_folder(out, datasets, progress=partial(counts.update, "images"))


def _say_next(folder: Path) -> None:
    typer.echo(
        f"Next: detdistill train --detector gfl_r18 --data {shlex.quote(str(folder))} "
        "--out runs/gfl_r18"
    )


def write_builtin_data(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Generates a data set and shows how far it is; one that is there already is left alone."""
    from detdistill.data import generate_dataset
    from detdistill.progress import Counts

    images = {split: sizes[split] for split in ("train", "val", "test")}
    with Counts() as counts:
        generate_dataset(
            folder,
            seed=seed,
            size=sizes["size"],
            progress=partial(counts.update, "generated images"),
            **images,
        )

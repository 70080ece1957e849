"""Commands that use what was trained, and the small ones: eval, predict, list, recipe."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detdistill.cli import checks
from detdistill.cli.options import Assignments, Data, RecipeFile, Split, Strict
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.detectors import FPNDetector
    from detdistill.recipe import Recipe

Weights = Annotated[
    Path, typer.Option("--weights", metavar="FILE", help="Weights file, or a run folder.")
]
DetectorName = Annotated[
    str | None,
    typer.Option("--detector", metavar="NAME", help="Only for weights of other frameworks."),
]
FAULTS_SHOWN = 50


class Kind(StrEnum):
    """What `list` lists."""

    detectors = "detectors"
    methods = "methods"
    recipes = "recipes"
    checkpoints = "checkpoints"


def evaluate(
    weights: Weights,
    detector: DetectorName = None,
    data: Data = None,
    split: Split = "test",
    recipe: RecipeFile = None,
    assignments: Assignments = None,
    strict: Strict = False,
) -> None:
    """Print the 12 COCO numbers, and AP per class."""
    from detdistill.recipe import resolve_recipe

    for assignment in assignments or []:
        if assignment.startswith(("student_options.", "teacher_options.")):
            raise UserError(
                f"--set {assignment}: eval takes weights as they are; name options that another "
                f"framework's file does not show once, by detdistill convert --set OPTION=VALUE"
            )
    given = {"data": data, "strict": strict or None}
    values = checks.recipe_values(recipe)
    settings = resolve_recipe(values, recipe or "command line", given, assignments or [])
    if settings.data is None and getattr(settings, f"{split}_annotations") is None:
        raise UserError("no data was given: add --data FOLDER with COCO, YOLO or Pascal VOC data")
    from detdistill.cli.tables import print_metrics
    from detdistill.data import open_dataset
    from detdistill.data.transforms import out_of_reach
    from detdistill.detectors.classes import known_classes, match_classes, match_if_known
    from detdistill.evaluation.run import evaluate_dataset
    from detdistill.progress import Counts

    model = load(weights, detector)
    dataset = open_dataset(settings, split)
    show_faults(f"{dataset.source}", dataset.faults)
    taught = set(model.classes or ()) == set(dataset.classes)  # the map is its teacher's
    match = match_classes if model.num_classes > len(dataset.classes) else match_if_known
    match(model, dataset.classes, None if taught else settings.class_map)
    if (known := known_classes(model)) > model.num_classes:
        typer.echo(f"measured are {model.num_classes} of the {known} classes that it knows")
    chosen = settings.model_fields_set & {"resize_short", "resize_long"}
    settings = at_input_size(settings, model)
    if chosen and (wrong := out_of_reach(settings)):
        raise UserError("; ".join(wrong))
    with Counts() as counts:
        advance = counts.counter(f"{split} images", len(dataset))
        metrics = evaluate_dataset(model, dataset, settings, model.pixel_mean.device, advance)
    print_metrics(metrics.numbers, metrics.per_class)
    if metrics.numbers["AP"] < 0:
        typer.echo(f"{dataset.source} holds no boxes, so there is nothing to measure.")
    named = "" if detector is None else f" --detector {detector}"
    typer.echo(
        f"Next: detdistill predict --weights {shlex.quote(str(weights))}{named} IMAGES --out FOLDER"
    )


def show_faults(source: str, faults: list[str]) -> None:
    """Faults of annotations on stderr, a line each."""
    for fault in faults[:FAULTS_SHOWN]:
        typer.echo(f"{source}: {fault}", err=True)
    if len(faults) > FAULTS_SHOWN:
        typer.echo(f"{source}: and {len(faults) - FAULTS_SHOWN} more faults", err=True)


def at_input_size(settings: Recipe, model: FPNDetector) -> Recipe:
    """The sizes that the recipe gives, else the detector's own, else the recipe's defaults."""
    if model.input_size is not None:
        short, long = model.input_size
        own = {"resize_short": [short], "resize_long": long}
        changes = {key: own[key] for key in own.keys() - settings.model_fields_set}
        return settings.model_copy(update=changes)
    typer.echo(
        f"the weights do not say their input size; used: resize_short={settings.resize_short}, "
        f"resize_long={settings.resize_long} (others by --recipe, or --set 'resize_short=[800]' "
        f"--set resize_long=1333)",
        err=True,
    )
    return settings


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files.")],
    weights: Weights,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")],
    detector: DetectorName = None,
    score: Annotated[float, typer.Option(min=0, max=1, help="Draw boxes from here on.")] = 0.3,
) -> None:
    """Write predictions.json and a drawn picture per image."""
    checks.check_folder(out)
    if (out / "predictions.json").exists():
        raise UserError(f"{out}: already holds predictions.json; choose another --out")
    from detdistill.cli.predictions import write_predictions
    from detdistill.progress import Counts

    model = load(weights, detector)
    with Counts() as counts:
        advance = counts.counter("images", len(images))
        count = write_predictions(model, images, out, score, advance)
    typer.echo(f"{out / 'predictions.json'}: {count} boxes in {len(images)} images")
    typer.echo(f"Next: open the pictures in {out}; --score moves the limit from which they show")


def list_names(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="For instance 'gfl*'.")] = "*",
) -> None:
    """List detectors, methods, recipes or published checkpoints."""
    names, following = _names(kind, pattern)
    if not names:
        raise UserError(
            f"no name among the {kind.value} matches {pattern!r}; a star stands for any text, "
            f"e.g. '*{pattern.strip('*')}*'"
        )
    for name in names:
        typer.echo(name)
    # Not on stdout, which is a plain list for other programs.
    typer.echo(f"Next: {following}", err=True)


def _names(kind: Kind, pattern: str) -> tuple[list[str], str]:
    if kind is Kind.recipes:
        from detdistill.recipes import list_recipes

        return list_recipes(pattern), "detdistill recipe copy NAME"
    if kind is Kind.methods:
        from fnmatch import filter as matching

        from detdistill.distill import list_methods

        return matching(list_methods(), pattern), (
            "detdistill distill --teacher RUN --student NAME --method NAME --data FOLDER --out RUN"
        )
    if kind is Kind.checkpoints:
        return _checkpoints(pattern), "detdistill fetch NAME"
    from detdistill.detectors import list_detectors

    return list_detectors(pattern), "detdistill train --detector NAME --data FOLDER --out RUN"


def _checkpoints(pattern: str) -> list[str]:
    """A line each: name, detector, published AP, what it is, its file or the page that has it."""
    from detdistill.detectors.zoo import list_checkpoints
    from detdistill.study.table import aligned

    rows = [
        [
            c.name,
            c.detector,
            "AP -" if c.ap is None else f"AP {c.ap}",
            c.role,
            c.file or (f"not fetched, see {c.page}" if c.page else "no address known"),
        ]
        for c in list_checkpoints(pattern)
    ]
    return aligned(rows).splitlines() if rows else []


def copy_recipe(
    name: Annotated[str, typer.Argument(help="See `list recipes`.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="NAME.yaml if not given.")
    ] = None,
) -> None:
    """Copy a bundled recipe, to change it."""
    from detdistill.recipes import recipe_path

    source = recipe_path(name)
    target = Path(source.name) if out is None else out
    if target.exists():
        raise UserError(f"{target}: already exists; choose another --out")
    checks.make_folder(target.parent)
    text = source.read_text(encoding="utf-8")
    from detdistill.engine.checkpoint import write_text

    write_text(target, text)
    command = text.partition("\n")[0].removeprefix("# ")
    typer.echo(f"wrote {target}")
    typer.echo(f"Next: {command.replace(f'--recipe {name}', f'--recipe {target}')}")


def load(weights: Path, detector: str | None) -> FPNDetector:
    """A trained detector, on the GPU where there is one."""
    import torch

    from detdistill.detectors import load_detector

    model = load_detector(weights) if detector is None else load_detector(detector, weights)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")

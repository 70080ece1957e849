"""Commands that only move weights: convert and fetch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detdistill.cli import checks
from detdistill.cli.options import DetectorOptions
from detdistill.cli.using import DetectorName, Weights
from detdistill.errors import UserError

if TYPE_CHECKING:
    from detdistill.detectors import FPNDetector


def convert(
    weights: Weights,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="NAME.safetensors: ours; NAME.pth: MMDetection's or torchvision's state_dict.",
        ),
    ],
    detector: DetectorName = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take what fits, and list what does not.")
    ] = False,
    assignments: DetectorOptions = None,
) -> None:
    """Turn weights of other frameworks into ours, or ours into theirs."""
    if out.suffix not in (".safetensors", ".pth"):
        raise UserError(
            f"--out {out}: expected a name that ends in .safetensors (ours) or in .pth (a "
            f"state_dict for MMDetection or torchvision)"
        )
    for path in (out, out.with_suffix(".json")) if out.suffix == ".safetensors" else (out,):
        if path.exists():
            raise UserError(f"{path}: already exists; choose another --out")
    checks.check_folder(out.parent)
    from detdistill.detectors import load_detector, save_detector

    source: list[Any] = [weights] if detector is None else [detector, weights]
    model = load_detector(*source, strict=not partial, **_options(assignments))
    if out.suffix == ".pth":
        _export(model, out)
        return
    checks.make_folder(out.parent)
    save_detector(model, out, provenance={"converted_from": weights.name})
    typer.echo(f"wrote {out}: {model.name} with {model.num_classes} classes")
    typer.echo(f"Next: detdistill eval --weights {shlex.quote(str(out))} --data FOLDER")


def _options(assignments: list[str] | None) -> dict[str, Any]:
    """`--set KEY=VALUE` as options of the detector."""
    from detdistill.recipe import resolve_recipe

    given = [f"teacher_options.{assignment}" for assignment in assignments or []]
    return resolve_recipe({}, "command line", assignments=given).teacher_options


def _export(model: FPNDetector, out: Path) -> None:
    from detdistill.detectors import to_mmdetection_state
    from detdistill.detectors.view_base import TorchvisionView
    from detdistill.engine.checkpoint import save_checkpoint

    if isinstance(model, TorchvisionView):
        state = {key: tensor.cpu() for key, tensor in model.model.state_dict().items()}
        content, framework = state, "torchvision"
        following = f'model.load_state_dict(torch.load("{out}"))'
    else:
        state, framework = to_mmdetection_state(model), "MMDetection"
        # MMDetection 2.x and 3.x look for the names of the classes at different places.
        meta = {"CLASSES": model.classes, "dataset_meta": {"classes": model.classes}}
        content = {"meta": meta if model.classes else {}, "state_dict": state}
        following = f'load_from = "{out}" in the configuration, or init_detector(CONFIG, "{out}")'
    checks.make_folder(out.parent)
    save_checkpoint(out, content)
    typer.echo(f"wrote {out}: {len(state)} tensors under {framework}'s names")
    typer.echo(f"Next: {following}")


def fetch(
    name: Annotated[str, typer.Argument(help="See `list checkpoints`.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="If not the cache.")
    ] = None,
) -> None:
    """Download a published checkpoint, once, and verify it."""
    from detdistill.detectors.zoo import fetch as download
    from detdistill.detectors.zoo import find_checkpoint

    checkpoint = find_checkpoint(name)
    if out is not None:
        checks.check_folder(out)
    from detdistill.cli.tables import download_bar

    with download_bar() as progress:
        task = progress.add_task(name, total=None)

        def advance(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        path = download(name, out, advance)
    typer.echo(path)
    typer.echo(
        f"Next: detdistill eval --weights {shlex.quote(str(path))} --detector "
        f"{checkpoint.detector} --data FOLDER",
        err=True,
    )

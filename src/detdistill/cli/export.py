"""The command that writes a trained detector as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detdistill.cli import checks
from detdistill.cli.using import DetectorName, Weights

if TYPE_CHECKING:
    from detdistill.export import Exported


def export(
    weights: Weights,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="New file: NAME.onnx.")],
    detector: DetectorName = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option("--size", metavar="H W", help="Of the input, if not the detector's own."),
    ] = None,
    nms: Annotated[
        bool, typer.Option("--nms", help="Final detections instead of all boxes.")
    ] = False,
    pixels: Annotated[
        Literal["uint8", "float32"], typer.Option("--input", help="Type of the images.")
    ] = "uint8",
    opset: Annotated[
        int | None, typer.Option("--opset", metavar="N", help="If not the lowest that fits.")
    ] = None,
) -> None:
    """Write a detector as an ONNX file, checked with ONNX Runtime."""
    from detdistill.export.checks import check_installed, check_target

    check_target(out)
    check_installed()
    checks.check_folder(out.parent)
    from detdistill.cli.using import load
    from detdistill.export import export_onnx

    model = load(weights, detector)
    typer.echo(f"{model.name}: exporting, then comparing it with PyTorch")
    _tell(export_onnx(model, out, size=size, nms=nms, input_type=pixels, opset=opset))


def _tell(exported: Exported) -> None:
    parity, (height, width) = exported.parity, exported.size
    megabytes = exported.path.stat().st_size / 1e6
    typer.echo(f"{exported.path}: {megabytes:.1f} MB, opset {exported.opset}")
    for kind, values in (("input", exported.inputs), ("output", exported.outputs)):
        for name, description in values.items():
            typer.echo(f"  {kind:6} {name:10} {description}")
    typer.echo(
        f"ONNX Runtime and PyTorch differ by at most {parity.boxes:.1g} pixels and "
        f"{parity.scores:.1g} in scores, on batches of 1 and 3 images; "
        f"{parity.compared - parity.lost} of {parity.compared} detections agree"
    )
    if height < width:
        typer.echo(
            f"The input suits images wider than high; for others export with "
            f"--size {width} {height}, for both with --size {width} {width}"
        )
    typer.echo("Next: run it with onnxruntime; docs/export.md leads from an image file to boxes")

"""What commands print beyond a line: progress bars and tables."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table


def download_bar() -> Progress:
    """A bar on stderr with bytes, rate and remaining time; nothing when that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def print_metrics(numbers: dict[str, float], per_class: dict[str, float]) -> None:
    """The 12 COCO numbers, then AP per class; all 0..1 in, 0..100 shown.

    Frames and colours on a terminal, aligned plain lines elsewhere.
    """
    overall = [list(numbers), [_percent(value) for value in numbers.values()]]
    classes = [["class", "AP"], *([name, _percent(value)] for name, value in per_class.items())]
    console = Console()
    if not console.is_terminal:
        from detdistill.study.table import aligned  # which loads torch

        typer.echo(f"COCO, 0..100\n{aligned(overall)}\n\nAP per class\n{aligned(classes)}")
        return
    for title, (header, *rows) in (("COCO, 0..100", overall), ("AP per class", classes)):
        table = Table(*header, title=title)
        for column in table.columns if header is overall[0] else table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"

"""The table of a study: for a terminal, as plain text, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from detdistill.study.summary import (
    Arm,
    arm_of,
    control_of,
    gap_closed,
    paired_gains,
    signed,
    spread,
)

GAP = "gap closed"
NOTES = {
    "AP": (
        "AP, AP50, AP75: COCO numbers x 100 on the test split, mean ± standard deviation over "
        "seeds. ΔAP: gain over the student alone, paired by seed, mean (lowest … highest)."
    ),
    GAP: "Gap closed: share of the distance from student to teacher.",
    "training": (
        "ms/image: whole prediction at batch 1, NMS included; a distilled student is the same "
        "network. Training: mean time of one run. Same time: the student alone, its schedule "
        "stretched to the training time of the slowest distilled run (processor time, where each "
        "run had one thread of a CPU)."
    ),
}
NONE = "—"


def table_header(arms: Sequence[Arm]) -> list[str]:
    """The names of the columns; without a teacher there is no gap to close."""
    gap = [] if arm_of(arms, "teacher") is None else [GAP]
    columns = ["AP", "AP50", "AP75", "ΔAP (paired)", *gap, "parameters", "ms/image", "training"]
    return ["", *columns]


def table_notes(arms: Sequence[Arm]) -> str:
    """What the columns say."""
    shown = table_header(arms)
    return " ".join(text for column, text in NOTES.items() if column in shown)


def table_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """One row of text per arm, in the order of `table_header`."""
    teacher, control = arm_of(arms, "teacher"), control_of(arms)
    return [_row(arm, control, teacher) for arm in arms]


def size_rows(arms: Sequence[Arm]) -> list[list[str]]:
    """AP on small, medium and large objects per arm; COCO's limits are 32 and 96 pixels."""
    return [
        [arm.title, *(_with_spread(arm.values(number)) for number in ("APs", "APm", "APl"))]
        for arm in arms
    ]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns without any control characters: the first to the left, all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def plain_table(arms: Sequence[Arm]) -> str:
    """The table as aligned lines."""
    return aligned([table_header(arms), *table_rows(arms)])


def markdown_table(arms: Sequence[Arm]) -> str:
    """The same as a Markdown table."""
    return as_markdown([table_header(arms), *table_rows(arms)])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows as a Markdown table, numbers to the right."""
    header, *body = rows
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def print_table(arms: Sequence[Arm], sentences: Sequence[str], caveats: Sequence[str]) -> None:
    """Table, verdict and warnings on standard output; colours only on a terminal."""
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        print("\n".join([plain_table(arms), "", *sentences, *(f"Warning: {c}" for c in caveats)]))
        return
    table = Table(*table_header(arms))
    for column in table.columns[1:]:
        column.justify = "right"
    for arm, row in zip(arms, table_rows(arms), strict=True):
        table.add_row(*row, style="bold" if arm.kind == "method" else "")
    console.print(table)
    for sentence in sentences:
        console.print(sentence, style="bold", highlight=False)
    for caveat in caveats:
        console.print(f"Warning: {caveat}", style="yellow", highlight=False)


def _row(arm: Arm, control: Arm, teacher: Arm | None) -> list[str]:
    gains = paired_gains(arm, control) if arm.kind in ("method", "same_time") else []
    share = gap_closed(arm, control, teacher) if gains else None
    gap = [NONE if share is None else f"{share:.0%}"]
    return [
        arm.title,
        *(_with_spread(arm.values(number)) for number in ("AP", "AP50", "AP75")),
        _gain(gains),
        *(gap if teacher is not None else []),
        _millions(arm.runs[0].parameters),
        NONE if arm.latency_ms is None else f"{arm.latency_ms:.1f}",
        NONE if arm.seconds is None else format_time(arm.seconds),
    ]


def _with_spread(values: list[float]) -> str:
    if min(values) < 0:  # COCO's -1: nothing to measure
        return NONE
    deviation = spread(values)
    mean = f"{statistics.fmean(values):.1f}"
    return mean if deviation is None else f"{mean} ±{deviation:.1f}"


def _gain(gains: list[float]) -> str:
    if not gains:
        return NONE
    mean = signed(statistics.fmean(gains))
    if len(gains) == 1:
        return mean
    return f"{mean} ({signed(min(gains))} … {signed(max(gains))})"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 10_000 else str(count)


def format_time(seconds: float) -> str:
    """A duration for people: 42 s, 12 min 30 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""The charts of an analysis, drawn from its numbers; None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from detdistill.drawing.charts import INK, STYLE, WIDTH, svg

BLUE, ORANGE, GREEN, GREY = "#2f7de1", "#e07b1f", "#1f9d6b", "#8b929c"
GROUPS = {"all": ("all", GREY), "inside_objects": ("inside objects", BLUE)}
GROUPS |= {"positives": ("positives", ORANGE)}
MAP = "viridis"
Numbers = dict[str, Any]


def conflict_chart(numbers: Numbers) -> str:
    """How many places conflict by how much, and on which levels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for group, (name, colour) in GROUPS.items():
            counts = np.array(numbers["histogram"][group], dtype=float)
            if counts.sum():
                shares = counts[::-1].cumsum()[::-1] / counts.sum()
                edges = np.arange(len(counts)) / len(counts)
                shown = shares > 0
                left.plot(edges[shown], 100 * shares[shown], color=colour, label=name)
        left.axvline(numbers["threshold"], color=INK, lw=0.8, ls="--")
        left.set_yscale("log")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        left.yaxis.set_minor_formatter(NullFormatter())
        left.set_ylim(min(10, left.get_ylim()[0]), 150)  # two decades at least
        left.set_xlabel("|label - teacher's score| is at least")
        left.set_ylabel("% of places")
        left.legend(loc="lower left")
        rows = {
            name: ([_percent(level[group]["share"]) for level in numbers["levels"]], colour)
            for group, (name, colour) in GROUPS.items()
        }
        _bars(right, [f"stride {level['stride']}" for level in numbers["levels"]], rows)
        right.set_ylabel("% of places in conflict")
    return svg(figure, "conflict", "Share of places in conflict, by size of the gap and by level")


def ranks_chart(numbers: Numbers) -> str | None:
    """The distribution of tau over objects, and both numbers by object size."""
    counts = np.array(numbers["histogram"], dtype=float)
    if not counts.sum():
        return None
    sizes = {name: row for name, row in numbers["sizes"].items() if row["objects"]}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        edges = np.linspace(-1, 1, len(counts) + 1)
        left.bar(
            edges[:-1], 100 * counts / counts.sum(), np.diff(edges) * 0.92, align="edge", color=BLUE
        )
        mean = numbers["all"]["tau"]
        left.axvline(mean, color=INK, lw=0.8, ls="--", label=f"mean {mean:.2f}")
        left.legend(loc="upper left")
        left.set_xlabel("Kendall's tau of an object's candidates")
        left.set_ylabel("% of objects")
        labels = [f"{name}\n({row['objects']} objects)" for name, row in sizes.items()]
        differs = [_percent(row["best_differs_share"]) for row in sizes.values()]
        _bars(right, labels, {"best candidate differs": (differs, ORANGE)})
        right.set_ylabel("% of objects whose best differs")
        right.set_ylim(0, 100)
    return svg(figure, "ranks", f"Kendall's tau over objects, mean {mean:.2f}, and by size")


def imitation_chart(numbers: Numbers, table: NDArray[np.float64]) -> str:
    """Correlations per level, and how the places of the main level spread over both ranks."""
    names = {"pearson": ("Pearson", GREY), "spearman": ("Spearman", BLUE)}
    names |= {"overlap_of_top_tenth": ("overlap of the top tenths", ORANGE)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
        rows = {
            name: ([_plain(level[key]) for level in numbers["levels"]], colour)
            for key, (name, colour) in names.items()
        }
        _bars(left, [f"stride {level['stride']}" for level in numbers["levels"]], rows)
        left.axhline(0, color=INK, lw=0.8)
        left.set_ylim(min(0, left.get_ylim()[0]), 1)
        cells = len(table)
        edges = np.linspace(0, 100, cells + 1)
        drawn = right.pcolormesh(edges, edges, table * cells**2, cmap=MAP, vmin=0)
        right.grid(visible=False)
        right.set_aspect("equal")
        right.set_xlabel("rank of the feature difference, %")
        right.set_ylabel("rank of the prediction difference, %")
        right.set_title(f"stride {numbers['main_stride']}", loc="left")
        figure.colorbar(drawn, ax=right, label="places (1: as by chance)")
    return svg(figure, "imitation", "Correlation of feature and prediction differences per level")


def similarity_chart(numbers: Numbers) -> str | None:
    """CKA by stage and stride as a coloured table."""
    stages = numbers["stages"]
    columns = list(dict.fromkeys(column for row in stages.values() for column in row))
    columns.sort(key=lambda column: int(column) if column.isdecimal() else math.inf)
    values = np.array([[_plain(row.get(column)) for column in columns] for row in stages.values()])
    if not values.size:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(stages)), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(np.clip(values, 0, 1), cmap=MAP, vmin=0, vmax=1, edgecolors="none")
        for row, column in zip(*np.nonzero(~np.isnan(values)), strict=True):
            value = values[row, column]
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{value:.2f}",
                ha="center",
                va="center",
                color="#000000" if value > 0.55 else "#ffffff",
            )
        names = [f"stride {name}" if name.isdecimal() else name for name in columns]
        axes.set_xticks(np.arange(len(columns)) + 0.5, names)
        axes.set_yticks(np.arange(len(stages)) + 0.5, list(stages))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return svg(figure, "similarity", "Linear CKA of teacher and student by stage and stride")


def ramp(name: str, steps: int = 7) -> list[str]:
    """Colours of a map from low to high, for a legend."""
    return [to_hex(colour) for colour in matplotlib.colormaps[name](np.linspace(0, 1, steps))]


def _bars(axes: Axes, labels: Sequence[str], rows: dict[str, tuple[list[float], str]]) -> None:
    """Groups of bars side by side; what is not defined has none."""
    width = 0.8 / len(rows)
    places = np.arange(len(labels))
    for number, (name, (values, colour)) in enumerate(rows.items()):
        shift = (number - (len(rows) - 1) / 2) * width
        axes.bar(places + shift, values, width * 0.92, color=colour, label=name)
    axes.set_xticks(places, labels)
    axes.grid(axis="x", visible=False)
    if len(rows) > 1:
        # Above the bars, which may reach anywhere.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rows), columnspacing=1)


def _percent(share: float | None) -> float:
    return 100 * _plain(share)


def _plain(value: float | None) -> float:
    return float("nan") if value is None else value

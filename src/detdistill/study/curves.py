"""The charts of a report, as SVG text that takes its ink from the page (light or dark)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detdistill.drawing.charts import INK, STYLE, WIDTH, svg
from detdistill.study.runs import RunScore, read_log
from detdistill.study.summary import Arm, control_of, methods_of, signed

METHOD_COLOURS = tuple(
    "#2f7de1 #1f9d6b #a25ddc #d6498f #0f9fb5 #7cc4f4 #6b7f1f #34418f #7a4a2b #e58fb3".split()
)
LOST = "#c0392b"  # of a class that lost AP; no method has it
LONGEST = 40  # characters of a class name that a chart shows
COLOURS = {"teacher": "#8b929c", "control": "#e07b1f", "same_time": "#c9a227"}


def arm_colours(arms: Sequence[Arm]) -> dict[str, str]:
    """One colour per arm, the same in every chart."""
    methods = [arm.name for arm in methods_of(arms)]
    colours = {arm.name: COLOURS[arm.kind] for arm in arms if arm.kind != "method"}
    for index, name in enumerate(methods):
        colours[name] = METHOD_COLOURS[index % len(METHOD_COLOURS)]
    return colours


def seeds_chart(arms: Sequence[Arm]) -> str:
    """Test AP: a dot per seed, a bar at the mean."""
    colours = arm_colours(arms)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.42 * len(arms)), layout="constrained")
        axes = figure.subplots()
        for row, arm in enumerate(arms):
            values = arm.values()
            axes.plot([arm.mean()] * 2, [row - 0.28, row + 0.28], color=colours[arm.name], lw=3)
            axes.scatter(
                values,
                [row] * len(values),
                color=colours[arm.name],
                s=36,
                alpha=0.8,
                lw=0,
                zorder=3,
            )
            axes.annotate(
                f"mean {arm.mean():.1f}",
                (max(values), row),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
        axes.set_yticks(range(len(arms)), [arm.title for arm in arms])
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("AP on test")
    summary = ", ".join(f"{arm.title} {arm.mean():.1f}" for arm in arms)
    return svg(figure, "seeds", f"Mean test AP of each arm: {summary}")


def ap_chart(arms: Sequence[Arm]) -> str | None:
    """AP on val over training steps, a thin line per seed; None when nothing was logged."""
    colours, drawn = arm_colours(arms), False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.subplots()
        for arm in _with_own_runs(arms):
            curves = [_ap_curve(run) for run in arm.runs]
            drawn |= _draw_seeds(axes, curves, colours[arm.name], arm)
        axes.set_xlabel("step")
        axes.set_ylabel("AP on val")
        axes.set_ylim(bottom=0)
        if drawn:
            axes.legend(loc="lower right")
    return svg(figure, "ap", "AP on val over training steps of each arm") if drawn else None


def loss_chart(arms: Sequence[Arm]) -> str | None:
    """Each loss term over training steps, as it enters the sum; None when nothing was logged."""
    colours = arm_colours(arms)
    logs = {
        arm.name: [read_log(run.folder, "step") for run in arm.runs] for arm in _with_own_runs(arms)
    }
    terms = list(
        dict.fromkeys(
            term for runs in logs.values() for log in runs for e in log for term in e["weighted"]
        )
    )
    if not terms:
        return None
    columns = 2 if len(terms) in (2, 4) else min(3, len(terms))
    rows = math.ceil(len(terms) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.0 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(terms) :]:
            axes.set_visible(False)
        for axes, term in zip(grid.flat, terms, strict=False):
            axes.set_title(term, loc="left")
            for arm in _with_own_runs(arms):
                curves = [_term_curve(log, term) for log in logs[arm.name]]
                _draw_seeds(axes, curves, colours[arm.name], arm)
            _limit_to_bulk(axes)
        figure.supxlabel("step", fontsize=10)
        handles = _legend_handles(grid.flat[: len(terms)])
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    return svg(figure, "loss", f"Loss terms over training steps: {', '.join(terms)}")


def class_chart(arm: Arm, control: Arm, colour: str, limit: int = 30) -> str | None:
    """Mean gain of each class over the seeds, largest first; None without defined classes."""
    gains = class_gains(arm, control)
    if not gains:
        return None
    names = sorted(gains, key=lambda name: -gains[name])
    if len(names) > limit:  # the ends are what one looks for
        names = names[: limit // 2] + names[-(limit - limit // 2) :]
    values = [gains[name] for name in names]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.26 * len(names)), layout="constrained")
        axes = figure.subplots()
        shades = [colour if value >= 0 else LOST for value in values]
        bars = axes.barh(range(len(names)), values, color=shades, height=0.68)
        axes.bar_label(bars, [signed(value) for value in values], padding=4)
        axes.axvline(0, color=INK, lw=0.8)
        labels = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.14)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("AP gained over the student alone")
    summary = ", ".join(f"{name} {signed(gains[name])}" for name in names)
    return svg(
        figure, f"classes-{arm.name.replace('+', '-')}", f"Gain per class by {arm.title}: {summary}"
    )


def class_gains(arm: Arm, control: Arm) -> dict[str, float]:
    """Mean over seeds of the paired gain in AP (0..100) of each class that has test boxes."""
    by_seed = {run.seed: run.per_class for run in control.runs}
    names = [name for name, value in control.runs[0].per_class.items() if value >= 0]
    return {
        name: statistics.fmean(
            100 * (run.per_class[name] - by_seed[run.seed][name]) for run in arm.runs
        )
        for name in names
    }


def _with_own_runs(arms: Sequence[Arm]) -> list[Arm]:
    """Without a same-time control that is the control itself."""
    known = {run.folder for run in control_of(arms).runs}
    return [
        arm
        for arm in arms
        if arm.kind != "same_time" or not {run.folder for run in arm.runs} <= known
    ]


def _ap_curve(run: RunScore) -> tuple[list[float], list[float]]:
    log = read_log(run.folder, "eval")
    return [e["step"] for e in log], [100 * e["metrics"]["AP"] for e in log]


def _term_curve(log: list[dict[str, Any]], term: str) -> tuple[list[float], list[float]]:
    """A term over steps, smoothed so that arms can be told apart."""
    log = [entry for entry in log if term in entry["weighted"]]
    steps = [entry["step"] for entry in log]
    values = [float(entry["weighted"][term]) for entry in log]
    window = max(1, len(values) // 40)
    if window == 1:
        return steps, values
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return steps, np.convolve(padded, np.ones(window) / window, mode="valid").tolist()


def _draw_seeds(
    axes: Axes, curves: list[tuple[list[float], list[float]]], colour: str, arm: Arm
) -> bool:
    """Thin lines; True when there was something to draw."""
    curves = [curve for curve in curves if curve[0]]
    width = 1.6 if len(curves) == 1 else 1.0
    for index, (steps, values) in enumerate(curves):
        axes.plot(
            steps,
            values,
            color=colour,
            lw=width,
            ls="--" if arm.kind in ("teacher", "same_time") else "-",
            label=arm.title if index == 0 else None,
            marker="o" if len(steps) == 1 else None,
        )
    return bool(curves)


def _limit_to_bulk(axes: Axes) -> None:
    """The first steps are so high that nothing else would show: they may leave the picture."""
    parts = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    values = np.concatenate(parts) if parts else np.zeros(1)
    values = values[np.isfinite(values)]
    if values.size:
        top = float(np.quantile(values, 0.98))
        axes.set_ylim(0, 1.15 * top if top > 0 else 1)


def _legend_handles(grid: Iterable[Axes]) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return handles

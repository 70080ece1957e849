"""One page about a study that needs nothing beside: no network, no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from detdistill.data import open_dataset
from detdistill.drawing.page import cards, facts_list, figure, page, panel_row, verdict, warnings
from detdistill.engine.checkpoint import write_text
from detdistill.recipe import Recipe, dump_recipe
from detdistill.study.between import NOTE, Difference, difference_rows, differences
from detdistill.study.curves import ap_chart, arm_colours, class_chart, loss_chart, seeds_chart
from detdistill.study.gallery import CORRECT, FALSE, MISSED, TRUTH, make_gallery
from detdistill.study.summary import (
    Arm,
    arm_of,
    best_method,
    control_of,
    is_clear,
    methods_of,
    paired_gains,
    signed,
)
from detdistill.study.table import size_rows, table_header, table_notes, table_rows

LEGEND = "".join(
    f'<span class="key"><span class="box" style="border:3px {style} {colour}"></span>{name}</span>'
    for name, colour, style in (
        ("object", TRUTH, "solid"),
        ("found", CORRECT, "solid"),
        ("false alarm", FALSE, "solid"),
        ("missed", MISSED, "dashed"),
    )
)
SIZES = ("", "AP small (below 32 px)", "AP medium", "AP large (from 96 px)")
GROUPS = {
    "gains": "Where distillation helps most",
    "losses": "Where it hurts most",
}


def write_report(
    out: Path,
    recipe: Recipe,
    arms: Sequence[Arm],
    sentences: Sequence[str],
    caveats: Sequence[str],
    facts: dict[str, str],
) -> Path:
    """Writes `report.html` into the study's folder and returns its path."""
    template = Template((files("detdistill.study") / "report.html").read_text(encoding="utf-8"))
    control = control_of(arms)
    best = best_method(arms)
    title = f"Does distillation help {recipe.student}?"
    body = template.substitute(
        title=html.escape(title),
        verdict=verdict(sentences),
        warnings=warnings(caveats),
        cards=_cards(arms, control, best),
        seeds=seeds_chart(arms),
        between=_between(arms),
        table=_table(arms, table_header(arms), table_rows(arms)),
        sizes=_table(arms, SIZES, size_rows(arms)),
        notes=html.escape(table_notes(arms)),
        curves=_figures(arms),
        classes=_classes(arms, control),
        legend=LEGEND,
        gallery=_gallery(arms, best, recipe),
        facts=facts_list(facts),
        recipe=html.escape(dump_recipe(recipe)),
    )
    path = out / "report.html"
    write_text(path, page(title, body))
    return path


def _cards(arms: Sequence[Arm], control: Arm, best: Arm) -> str:
    """The numbers that answer the question at a glance."""
    gains = paired_gains(best, control)
    gain = sum(gains) / len(gains)
    entries = [
        ("student alone", f"{control.mean():.1f}", "AP on test"),
        (f"student + {best.title}", f"{best.mean():.1f}", f"AP on test, {signed(gain)}"),
    ]
    teacher = arm_of(arms, "teacher")
    if teacher is not None:
        entries.append(("teacher", f"{teacher.mean():.1f}", "AP on test"))
    return cards(entries)


def _between(arms: Sequence[Arm]) -> str:
    """Method against method, where there are several; sure differences in bold."""
    rows = differences(arms)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in difference_rows(rows)[0])
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0].arm.title)}</th>{"".join(map(_cell, row))}</tr>'
        for row in rows
    )
    return (
        '<h3>Method against method</h3><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="notes">{html.escape(NOTE)} Bold: all seeds agree, and the interval leaves 0 '
        "out.</p>"
    )


def _cell(cell: Difference) -> str:
    tag = "b" if is_clear(cell.gains) else "span"
    return f'<td><{tag}>{cell.mean}</{tag}><div class="unit">{cell.interval}</div></td>'


def _table(arms: Sequence[Arm], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name) or "arm"}</th>' for name in header)
    colours = arm_colours(arms)
    body = []
    for arm, (title, *cells) in zip(arms, rows, strict=True):
        swatch = f'<span class="swatch" style="background:{colours[arm.name]}"></span>'
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        body.append(
            f'<tr class="{arm.kind}"><th scope="row">{swatch}{html.escape(title)}</th>{row}</tr>'
        )
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _figures(arms: Sequence[Arm]) -> str:
    dashed = "same-time student"
    if arm_of(arms, "teacher") is not None:
        dashed = f"teacher and {dashed}"
    charts = {
        f"AP on val during training. One line per seed; dashed: {dashed}.": ap_chart(arms),
        "Loss terms on train as they enter the sum (weighted, smoothed). "
        "The highest first values are cut off.": loss_chart(arms),
    }
    parts = [figure(chart, caption) for caption, chart in charts.items() if chart]
    return "".join(parts) or "<p>The runs logged no curves.</p>"


def _classes(arms: Sequence[Arm], control: Arm) -> str:
    colours, parts = arm_colours(arms), []
    for arm in methods_of(arms):
        chart = class_chart(arm, control, colours[arm.name])
        if chart:
            caption = f"{arm.title}: gain per class on test, mean over seeds, paired."
            parts.append(figure(chart, caption))
    return "".join(parts) or "<p>No class has test boxes.</p>"


def _gallery(arms: Sequence[Arm], best: Arm, recipe: Recipe) -> str:
    groups = make_gallery(arms, best, open_dataset(recipe, "test"))
    parts = []
    for group, rows in groups.items():
        if rows:
            parts.append(f"<h3>{GROUPS[group]}</h3>")
            parts += [panel_row(row) for row in rows]
    return "".join(parts) or "<p>Student and distilled student do alike on every picture.</p>"

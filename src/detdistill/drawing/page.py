"""The frame and the pieces of a page that needs nothing beside: no network, no other file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from string import Template


@dataclass(frozen=True)
class Panel:
    """One picture of a row: title, caption for people and screen readers, embedded image."""

    title: str
    caption: str
    data_uri: str


def page(title: str, body: str) -> str:
    """The whole document around the HTML of its body; the title is escaped here."""
    frame = Template((files("detdistill.drawing") / "page.html").read_text(encoding="utf-8"))
    return frame.substitute(title=html.escape(title), body=body)


def verdict(sentences: Sequence[str]) -> str:
    """What was found, in the framed lines at the top; the first is the largest."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in sentences)


def warnings(sentences: Sequence[str]) -> str:
    """What speaks against taking the findings at their word."""
    return "".join(
        f'<p class="warning"><strong>Warning.</strong> {html.escape(text)}</p>'
        for text in sentences
    )


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
    """The numbers to see at a glance, each with the label above and the unit below it."""
    return "".join(
        f'<div class="card"><div class="label">{html.escape(label)}</div>'
        f'<div class="number">{html.escape(number)}</div>'
        f'<div class="unit">{html.escape(unit)}</div></div>'
        for label, number, unit in entries
    )


def figure(svg: str, caption: str) -> str:
    """A chart with its caption below."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def panel_row(row: Sequence[Panel]) -> str:
    """Pictures side by side."""
    cells = []
    for panel in row:
        alt = html.escape(f"{panel.title}: {panel.caption}", quote=True)
        cells.append(
            f'<figure><img src="{panel.data_uri}" alt="{alt}"><figcaption>'
            f"<strong>{html.escape(panel.title)}</strong> {html.escape(panel.caption)}"
            "</figcaption></figure>"
        )
    return f'<div class="row" style="--columns: {len(row)}">{"".join(cells)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain cells; the first column names the rows."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{inner}</div>'


def facts_list(facts: Mapping[str, str]) -> str:
    """Settings by name."""
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd><code>{html.escape(value)}</code></dd>"
        for name, value in facts.items()
    )

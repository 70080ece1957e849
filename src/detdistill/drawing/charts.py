"""The look of all charts: SVG text that takes its ink from the page (light or dark)."""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import Any

import matplotlib
from matplotlib.figure import Figure

WIDTH = 9.6  # inches; at font size 10 the text comes out about as large as the page's own
INK = "#123456"  # replaced by the page's own text colour
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may hold a $
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color")},
    **{key: INK for key in ("xtick.color", "ytick.color")},
}


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element without XML preamble, with a text for screen readers."""
    memory = io.StringIO()
    # The salt makes element ids the same in every build; the prefix keeps charts apart on a page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The page's fonts draw the text, and have what matplotlib's own lacks.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(memory, format="svg", transparent=True, metadata={"Date": None})
    text = memory.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    label = html.escape(description, quote=True)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return text.replace(INK, "currentColor")

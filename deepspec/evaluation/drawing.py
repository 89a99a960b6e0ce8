"""How figures are drawn: in one style, as one `<svg>` element, the same bytes for the same numbers.

Text stays text and takes the page's font; ink is `currentColor`, so a figure follows the page from
light to dark. All are 400 units wide: about the width of a phone, half the width of a desktop page.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH, HEIGHT = 400, 290  # SVG units; text is 11 of them, so 10 px on a phone of 390 px
INK = "#010203"  # becomes currentColor
# The four colours of Okabe and Ito (2008) with a contrast of 3 or more on white and near-black both
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = "os^Dvp"
STYLE: Any = {  # matplotlib types the keys as one long Literal
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a benchmark's name is a dollar
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def canvas(height: float) -> Figure:
    """An empty figure of the common width."""
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def colour(index: int) -> str:
    """Of the line or bar with this number."""
    return PALETTE[index % len(PALETTE)]


def short(name: str, limit: int = 18) -> str:
    """A name that leaves room for the drawing."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def legend(figure: Figure, *panels: Axes) -> None:
    """One entry a label, above all panels."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=3,
            handlelength=1.6,
            columnspacing=1.2,
        )


def svg_of(figure: Figure, name: str, description: str) -> str:
    """One `<svg>` element: no prolog, no date, ids that no other figure of the page has."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    svg = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', svg.replace(INK, "currentColor"))
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1).strip()

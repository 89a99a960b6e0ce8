"""The reproduction's figures as SVG: lines with error bars, and bars by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from deepspec.evaluation.drawing import (
    HEIGHT,
    INK,
    MARKERS,
    PALETTE,
    STYLE,
    canvas,
    colour,
    legend,
    svg_of,
)

GREY = "#7A7F8A"  # of the bar behind the palette's
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # the next round of colours


@dataclass(frozen=True)
class Series:
    """Points of one line; `errors`: one standard error of each, drawn up and down."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None


@dataclass(frozen=True)
class Scales:
    """What the axes show. `percent`: y is a share, from 0 to 1. `ticks`: x where it was measured.
    `log`: x by its logarithm. `zero`: y from 0 on."""

    xlabel: str
    ylabel: str
    percent: bool = False
    ticks: bool = False
    log: bool = False
    zero: bool = False


@rc_context(STYLE)
def lines(name: str, description: str, scales: Scales, series: Sequence[Series]) -> str:
    """A line each, with a legend; `name`: no other figure of the page has it."""
    figure = canvas(HEIGHT + 16 * (len(series) // 4))
    axes = figure.subplots()
    for index, one in enumerate(series):
        axes.errorbar(
            one.x,
            one.y,
            one.errors,
            color=colour(index),
            linestyle=DASHES[index // len(PALETTE) % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            capsize=2,
            label=one.label,
        )
    _scale(axes, scales, sorted({x for one in series for x in one.x}))
    legend(figure, axes)
    return svg_of(figure, name, description)


def _scale(axes: Axes, scales: Scales, places: Sequence[float]) -> None:
    if scales.log:
        axes.set_xscale("log")
    if scales.ticks:
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    if scales.percent:
        axes.set_ylim(0, 1.04)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif scales.zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(scales.xlabel)
    axes.set_ylabel(scales.ylabel)
    axes.grid(axis="y")


@dataclass(frozen=True)
class Bars:
    """One panel: for each label a bar a place, with its standard error."""

    title: str
    places: Sequence[str]
    heights: Mapping[str, Sequence[float]]
    errors: Mapping[str, Sequence[float]] | None = None


@rc_context(STYLE)
def bars(name: str, description: str, ylabel: str, panels: Sequence[Bars]) -> str:
    """Panels one below the other; a label has the same colour in all."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.heights))
    figure = canvas(80 + 180 * len(panels))
    drawn_on = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(drawn_on, panels, strict=True):
        width = 0.8 / len(labels)
        for index, label in enumerate(labels):
            if label not in panel.heights:
                continue
            places = [i - 0.4 + (index + 0.5) * width for i in range(len(panel.places))]
            errors = panel.errors[label] if panel.errors else None
            drawn = axes.bar(
                places,
                panel.heights[label],
                width * 0.9,
                yerr=errors,
                error_kw={"ecolor": INK, "elinewidth": 1},
                color=colour(index) if index < len(PALETTE) else GREY,
                label=label,
            )
            axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=9)
        axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (3, 3)), label="plain decoding")
        axes.set_xticks(range(len(panel.places)), panel.places)
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.15)
        axes.set_title(panel.title)
        axes.grid(axis="y")
    figure.supylabel(ylabel, fontsize=11)
    legend(figure, *figure.axes)
    return svg_of(figure, name, description)

"""Figures of reports: results in, one `<svg>` element out, drawn as `drawing` says."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from deepspec.evaluation.drawing import (
    HEIGHT,
    INK,
    MARKERS,
    STYLE,
    canvas,
    colour,
    legend,
    short,
    svg_of,
)
from deepspec.evaluation.results import Report, mean_over_seeds
from deepspec.scheduling.calibration_file import Half

TEMPERATURE_COLOUR = "#5B5FC7"  # one hue, paler as the temperature rises


@rc_context(STYLE)
def accepted_length_figure(report: Report) -> str:
    """Accepted length a benchmark (tokens a round), a bar a temperature, seeds averaged."""
    rows = mean_over_seeds(report.results)
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    temperatures = sorted({row.temperature for row in rows})
    figure = canvas(max(HEIGHT, 90 + 16 * len(benchmarks) * (len(temperatures) + 1)))
    axes = figure.subplots()
    thickness = 0.8 / max(1, len(temperatures))
    for index, temperature in enumerate(temperatures):
        own = [row for row in rows if row.temperature == temperature]
        bars = axes.barh(
            [benchmarks.index(row.benchmark) - 0.4 + (index + 0.5) * thickness for row in own],
            [row.accepted_length for row in own],
            height=thickness * 0.9,
            color=TEMPERATURE_COLOUR,
            alpha=0.6**index,
            label=f"temperature {temperature:g}",
        )
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (3, 3)), label="plain")
    axes.set_yticks(range(len(benchmarks)), [short(name) for name in benchmarks])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    axes.set_xlabel("accepted length (tokens a round)")
    axes.grid(axis="x")
    legend(figure, axes)
    return svg_of(figure, "accepted-length", "Accepted length by benchmark and temperature")


@rc_context(STYLE)
def conditional_acceptance_figure(report: Report) -> str:
    """Acceptance at each position, all earlier drafts accepted: a line a benchmark, a panel a T."""
    rows = mean_over_seeds(report.results)
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    temperatures = sorted({row.temperature for row in rows}) or [0.0]
    columns = min(2, len(temperatures))
    lines = -(-len(temperatures) // columns)
    figure = canvas(HEIGHT + 180 * (lines - 1))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, temperature in zip(panels, temperatures, strict=False):
        for row in (row for row in rows if row.temperature == temperature):
            index = benchmarks.index(row.benchmark)
            rates = [float("nan") if rate is None else rate for rate in row.conditional_acceptance]
            panel.plot(
                range(1, len(rates) + 1),
                rates,
                color=colour(index),
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                label=short(row.benchmark),
            )
        panel.set_title(f"temperature {temperature:g}")
        panel.set_ylim(0, 1.04)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelbottom=True)
        panel.grid(axis="y")
    for unused in panels[len(temperatures) :]:
        unused.remove()
    figure.supxlabel("position in the block", fontsize=11)
    figure.supylabel("acceptance, all earlier accepted", fontsize=11)
    legend(figure, *panels)
    return svg_of(figure, "conditional", "Conditional acceptance by position in the block")


@rc_context(STYLE)
def training_loss_figure(report: Report) -> str | None:
    """Loss terms over optimizer steps, validation dashed; None without training rows."""
    terms = {
        "ce": "cross-entropy (nats)",
        "l1": "L1 distance (0 to 2)",
        "confidence": "confidence (nats)",
        "loss": "weighted sum",
    }
    figure, axes = _curves(report, terms, "loss, a token")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    if not axes.lines:
        return None
    return svg_of(figure, "training-loss", "Training and validation loss over optimizer steps")


@rc_context(STYLE)
def training_length_figure(report: Report) -> str | None:
    """Expected accepted length (tokens a round) over optimizer steps; None without rows."""
    figure, axes = _curves(report, {"accept_length": "training"}, "expected tokens a round")
    if not axes.lines:
        return None
    return svg_of(figure, "training-length", "Expected accepted length over optimizer steps")


@rc_context(STYLE)
def reliability_figure(half: Half, name: str) -> str:
    """Observed against predicted prefix survival, a panel a position; dots grow with their share of
    the rounds. On the diagonal, what is predicted happens."""
    columns = min(3, len(half.before))
    lines = -(-len(half.before) // columns)
    figure = canvas(90 + 400 // columns * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, *pair in zip(panels, half.before, half.after, strict=False):
        panel.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (3, 3)), label="exact")
        for index, (reliability, label) in enumerate(zip(pair, ("before", "after"), strict=True)):
            predicted = [each.predicted for each in reliability.bins]
            happened = [each.happened for each in reliability.bins]
            sizes = [4 + 90 * each.count / reliability.samples for each in reliability.bins]
            panel.plot(predicted, happened, color=colour(index), linewidth=1.2, label=label)
            panel.scatter(predicted, happened, sizes, color=colour(index), marker=MARKERS[index])
        panel.set_title(f"draft {pair[0].position}")
        panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        panel.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        panel.tick_params(labelbottom=True)
        panel.grid()
    for unused in panels[len(half.before) :]:
        unused.remove()
    figure.supxlabel("predicted survival", fontsize=11)
    figure.supylabel("share that survived", fontsize=11)
    legend(figure, *panels)
    return svg_of(figure, f"reliability-{name}", f"Predicted and observed prefix survival, {name}")


@rc_context(STYLE)
def calibration_error_figure(half: Half, name: str) -> str:
    """ECE by position before and after, and what chance alone would leave."""
    figure = canvas(HEIGHT)
    axes = figure.subplots()
    lines = {
        "before": [each.ece for each in half.before],
        "after": [each.ece for each in half.after],
        "chance": [each.noise for each in half.after],
    }
    places = [each.position for each in half.before]
    for index, (label, errors) in enumerate(lines.items()):
        chance = label == "chance"
        axes.plot(
            places,
            errors,
            color=INK if chance else colour(index),
            linestyle=(0, (3, 3)) if chance else "-",
            linewidth=1 if chance else 1.5,
            marker="" if chance else MARKERS[index],
            markersize=5,
            label=label,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the block")
    axes.set_ylabel("calibration error of survival (ECE)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    legend(figure, axes)
    return svg_of(figure, f"calibration-error-{name}", f"ECE by position before and after, {name}")


# ---------------------------------------------------------------------------------------- drawing


def _curves(report: Report, terms: dict[str, str], ylabel: str) -> tuple[Figure, Axes]:
    """Each term over the steps as a line; its validation dashed, with a dot a measurement."""
    figure = canvas(HEIGHT)
    axes = figure.subplots()
    for prefix, line, marker in (("", "-", ""), ("validation_", "--", "o")):
        for index, (term, label) in enumerate(terms.items()):
            key = prefix + term
            points = [(row["step"], row[key]) for row in report.training if key in row]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour(index),
                    linestyle=line,
                    marker=marker if len(points) > 1 else "o",
                    markersize=4,
                    label="validation" if prefix else label,
                )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    legend(figure, axes)
    return figure, axes

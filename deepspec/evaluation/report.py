"""The acceptance report: one `Report` as JSON, as Markdown, as a page, and as a terminal table.

Cells and sentences are made once, as text; each form only draws them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from deepspec.atomic import write_text
from deepspec.evaluation.results import Baseline, Report, mean_over_seeds
from deepspec.streams import visible

NONE = "–"
COLUMNS = {
    "T": "sampling temperature; 0 is greedy",
    "prompts": "decoded with the drafter, all seeds together",
    "accepted length": "tokens a round, bonus token counted; a round is one pass of the target",
    "acceptance rate": "accepted drafts over verified ones",
    "verify rate": "verified drafts over proposed ones",
    "tokens/s": "new tokens a second with the drafter",
    "plain tokens/s": "the same target without a drafter, on the first prompts",
    "speedup": "tokens/s over plain tokens/s, on the prompts that both ran",
    "identical": "outputs that equal plain decoding's, token by token; checked at T 0",
}

LOOKUP = (
    "accepted length",
    "n-gram accepted length",
    "tokens/s",
    "n-gram tokens/s",
    "plain tokens/s",
)

HIDDEN = ("acceptance rate", "verify rate", "plain tokens/s")  # on a terminal, for want of width


@dataclass(frozen=True)
class Table:
    """Cells as text. The first `labels` columns are words, the others numbers."""

    header: list[str]
    rows: list[list[str]]
    foot: list[list[str]] = field(default_factory=list)
    labels: int = 1


@dataclass(frozen=True)
class Exactness:
    """Whether greedy outputs were those of plain decoding, and the same in words."""

    verdict: Literal["exact", "rounding", "broken", "unchecked"]
    headline: str
    text: str


# ------------------------------------------------------------------------------------ what it says


def outcome(report: Report) -> str:
    """The result in words: accepted length a temperature, speedup at temperature 0."""
    ordered = sorted(report.averages, key=lambda average: average.temperature)
    if not ordered:
        return "No benchmark was measured."
    lengths = [f"{row.accepted_length:.2f} at temperature {row.temperature:g}" for row in ordered]
    text = f"The accepted length (tokens a round, bonus token counted) is {_listed(lengths)}."
    speedup = ordered[0].speedup if ordered[0].temperature == 0 else None
    if speedup is not None:
        text += f" Greedy decoding runs at {speedup:.2f} times its speed without the drafter."
    return text


def exactness(report: Report) -> Exactness:
    """The evidence for losslessness at temperature 0, all benchmarks and seeds together."""
    checked = [row.baseline for row in report.results if row.baseline and _compared(row.baseline)]
    identical, explained, unexplained = (
        sum(getattr(base, name) or 0 for base in checked)
        for name in ("identical", "explained", "unexplained")
    )
    total = identical + explained + unexplained
    # an output that ends where plain decoding goes on has no pair of logits to compare
    gaps = [base.largest_gap for base in checked if base.largest_gap is not None]
    largest = f"largest gap {max(gaps):.3g} logits" if gaps else "of unlike length"
    same = f"Identical to plain decoding, token by token: {identical} of {total} greedy outputs."
    near = (
        "Differing only at a near-tie of the target's two best tokens, within its own rounding "
        f"noise: {explained}"
    )
    if not total:
        return Exactness(
            "unchecked", "Losslessness not checked.", "No output was compared with plain decoding."
        )
    if unexplained:
        beyond = f"Differing by more than rounding explains: {unexplained} ({largest})."
        advice = "Do not rely on the other numbers until the cause is found."
        text = f"{beyond} {same} {near}. {advice}"
        return Exactness("broken", "WARNING: decoding is not lossless.", text)
    if explained:
        return Exactness(
            "rounding", "Lossless at temperature 0, up to rounding.", f"{same} {near} ({largest})."
        )
    return Exactness("exact", "Lossless at temperature 0.", same)


def acceptance(report: Report) -> Table:
    """A row a benchmark and temperature (seeds averaged); means over benchmarks at the foot."""
    rows = []
    for row in mean_over_seeds(report.results):
        base = row.baseline
        rows.append(
            [
                row.benchmark,
                f"{row.temperature:g}",
                f"{row.prompts:,}",
                number_cell(row.accepted_length),
                _percent(row.acceptance_rate),
                _percent(row.verify_rate),
                number_cell(row.tokens_per_second, 1),
                number_cell(base.tokens_per_second, 1) if base else NONE,
                _times(base.speedup) if base else NONE,
                _identical(base) if base else NONE,
            ]
        )
    foot = [
        ["average", temperature, "", length, "", "", rate, "", speedup, ""]
        for temperature, length, rate, speedup in averages(report).rows
    ]
    return Table(["benchmark", *COLUMNS], rows, foot)


def averages(report: Report) -> Table:
    """Means over benchmarks, a row a temperature."""
    rows = [
        [
            f"{average.temperature:g}",
            number_cell(average.accepted_length),
            number_cell(average.tokens_per_second, 1),
            _times(average.speedup),
        ]
        for average in report.averages
    ]
    return Table(["temperature", "accepted length", "tokens/s", "speedup"], rows)


def lookups(report: Report) -> Table:
    """Drafter, prompt lookup and plain decoding on the same prompts; means at the foot.

    No rows where lookup was not run.
    """
    rows: list[list[str]] = []
    measured: dict[float, list[list[float]]] = {}
    for row in mean_over_seeds(report.results):
        lookup, base = row.lookup, row.baseline
        if lookup is None or base is None:
            continue
        lengths = [lookup.drafter_accepted_length, lookup.accepted_length]
        speeds = [base.speedup * base.tokens_per_second, lookup.tokens_per_second]
        numbers = [*lengths, *speeds, base.tokens_per_second]
        measured.setdefault(row.temperature, []).append(numbers)
        place = [row.benchmark, f"{row.temperature:g}", f"{lookup.prompts:,}"]
        rows.append([*place, *_lookup_cells(numbers)])
    foot = [
        ["average", f"{temperature:g}", "", *_lookup_cells(map(fmean, zip(*same, strict=True)))]
        for temperature, same in sorted(measured.items())
    ]
    return Table(["benchmark", "T", "prompts", *LOOKUP], rows, foot)


def lookup_text(report: Report) -> str:
    """What prompt lookup reaches on average; empty where it was not run."""
    found = [
        f"{cells[4]} at temperature {cells[1]} (the drafter {cells[3]})"
        for cells in lookups(report).foot
    ]
    if not found:
        return ""
    return f"Prompt lookup (n-gram) reaches {_listed(found)} without training, on the same prompts."


def positions(report: Report) -> Table:
    """Conditional acceptance at each position of the block: the figure's numbers."""
    merged = mean_over_seeds(report.results)
    size = max((len(row.conditional_acceptance) for row in merged), default=0)
    rows = [
        [
            row.benchmark,
            f"{row.temperature:g}",
            *(_percent(rate) for rate in row.conditional_acceptance),
        ]
        for row in merged
    ]
    return Table(["benchmark", "T", *(str(position + 1) for position in range(size))], rows)


def skipped(report: Report) -> Table:
    """Rows left out, by stage and reason."""
    rows = [
        [stage, reason, f"{count:,}"]
        for stage, reasons in report.skipped.items()
        for reason, count in reasons.items()
    ]
    return Table(["stage", "reason", "rows"], rows, labels=2)


# ----------------------------------------------------------------------------------------- forms


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.json, report.md and report.html (one self-contained page) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"report.{form}" for form in ("json", "md", "html")]
    report.save(paths[0])
    context = _context(report)
    for path in paths[1:]:
        render(path, context)
    return paths


def render(path: Path, context: Mapping[str, Any]) -> None:
    """Write the page at `path` by the template of its name, whole or not at all."""
    write_text(path, environment().get_template(f"{path.name}.j2").render(context))


def markdown_table(report: Report) -> str:
    """The acceptance table alone, as GitHub-flavoured Markdown."""
    return _markdown(acceptance(report))


def results_table(report: Report) -> RichTable:
    """The acceptance table for a terminal of 80 columns, the exactness statement below it."""
    table = acceptance(report)
    shown = [i for i, name in enumerate(table.header) if name not in HIDDEN]
    verdict = exactness(report)
    style = "bold red" if verdict.verdict == "broken" else "dim"
    caption = Text(f"{verdict.headline} {verdict.text}", style=style)
    if said := lookup_text(report):
        caption.append(f" {said}", style="dim")
    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption=caption,
        caption_justify="left",
    )
    for index in shown:
        number = index >= table.labels
        drawn.add_column(
            table.header[index].replace(" ", "\n"),
            justify="right" if number else "left",
            no_wrap=number,
            overflow="fold",
            min_width=None
            if number
            else min(24, max((len(row[0]) for row in table.rows), default=9)),
        )
    for row in table.rows:
        drawn.add_row(visible(row[0]), *(row[index].replace(", ", "\n") for index in shown[1:]))
    drawn.add_section()
    for row in table.foot:
        drawn.add_row(*(row[index] for index in shown), style="bold")
    return drawn


def _context(report: Report) -> dict[str, Any]:
    from deepspec.evaluation import figures  # and with them matplotlib: a training starts without

    drawn = {
        "accepted": figures.accepted_length_figure(report),
        "conditional": figures.conditional_acceptance_figure(report),
        "loss": figures.training_loss_figure(report),
        "length": figures.training_length_figure(report),
    }
    return {
        "report": report,
        "outcome": outcome(report),
        "exactness": exactness(report),
        "acceptance": acceptance(report),
        "averages": averages(report),
        "lookups": lookups(report),
        "lookup_text": lookup_text(report),
        "positions": positions(report),
        "skipped": skipped(report),
        "definitions": COLUMNS,
        "figures": drawn if report.results else {},
        "config": yaml.safe_dump(report.config, sort_keys=False, allow_unicode=True),
    }


def environment() -> Environment:
    """Where the pages' templates are, and what they can say."""
    found = Environment(
        loader=PackageLoader("deepspec.evaluation"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"facts": _facts, "markdown": _markdown, "plain": _plain}
    return found


def _markdown(table: Table) -> str:
    rule = [":--" if index < table.labels else "--:" for index in range(len(table.header))]
    rows = [[_plain(cell) for cell in row] for row in table.rows]
    foot = [[cell and f"**{_plain(cell)}**" for cell in row] for row in table.foot]
    lines = [table.header, rule, *rows, *foot]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """`text` for a line of Markdown: nothing in it is markup, a cell's end or a line's."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


# ----------------------------------------------------------------------------------------- cells


def _facts(mapping: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, value) of every leaf, as a reader would write them."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _facts(value)
        else:
            yield str(key).replace("_", " "), _fact(value)


def _fact(value: Any) -> str:
    match value:
        case None:
            return NONE
        case bool():
            return "yes" if value else "no"
        case int() if value >= 1_000_000:  # a count; smaller ones may be ids
            return f"{value:,}"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return ", ".join(map(_fact, value))
        case _:
            return str(value)


def number_cell(value: float | None, digits: int = 2) -> str:
    """As a cell; a dash where there is none."""
    return NONE if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _lookup_cells(numbers: Iterable[float]) -> list[str]:
    """Of the columns LOOKUP."""
    digits = (2, 2, 1, 1, 1)
    return [number_cell(number, count) for number, count in zip(numbers, digits, strict=True)]


def _listed(parts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _percent(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.1%}"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{number_cell(value)}×"


def _compared(base: Baseline) -> int:
    """Outputs compared with plain decoding's."""
    return sum(count or 0 for count in (base.identical, base.explained, base.unexplained))


def _identical(base: Baseline) -> str:
    if not (total := _compared(base)):
        return NONE
    text = f"{base.identical}/{total}"
    if base.explained:
        text += f", {base.explained} rounding"
    if base.unexplained:
        text += f", {base.unexplained} UNEXPLAINED"
    return text

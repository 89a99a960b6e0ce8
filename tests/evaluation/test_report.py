"""The report's forms against numbers worked out by hand, and its page in a real browser."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from rich.table import Table

from deepspec.evaluation import figures
from deepspec.evaluation.report import (
    acceptance,
    exactness,
    lookup_text,
    lookups,
    markdown_table,
    results_table,
    write_report,
)
from deepspec.evaluation.results import (
    Average,
    Baseline,
    BenchmarkResult,
    Lookup,
    Report,
    mean_over_seeds,
    read_report,
)
from deepspec.terminal import Terminal

HOSTILE = "<script>x|`[b]$"
FIGURES: list[Callable[[Report], str | None]] = [
    figures.accepted_length_figure,
    figures.conditional_acceptance_figure,
    figures.training_loss_figure,
    figures.training_length_figure,
]


def result(
    benchmark: str,
    temperature: float,
    length: float,
    seed: int = 0,
    baseline: Baseline | None = None,
    conditional: list[float | None] | None = None,
    lookup: Lookup | None = None,
) -> BenchmarkResult:
    return BenchmarkResult(
        benchmark=benchmark,
        temperature=temperature,
        seed=seed,
        prompts=600,
        tokens=6000,
        rounds=2000,
        seconds=60.0,
        tokens_per_second=10 * length,
        accepted_length=length,
        acceptance_rate=length / 10,
        verify_rate=0.95,
        conditional_acceptance=conditional or [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
        prefix_survival=[0.8, 0.56, 0.34, 0.17, 0.07, 0.02, 0.0],
        baseline=baseline,
        lookup=lookup,
    )


@pytest.fixture(scope="module")
def report() -> Report:
    """Three benchmarks at two temperatures, "code" with two seeds, one near-tie in 24 outputs."""
    near = Baseline(8, 20.0, 1.5, identical=7, explained=1, unexplained=0, largest_gap=0.031)
    same = Baseline(8, 22.0, 2.5, identical=8, explained=0, unexplained=0, largest_gap=0.0)
    training = [
        {"step": 10 * i, "loss": 4 / i, "ce": 8 / i, "l1": 2 / i, "confidence": 0.5 / i}
        | {"accept_length": 1 + 0.05 * i}
        for i in range(1, 41)
    ]
    training[20:20] = [{"step": 200, "validation_ce": 0.5, "validation_accept_length": 1.9}]
    return Report(
        title="tiny & small",
        created="2025-06-01T12:00:00Z",
        version="0.1.0",
        target="data/tiny_target",
        identity={"weights": "0123456789abcdef" * 4},
        drafter={"kind": "dspark", "parameters": 1234567, "shape": {"block_size": 7, "bias": None}},
        machine={"device": "cpu", "versions": {"torch": "2.13.0"}},
        config={"seed": 0, "target": {"path": "data/tiny_target", "layer_ids": [1, 3]}},
        results=[
            result("code", 1.0, 2.5),
            result("code", 0.0, 3.0, baseline=near, lookup=Lookup(8, 1.25, 24.0, 3.1)),
            result("code", 0.0, 4.0, seed=1, baseline=same),
            result("chat", 0.0, 2.25, conditional=[0.9, 0.1, None, None, None, None, None]),
            result("chat", 1.0, 2.0),
            result(HOSTILE, 0.0, 1.75, baseline=same, lookup=Lookup(8, 1.75, 36.0, 1.9)),
            result(HOSTILE, 1.0, 1.5),
        ],
        averages=[Average(0.0, 2.5, 25.0, 2.25), Average(1.0, 2.0, 20.0, None)],
        skipped={"training data": {"no assistant turn": 1200}},
        training=training,
    )


@pytest.fixture(scope="module")
def forms(report: Report, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Its report.md and report.html."""
    return written(report, tmp_path_factory.mktemp("forms"))


def cells(page: str) -> list[str]:
    """Text of every table cell of some HTML, in order."""
    found = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", page, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in found]


def written(report: Report, folder: Path) -> tuple[str, str]:
    """report.md and report.html."""
    _, markdown, page = write_report(report, folder)
    return markdown.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")


def shown(table: Table) -> str:
    """What a terminal of 100 columns prints."""
    stream = io.StringIO()
    Terminal(file=stream, width=80).print(table)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------ numbers


def test_seeds_are_averaged_and_counts_summed(report: Report) -> None:
    """By hand: lengths 3 and 4, speedups 1.5 and 2.5, 7 + 8 identical, 600 + 600 prompts."""
    merged = mean_over_seeds(report.results)
    order = [(row.benchmark, row.temperature) for row in merged]
    assert order == [(name, t) for name in ("code", "chat", HOSTILE) for t in (0.0, 1.0)]
    code = merged[0]
    assert (code.accepted_length, code.tokens_per_second, code.prompts) == (3.5, 35.0, 1200)
    assert code.baseline == Baseline(16, 21.0, 2.0, 15, 1, 0, 0.031)


def test_a_position_is_averaged_over_the_seeds_that_reached_it() -> None:
    """By hand: (0.9 + 0.7) / 2; 0.4 from the one seed that got there; nobody got to the third."""
    seeds = [
        result("code", 0.0, 3.0, conditional=[0.9, 0.4, None]),
        result("code", 0.0, 3.0, seed=1, conditional=[0.7, None, None]),
    ]
    assert mean_over_seeds(seeds)[0].conditional_acceptance == [pytest.approx(0.8), 0.4, None]


def test_acceptance_cells(report: Report) -> None:
    """Written out by hand from the fixture."""
    table = acceptance(report)
    expected = "code 0 1,200 3.50 35.0% 95.0% 35.0 21.0 2.00×".split()
    assert table.rows[0] == [*expected, "15/16, 1 rounding"]
    assert table.rows[1] == ["code", "1", "600", "2.50", "25.0%", "95.0%", "25.0", *"–––"]
    assert [row[3] for row in table.foot] == ["2.50", "2.00"]
    assert [row[8] for row in table.foot] == ["2.25×", "–"]


def test_lookup_cells(report: Report) -> None:
    """By hand: the speed of the drafter on code is 2.0 x 21.0, the means of its two seeds."""
    table = lookups(report)
    expected = [["code", "0", "8", "3.10", "1.25", "42.0", "24.0", "21.0"]]
    expected += [[HOSTILE, "0", "8", "1.90", "1.75", "55.0", "36.0", "22.0"]]
    assert table.rows == expected
    assert table.foot == [["average", "0", "", "2.50", "1.50", "48.5", "30.0", "21.5"]]
    text = "reaches 1.50 at temperature 0 (the drafter 2.50) without training"
    assert text in lookup_text(report)
    without = replace(report, results=[replace(row, lookup=None) for row in report.results])
    assert (lookups(without).rows, lookup_text(without)) == ([], "")


def test_lookup_is_in_every_form(report: Report, forms: tuple[str, str], tmp_path: Path) -> None:
    said = lookup_text(report)
    without = replace(report, results=[replace(row, lookup=None) for row in report.results])
    others = (*written(without, tmp_path), shown(results_table(without)))
    for text, other in zip((*forms, shown(results_table(report))), others, strict=True):
        assert said.split() == [word for word in said.split() if word in text]
        assert "lookup" not in other.lower()
    assert "| average |" not in forms[0]  # bold, as in the other table
    assert "| **average** | **0** |  | **2.50** | **1.50** |" in forms[0]


def test_page_and_markdown_hold_the_same_cells(report: Report, forms: tuple[str, str]) -> None:
    """Both are parsed back; a name full of markup comes through both unharmed."""
    markdown, page = forms
    table = acceptance(report)
    body = [cell for row in table.rows for cell in row]
    foot = [cell for row in table.foot for cell in row]
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    assert cells(parser.render(markdown_table(report))) == [*table.header, *body, *foot]
    assert markdown_table(report) in markdown
    on_page = cells(page)
    start = on_page.index("benchmark")
    assert on_page[start : start + 10 + len(body)] == [*table.header, *body]
    for text in (markdown, html.unescape(page)):
        assert "2.50 at temperature 0 and 2.00 at temperature 1" in text
        assert "runs at 2.25 times its speed" in text
        assert "23 of 24 greedy outputs" in text
        assert "1,234,567" in text


def test_json_comes_back(report: Report, tmp_path: Path) -> None:
    """The report read is the report written."""
    assert read_report(write_report(report, tmp_path / "new")[0]) == report


# ---------------------------------------------------------------------------------------- exactness


def test_an_unexplained_difference_is_loud(
    report: Report, forms: tuple[str, str], tmp_path: Path
) -> None:
    """One output beyond rounding turns every form into a warning; without it none warns."""
    broken = Baseline(8, 20.0, 2.0, identical=7, explained=0, unexplained=1, largest_gap=4.25)
    bad = replace(report, results=[*report.results, result("math", 0.0, 3.0, baseline=broken)])
    markdown, page = written(bad, tmp_path)
    for text in (shown(results_table(bad)), markdown, page):
        assert "WARNING: decoding is not lossless." in text
        assert "1 UNEXPLAINED" in text
        assert "4.25" in text
    assert 'role="alert"' in page
    assert not any("WARNING" in text or "alert" in text for text in forms)


def test_verdicts(report: Report) -> None:
    """No baseline: unchecked. All equal: exact. Unlike lengths have no gap in logits to tell."""
    code = report.results[2]
    assert code.baseline is not None
    ended = replace(code.baseline, identical=7, unexplained=1, largest_gap=None)
    verdicts = [
        exactness(replace(report, results=[replace(code, baseline=baseline)]))
        for baseline in (None, code.baseline, ended)
    ]
    assert [verdict.verdict for verdict in verdicts] == ["unchecked", "exact", "broken"]
    assert "unlike length" in verdicts[2].text
    tied = replace(code.baseline, identical=7, explained=1, largest_gap=0.0)
    verdict = exactness(replace(report, results=[replace(code, baseline=tied)]))
    assert "(largest gap 0 logits)" in verdict.text


# ------------------------------------------------------------------------------------------ safety


def test_page_loads_nothing_and_runs_nothing(forms: tuple[str, str]) -> None:
    """Every address is inside the page; the hostile name is text; no two elements share an id."""
    _, page = forms
    addresses = re.findall(r'(?:src|href|action|srcset)\s*=\s*"([^"]*)"|url\(([^)]*)\)', page)
    assert addresses
    assert all(re.match("#|data:,$", a or b) for a, b in addresses)
    assert "<script" not in page
    assert "@import" not in page
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_are_stable_xml(draw: Callable[[Report], str | None], report: Report) -> None:
    """Well-formed, the same twice, in the page's ink, with axes labelled."""
    svg = draw(report)
    assert svg is not None
    assert draw(report) == svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "nan" not in svg
    assert "currentColor" in svg
    assert "#010203" not in svg


def test_figures_say_what_was_measured(report: Report) -> None:
    """Bars carry the averaged lengths; lines the names as they are, `$` included."""
    texts = [
        "".join(node.itertext())
        for draw in FIGURES
        for node in ElementTree.fromstring(draw(report) or "").iter()
        if node.tag.endswith("}text")
    ]
    for text in ("3.50", "2.25", HOSTILE, "temperature 1", "optimizer step", "validation"):
        assert text in texts


def test_without_training_or_results(
    report: Report, forms: tuple[str, str], tmp_path: Path
) -> None:
    """Two figures instead of four; and an evaluation of nothing still says so."""
    assert forms[1].count("<figure>") == 4
    assert written(replace(report, training=[]), tmp_path)[1].count("<figure>") == 2
    for text in written(replace(report, results=[], averages=[], training=[]), tmp_path):
        assert "No benchmark was measured." in text
        assert "<figure>" not in text


def test_terminal_table_fits_80_columns(report: Report) -> None:
    """No line is wider, no number is cut, and a name in brackets is no markup."""
    lines = [line.strip() for line in shown(results_table(report)).splitlines()]
    assert max(map(len, lines)) <= 80
    assert [line.split()[:3] for line in lines if line.startswith("average")] == [
        ["average", "0", "2.50"],
        ["average", "1", "2.00"],
    ]
    assert [line.split()[:4] for line in lines if line.startswith("<script>")] == [
        [HOSTILE, "0", "600", "1.75"],
        [HOSTILE, "1", "600", "1.50"],
    ]


# ----------------------------------------------------------------------------------------- browser

# The page sits in an iframe of the wanted width: a headless window has a least width of its own.
MEASURE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:{width}px;height:6000px" srcdoc="{page}"></iframe><pre></pre>
<script>addEventListener("load", () => {{
  const view = document.querySelector("iframe").contentWindow, root = view.document;
  root.querySelectorAll("details").forEach(part => part.open = true);
  const table = root.querySelector(".wide");
  document.querySelector("pre").textContent = JSON.stringify({{
    inner: view.innerWidth,
    page: root.documentElement.scrollWidth,
    table: table.scrollWidth - table.parentElement.clientWidth,
    text: Math.min(...[...root.querySelectorAll("svg text")].map(text =>
      parseFloat(view.getComputedStyle(text).fontSize) *
        Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b))),
    requests: view.performance.getEntriesByType("resource").length,
  }});
}});</script>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(width: int, forms: tuple[str, str], tmp_path: Path) -> None:
    """The page never scrolls sideways, details open; on a phone its wide table does, inside."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome found on PATH: the page is not looked at")
    (tmp_path / "measure.html").write_text(
        MEASURE.format(width=width, page=html.escape(forms[1])), encoding="utf-8"
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage "
        "--no-first-run --disable-background-networking --disable-component-update --disable-sync "
        "--virtual-time-budget=5000 --dump-dom"
    )
    command = [
        browser,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={max(width, 500)},2000",
        f"--screenshot={tmp_path / 'page.png'}",
        (tmp_path / "measure.html").as_uri(),
    ]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<pre>(\{.*?\})</pre>", dump)
    assert found, dump[-2000:]
    measured = json.loads(found[1])
    assert measured["inner"] == width
    assert measured["page"] <= width
    assert (measured["table"] > 0) == (width == 390)
    assert measured["text"] >= 9  # CSS pixels
    assert measured["requests"] == 0
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000  # a blank page of this size is a tenth of it

"""Fit a drafter's confidences to what happened when it decoded held-out prompts.

Everything that was proposed is verified, so that every position's outcome is known. Half of the
prompts chooses the scaling, the other half says what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable

from deepspec.config.schema import RunConfig
from deepspec.drafters.base import Proposer
from deepspec.errors import ConfigError, DataError
from deepspec.evaluation.evaluate import Evaluation, evaluate
from deepspec.evaluation.report import Table, render
from deepspec.records import DecodeTrace
from deepspec.scheduling.calibration import BINS, Rounds, Scaling, fit_sts
from deepspec.scheduling.calibration_file import FIT, HELD_OUT, Calibration, Fit, Half, Reliability
from deepspec.scheduling.platt import fit_platt
from deepspec.scheduling.reliability import measure
from deepspec.targets import Target

ENOUGH = 1000  # rounds of the held-out half; with fewer, chance is most of what ECE shows
METHODS: dict[str, Callable[[Rounds], Scaling]] = {"sts": fit_sts, "platt": fit_platt}
HIDDEN = ("ECE after, fit half", "Brier before")  # on a terminal, for want of width
PERCENT = ("survived", "ECE before", "ECE after", "by chance")


def decode_everything(config: RunConfig, target: Target, proposer: Proposer) -> Evaluation:
    """The rounds to learn from: those of `config.evaluation`, all its seeds, nothing
    scheduled and nothing compared with plain decoding. Raises as `evaluate`."""
    decoding = replace(config.decoding, scheduler="none")
    evaluation = replace(config.evaluation, baseline_prompts=0)
    return evaluate(replace(config, decoding=decoding, evaluation=evaluation), target, proposer)


def fit_all(config: RunConfig, evaluation: Evaluation, method: str) -> tuple[Fit, ...]:
    """A fit by `method` (of METHODS) a temperature of decoding.

    Raises ConfigError where the drafter gave no confidences, DataError where one half of the
    prompts has no round.
    """
    traces = [(temperature, trace) for _, temperature, _, trace in evaluation.traces]
    if not any(trace.confidences for _, trace in traces):
        raise ConfigError(
            "this drafter gives no confidences to calibrate; train one with "
            "drafter.confidence_head=true"
        )
    held_out = _every_other({(name, trace.request) for name, _, _, trace in evaluation.traces})
    decoding = config.decoding
    return tuple(
        _fit(
            Fit(temperature, decoding.top_p, decoding.top_k, Scaling((), ())),
            method,
            {
                half: [
                    trace
                    for at, trace in traces
                    if at == temperature and (trace.request in held_out) == (half == HELD_OUT)
                ]
                for half in (FIT, HELD_OUT)
            },
        )
        for temperature in config.evaluation.temperatures
    )


def _every_other(requests: set[tuple[str, str]]) -> set[str]:
    """Every second request of each benchmark, so that the halves have the same domains."""
    by_benchmark: dict[str, list[str]] = {}
    for benchmark, request in sorted(requests):
        by_benchmark.setdefault(benchmark, []).append(request)
    return {request for names in by_benchmark.values() for request in names[1::2]}


def _fit(fit: Fit, method: str, traces: dict[str, list[DecodeTrace]]) -> Fit:
    rounds = {half: Rounds.of(own) for half, own in traces.items()}
    if empty := [half for half, own in rounds.items() if not own.known.any()]:
        raise DataError(
            f"no draft was verified on the {empty[0]} half of the prompts at temperature "
            f"{fit.temperature:g}; give more prompts (prompts=[...], evaluation.limit=null), or "
            "raise decoding.max_new_tokens"
        )
    scaling = METHODS[method](rounds[FIT])
    halves = {
        half: Half(
            prompts=len({trace.request for trace in traces[half]}),
            rounds=len(own),
            before=measure(own),
            after=measure(own, scaling),
        )
        for half, own in rounds.items()
    }
    return replace(fit, scaling=scaling, halves=halves)


# -------------------------------------------------------------------------------------- the report


def mean_error(reliabilities: Sequence[Reliability]) -> float:
    """ECE, the mean over positions."""
    return sum(each.ece for each in reliabilities) / len(reliabilities)


def outcome(fit: Fit) -> str:
    """What a fit brought, in words."""
    half = fit.halves[HELD_OUT]
    lower = [a.ece < b.ece for b, a in zip(half.before, half.after, strict=True)]
    where = "every" if all(lower) else f"{sum(lower)} of {len(lower)}"
    text = (
        f"Decoding at temperature {fit.temperature:g}: on held-out prompts the calibration error "
        f"of prefix survival (ECE, mean over positions) goes from {mean_error(half.before):.1%} to "
        f"{mean_error(half.after):.1%}, and is lower at {where} position"
        f"{'' if all(lower) else 's'}."
    )
    if half.rounds < ENOUGH:
        text += (
            f" These are {half.rounds} rounds only; {ENOUGH} or more, by evaluation.limit=null or "
            "other prompts, leave less of it to chance."
        )
    return text


def table_of(fit: Fit) -> Table:
    """A row a position; the held-out half, and the fit half's ECE after beside it."""
    header = ["draft", "T", "shift", "rounds", *PERCENT, "ECE after, fit half"]
    header += ["AUC before", "AUC after", "Brier before", "Brier after"]
    half, own = fit.halves[HELD_OUT], {each.position: each for each in fit.halves[FIT].after}
    rows = []
    for before, after in zip(half.before, half.after, strict=True):
        fitted = own.get(after.position)
        shares = (after.survived, before.ece, after.ece, after.noise)
        rows.append(
            [
                f"{after.position}",
                f"{fit.scaling.temperatures[after.position - 1]:.2f}",
                f"{fit.scaling.shifts[after.position - 1]:.2f}",
                f"{after.samples:,}",
                *(f"{share:.1%}" for share in shares),
                f"{fitted.ece:.1%}" if fitted else "–",
                *("–" if each.auc is None else f"{each.auc:.3f}" for each in (before, after)),
                *(f"{each.brier:.3f}" for each in (before, after)),
            ]
        )
    return Table(header, rows)


def results_table(fit: Fit) -> RichTable:
    """The held-out half of `table_of` for a terminal of 80 columns."""
    table = table_of(fit)
    shown = [i for i, name in enumerate(table.header) if name not in HIDDEN]
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index in shown:
        drawn.add_column(table.header[index].replace(" ", "\n"), justify="right")
    for row in table.rows:
        drawn.add_row(*(row[index] for index in shown))
    return drawn


DEFINITIONS = {
    "T and shift": "the logit of the confidence in this draft is divided by T, and shifted",
    "survived": "share of rounds in which this draft and all before it were accepted",
    "ECE": f"expected calibration error of the predicted survival, {BINS} bins of equal width",
    "by chance": "the ECE that exact predictions would show at this many rounds",
    "AUC": "how often a surviving prefix is predicted above another one",
    "Brier": "mean squared error of the predicted survival",
}


def write_calibration_report(
    calibration: Calibration, about: dict[str, Any], evaluation: Evaluation, folder: Path
) -> None:
    """Write calibration.json, .md, .html and traces.jsonl into `folder`."""
    from deepspec.evaluation import figures  # and with them matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    calibration.save(folder)
    evaluation.save_traces(folder / "traces.jsonl")
    drawn = []
    for fit in calibration.fits:
        half, name = fit.halves[HELD_OUT], f"decoding at temperature {fit.temperature:g}"
        error = figures.calibration_error_figure(half, name)
        reliability = figures.reliability_figure(half, name)
        drawn.append((fit, outcome(fit), table_of(fit), error, reliability))
    context = {
        "about": about,
        "fits": drawn,
        "definitions": DEFINITIONS,
    }
    for form in ("md", "html"):
        render(folder / f"calibration.{form}", context)

"""Figures of confidences: the threshold sweep, and reliability before and after STS."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from deepspec.evaluation import figures
from deepspec.evaluation.calibrate import mean_error, table_of
from deepspec.evaluation.report import Table
from deepspec.evaluation.results import BenchmarkResult, mean_over_seeds, read_report
from deepspec.reproduction import paper
from deepspec.reproduction.drawing import Scales, Series, lines
from deepspec.reproduction.finding import Claim, Finding, percent
from deepspec.reproduction.lengths import LENGTH
from deepspec.reproduction.plan import METHODS, Plan, threshold_name
from deepspec.scheduling.calibration_file import HELD_OUT, NAME, Half, read_calibration_file

CHAT = "chat"
ENOUGH = 0.9  # acceptance rate on chat that the sweep is to reach


def thresholds(plan: Plan) -> Finding:
    """Acceptance rate and accepted length by the threshold of survival, a line a domain."""
    sweep = plan.config.reproduce.thresholds
    found: dict[str, list[BenchmarkResult]] = {}
    for threshold in sweep:
        report = read_report(plan.folder(threshold_name(threshold)) / "report.json")
        for result in mean_over_seeds(report.results):
            found.setdefault(result.benchmark, []).append(result)
    rates = [
        Series(domain, sweep, [result.acceptance_rate for result in results])
        for domain, results in found.items()
    ]
    lengths = [
        Series(domain, sweep, [result.accepted_length for result in results])
        for domain, results in found.items()
    ]
    label = "least predicted survival that is verified"
    rate = lines(
        "thresholds-rate",
        "Acceptance rate by confidence threshold",
        Scales(label, "accepted share of verified drafts", percent=True),
        rates,
    )
    length = lines(
        "thresholds-length",
        "Accepted length by confidence threshold",
        Scales(label, LENGTH),
        lengths,
    )
    cells = [
        [f"{domain}, {what}", *(show(result) for result in results)]
        for domain, results in found.items()
        for what, show in (
            ("accepted", lambda result: f"{result.acceptance_rate:.0%}"),
            ("verified", lambda result: f"{result.verify_rate:.0%}"),
            ("length", lambda result: f"{result.accepted_length:.2f}"),
        )
    ]
    first, last = paper.CHAT_ACCEPTANCE
    return Finding(
        "thresholds",
        "Figure 5: verifying only above a confidence",
        f"On chat the acceptance rate rises from {percent(first, 1)} to {percent(last, 1)} "
        f"({paper.SOURCE}, figure 5).",
        "Temperature 1. A draft is verified where its predicted survival reaches the threshold; "
        f"predictions are calibrated ({METHODS[-1]}) on half of all prompts, of which these are "
        "the first. Accepted: of the verified drafts; verified: of the proposed ones.",
        _sweep_claims(found),
        Table(["", *(f"{threshold:g}" for threshold in sweep)], cells),
        _sweep_rows(sweep, found),
        (
            (rate, "Accepted drafts over verified ones."),
            (length, "Tokens a round, bonus token counted: what waiting for certainty costs."),
        ),
    )


def _sweep_rows(
    sweep: Sequence[float], found: dict[str, list[BenchmarkResult]]
) -> list[dict[str, Any]]:
    return [
        {
            "domain": domain,
            "threshold": threshold,
            "acceptance_rate": round(result.acceptance_rate, 4),
            "verify_rate": round(result.verify_rate, 4),
            "accepted_length": round(result.accepted_length, 4),
            "rounds": result.rounds,
        }
        for domain, results in found.items()
        for threshold, result in zip(sweep, results, strict=True)
    ]


def _sweep_claims(found: dict[str, list[BenchmarkResult]]) -> tuple[Claim, ...]:
    """On chat, or else on the first benchmark."""
    domain = CHAT if CHAT in found else next(iter(found))
    rates = [result.acceptance_rate for result in found[domain] if result.verify_rate]
    rising = all(later >= earlier for earlier, later in pairwise(rates))
    first, last = paper.CHAT_ACCEPTANCE
    text = (
        f"{domain} goes from {percent(rates[0])} to {percent(rates[-1])}"
        f"{'' if rising else ', not always rising'}, paper {percent(first)} to {percent(last)}"
    )
    return (Claim(rising and rates[-1] >= ENOUGH, text),)


def reliability(plan: Plan) -> Finding:
    """Reliability diagrams and ECE before and after STS; after Platt scaling beside it."""
    files = {method: plan.folder(f"calibrate-{method}") / NAME for method in METHODS}
    fits = {method: read_calibration_file(file).fits[0] for method, file in files.items()}
    halves = {method: fit.halves[HELD_OUT] for method, fit in fits.items()}
    half = halves["sts"]
    before, after = mean_error(half.before), mean_error(half.after)
    areas = [each.auc for each in half.before if each.auc is not None]
    low, high = paper.ECE_BEFORE
    drawn = (
        (
            figures.calibration_error_figure(half, "reproduction"),
            "Held-out half. ECE by position; the dashed line is what exact predictions would show.",
        ),
        (
            figures.reliability_figure(half, "reproduction"),
            "Held-out half. Predicted prefix survival against the share that survived.",
        ),
    )
    platt = mean_error(halves["platt"].after)
    return Finding(
        "reliability",
        "Figure 6: reliability before and after STS",
        f"ECE of {percent(low)} to {percent(high)} becomes about {percent(paper.ECE_AFTER)}; AUC "
        f"{paper.AUC[0]} to {paper.AUC[1]} ({paper.SOURCE}, figure 6).",
        "Temperature 1, prefix survival; Sequential Temperature Scaling fitted on one half of the "
        f"prompts, {half.rounds} rounds of the other half measured. Platt scaling, which also "
        f"shifts the logit, leaves {percent(platt, 1)} instead.",
        (
            Claim(
                after < before and after <= 1.5 * paper.ECE_AFTER,
                f"mean ECE goes from {percent(before, 1)} to {percent(after, 1)}, paper: to about "
                f"{percent(paper.ECE_AFTER)}",
            ),
            *_area_claims(areas),
        ),
        table_of(fits["sts"]),
        [row for method, own in halves.items() for row in _bin_rows(method, own)],
        drawn,
    )


def _area_claims(areas: list[float]) -> tuple[Claim, ...]:
    if not areas:
        return ()
    text = f"AUC by position is {min(areas):.2f} to {max(areas):.2f}"
    low, high = paper.AUC
    return (Claim(min(areas) >= low - 0.01, f"{text}, paper {low} to {high}"),)


def _bin_rows(method: str, half: Half) -> list[dict[str, Any]]:
    """For the CSV: every bin of every position, before and after."""
    return [
        {
            "method": method,
            "when": when,
            "position": each.position,
            "ece": round(each.ece, 5),
            "ece_by_chance": round(each.noise, 5),
            "auc": "" if each.auc is None else round(each.auc, 4),
            "brier": round(each.brier, 5),
            "bin_rounds": own.count,
            "bin_predicted": round(own.predicted, 5),
            "bin_survived": round(own.happened, 5),
        }
        for when, reliabilities in (("before", half.before), ("after", half.after))
        for each in reliabilities
        for own in each.bins
    ]

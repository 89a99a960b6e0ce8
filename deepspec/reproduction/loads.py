"""Figures of load, both from one `deepspec load`: throughput against speed, and the budget."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepspec.evaluation.report import Table, number_cell
from deepspec.reproduction import paper
from deepspec.reproduction.drawing import Scales, Series, lines
from deepspec.reproduction.finding import Claim, Finding, signed
from deepspec.reproduction.jobs import LABELS
from deepspec.reproduction.plan import LOAD, Plan

NAMES = {
    "plain": "plain",
    "fixed": "whole blocks",
    "threshold": "threshold",
    "algorithm1": "Algorithm 1",
    "async": "asynchronous",
}
OURS, BASELINE, WHOLE = NAMES["algorithm1"], LABELS["mtp"], NAMES["fixed"]


@dataclass(frozen=True)
class Curve:
    """One policy over rising load: requests at once, tokens a second of all, of the median user,
    and tokens verified a request and round. NaN where nothing was there to measure, so that all
    curves have the same loads."""

    users: list[float]
    throughput: list[float]
    speed: list[float]
    budget: list[float]


def throughput(plan: Plan) -> Finding:
    """Tokens a second of all against tokens a second a user."""
    curves, rows = _read(plan)
    series = [Series(name, own.speed, own.throughput) for name, own in curves.items()]
    drawing = lines(
        "throughput",
        "Throughput against tokens a second a user",
        Scales("tokens/s a user (median)", "tokens/s of all users", zero=True),
        series,
    )
    ours, baseline = curves[OURS], curves[BASELINE]
    return Finding(
        "throughput",
        "Figure 7: throughput against speed a user",
        f"Over MTP-1 {signed(paper.THROUGHPUT_GAIN)} throughput at 80 tokens/s a user, and "
        f"{signed(paper.SPEED_GAIN[0])} to {signed(paper.SPEED_GAIN[1])} speed a user at matched "
        f"throughput (V4-Flash in production; {paper.SOURCE}, figure 7).",
        f"{_levels(plan)} {_margins(curves)}",
        (
            *_matched(
                "speed a user at matched throughput",
                _gains(baseline.throughput, baseline.speed, ours.throughput, ours.speed),
                f"{signed(paper.SPEED_GAIN[0])} to {signed(paper.SPEED_GAIN[1])}",
            ),
            *_matched(
                "throughput at matched speed a user",
                _gains(baseline.speed, baseline.throughput, ours.speed, ours.throughput),
                signed(paper.THROUGHPUT_GAIN),
            ),
        ),
        _table(curves, [("tokens/s", "throughput", 0), ("a user", "speed", 1)]),
        rows,
        ((drawing, "A dot a load; more users at once from right to left."),),
    )


def budget(plan: Plan) -> Finding:
    """Tokens verified a request and round as load rises."""
    curves, rows = _read(plan)
    series = [Series(name, own.users, own.budget) for name, own in curves.items()]
    scales = Scales(
        "requests at once", "tokens verified a request", ticks=True, log=True, zero=True
    )
    drawing = lines("budget", "Verification budget by load", scales, series)
    claims = []
    for name in (OURS, NAMES["async"]):
        own = [verified for verified in curves[name].budget if not math.isnan(verified)]
        if own:
            text = f"{name} goes from {own[0]:.1f} to {own[-1]:.1f}, paper: falls with load"
            claims.append(Claim(own[-1] < own[0], text))
    return Finding(
        "budget",
        "Figure 8: verification budget by load",
        f"The scheduler verifies less of each request as load rises ({paper.SOURCE}, figure 8).",
        f"{_levels(plan)} Tokens verified a request and round, its anchor counted: 1 is plain "
        "decoding.",
        tuple(claims),
        _table(curves, [("verified", "budget", 2)]),
        rows,
        ((drawing, "Mean over the rounds at each load; requests on a logarithmic scale."),),
    )


def _read(plan: Plan) -> tuple[dict[str, Curve], list[dict[str, Any]]]:
    """(a curve a policy, in the table's order; the table as it stands)."""
    path = plan.folder(LOAD) / "load.csv"
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = {"concurrency": "users", "throughput": "", "user_p50": "speed", "budget": ""}
    curves: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        other = row["drafter"] not in ("", "dspark")
        name = LABELS[row["drafter"]] if other else NAMES[row["policy"]]
        curve = curves.setdefault(name, {})
        for column, field in columns.items():
            curve.setdefault(field or column, []).append(float(row[column] or "nan"))
    return {name: Curve(**own) for name, own in curves.items()}, list(rows)


def _gains(
    places: Sequence[float], theirs: Sequence[float], at: Sequence[float], ours: Sequence[float]
) -> list[float]:
    """Of our curve over theirs at each of their `places` that ours (`at`) covers, by straight lines
    between our points."""
    points = sorted(point for point in zip(at, ours, strict=True) if not np.isnan(point).any())
    if not points:
        return []
    x, y = zip(*points, strict=True)
    return [
        float(np.interp(place, x, y) / value - 1)
        for place, value in zip(places, theirs, strict=True)
        if x[0] <= place <= x[-1] and not math.isnan(value)
    ]


def _matched(what: str, gains: list[float], theirs: str) -> tuple[Claim, ...]:
    """None where the curves have no range in common."""
    if not gains:
        return ()
    low, high = signed(min(gains)), signed(max(gains))
    spread = low if low == high else f"{low} to {high}"
    return (Claim(min(gains) > 0, f"{what} of {OURS} over {BASELINE} {spread}, paper {theirs}"),)


def _margins(curves: dict[str, Curve]) -> str:
    """Algorithm 1 beside the best of the simple policies at each load, in words."""
    every = np.array([curves[name].throughput for name in ("plain", BASELINE, WHOLE, OURS)])
    every = every[:, (every > 0).all(axis=0)]  # loads at which each had time for some rounds
    if not every.size:
        return ""
    margins = every[-1] / every[:-1].max(axis=0) - 1
    last = every[-1, -1] / every[-2, -1] - 1
    return (
        f"Against the best of plain, {BASELINE} and {WHOLE} at each load, the throughput of {OURS} "
        f"is {signed(float(margins.min()))} to {signed(float(margins.max()))}; against {WHOLE} at "
        f"the highest load, {signed(last)}."
    )


def _levels(plan: Plan) -> str:
    wanted = plan.config.reproduce
    return (
        f"A continuous-batching loop with {wanted.loads[0]} to {wanted.loads[-1]} users that are "
        f"always busy, {wanted.load_seconds:g} s a policy and load, at temperature 1."
    )


def _table(curves: dict[str, Curve], columns: list[tuple[str, str, int]]) -> Table:
    users = next(iter(curves.values())).users
    cells = [
        [f"{name}, {label}", *(number_cell(value, digits) for value in getattr(own, field))]
        for name, own in curves.items()
        for label, field, digits in columns
    ]
    return Table(["users", *(f"{count:g}" for count in users)], cells)

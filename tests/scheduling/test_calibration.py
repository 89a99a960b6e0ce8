"""Sequential Temperature Scaling against loops, and on rounds whose temperatures are known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.records import DecodeTrace
from deepspec.scheduling.calibration import (
    GRID,
    Rounds,
    Scaling,
    calibrated,
    calibration_error,
    fit_sts,
    logit,
    sigmoid,
    survival,
)
from deepspec.scheduling.platt import fit_platt
from deepspec.scheduling.reliability import measure
from tests.scheduling.rounds import draw_traces, trace_of


def plain(temperatures: list[float]) -> Scaling:
    return Scaling(tuple(temperatures), (0.0,) * len(temperatures))


CHANCES = st.floats(0, 1, width=32)


def naive_error(predicted: list[float], happened: list[bool], bins: int) -> float:
    total = 0.0
    for index in range(bins):
        last = index == bins - 1
        inside = [
            (p, h)
            for p, h in zip(predicted, happened, strict=True)
            if index <= p * bins < index + 1 or (last and p * bins >= bins)
        ]
        if inside:
            mean = sum(p for p, _ in inside) / len(inside)
            rate = sum(h for _, h in inside) / len(inside)
            total += len(inside) / len(predicted) * abs(mean - rate)
    return total


def naive_temperatures(traces: list[DecodeTrace], size: int) -> list[float]:
    """The paper's procedure, a round at a time."""

    def scaled(confidence: float, temperature: float) -> float:
        return 1 / (1 + math.exp(-math.log(confidence / (1 - confidence)) / temperature))

    chosen: list[float] = []
    for position in range(size):
        verified = [trace for trace in traces if trace.scheduled > position]
        best = (float("inf"), 1.0)
        for value in GRID:
            predicted = [
                math.prod(
                    scaled(c, t) for c, t in zip(trace.confidences, [*chosen, value], strict=False)
                )
                for trace in verified
            ]
            happened = [trace.accepted > position for trace in verified]
            error = naive_error(predicted, happened, 15)
            if verified and error < best[0] - 1e-12:
                best = (error, float(value))
        chosen.append(best[1])
    return chosen


@given(st.lists(st.tuples(CHANCES, st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
def test_calibration_error(pairs: list[tuple[float, bool]], bins: int) -> None:
    predicted = [p for p, _ in pairs]
    happened = [h for _, h in pairs]
    found = calibration_error(np.array(predicted), np.array(happened), bins)
    assert found == pytest.approx(naive_error(predicted, happened, bins), abs=1e-9)


def test_what_counts_is_what_was_verified() -> None:
    rounds = Rounds.of([trace_of([0.9, 0.8, 0.7], 2, 1), trace_of([0.6], 1, 1), trace_of([], 0, 0)])
    assert rounds.confidence.tolist() == [[0.9, 0.8, 0.7], [0.6, 1, 1]]
    assert rounds.known.tolist() == [[True, True, False], [True, False, False]]
    assert (rounds.survived & rounds.known).tolist() == [[True, False, False], [True, False, False]]


def test_fit_is_the_papers_loop() -> None:
    traces = draw_traces(60, [1.8, 0.6, 1.0], seed=1, scheduled=[1, 2, 3])
    found = fit_sts(Rounds.of(traces))
    assert found.temperatures == pytest.approx(naive_temperatures(traces, 3))
    assert found.shifts == (0, 0, 0)


@pytest.mark.parametrize(
    ("scheduled", "within"), [(None, 0.12), ([1, 2, 3, 4], 0.3)], ids=["whole", "cut"]
)
def test_known_temperatures_are_found(scheduled: list[int] | None, within: float) -> None:
    """Of rounds that were cut, a quarter knows about the last position."""
    true = [2.0, 0.5, 1.0, 1.5]
    found = fit_sts(Rounds.of(draw_traces(40000, true, seed=0, scheduled=scheduled)))
    assert found.temperatures == pytest.approx(true, rel=within)
    fresh = Rounds.of(draw_traces(40000, true, seed=5))
    before, after, exact = measure(fresh), measure(fresh, found), measure(fresh, plain(true))
    for raw, fitted, ideal in zip(before, after, exact, strict=True):
        assert fitted.ece < 0.012 < raw.ece
        # what is left of the exact temperatures' error is chance, and is said to be
        assert 0.4 * ideal.noise < ideal.ece < 2 * ideal.noise


def test_platt_finds_temperatures_and_shifts() -> None:
    """What no temperature can mend: drafters that believe too much, one position more than the
    other."""
    true = Scaling((1.5, 0.8), (-0.7, 0.4))
    traces = draw_traces(40000, list(true.temperatures), 3, shifts=list(true.shifts))
    fresh = Rounds.of(draw_traces(40000, list(true.temperatures), 4, shifts=list(true.shifts)))
    found = fit_platt(Rounds.of(traces))
    assert found.temperatures == pytest.approx(true.temperatures, rel=0.05)
    assert found.shifts == pytest.approx(true.shifts, abs=0.05)
    cut = fit_platt(Rounds.of([*traces, *(replace(t, scheduled=1, accepted=0) for t in traces)]))
    assert cut.temperatures[1] == pytest.approx(found.temperatures[1])  # no news of the second
    alone = fit_sts(Rounds.of(traces))
    for shifted, tempered in zip(measure(fresh, found), measure(fresh, alone), strict=True):
        assert shifted.ece < 0.012 < tempered.ece


@pytest.mark.parametrize("confidence", [[0.5, 0.5], [0.2, 0.8]], ids=["flat", "upside down"])
def test_platt_of_confidences_that_say_nothing(confidence: list[float]) -> None:
    """The rate of what happened is what is left."""
    happened = [1, 1, 1, 0] * 50
    traces = [trace_of([confidence[h]], 1, h) for h in happened]
    if confidence[0] != confidence[1]:  # the sure ones fail
        traces = [trace_of([confidence[1 - h]], 1, h) for h in happened]
    scaled = calibrated(Rounds.of(traces).confidence, fit_platt(Rounds.of(traces)))
    assert scaled.mean() == pytest.approx(0.75, abs=0.02)
    assert np.ptp(scaled) < 0.05


def test_logit_and_sigmoid() -> None:
    chances = np.array([0.0, 1e-4, 0.3, 0.5, 1.0])
    assert sigmoid(logit(chances)) == pytest.approx(chances, abs=2e-6)
    assert np.isfinite(logit(chances)).all()


def test_right_confidences_stay() -> None:
    """Several temperatures give no error here: the one nearest to 1 is taken."""
    traces = [trace_of([0.5, 0.5], 2, accepted) for accepted in (0, 0, 1, 2)]
    unverified = [trace_of([0.9, 0.9], 0, 0)]
    for some in (traces, unverified):
        assert fit_sts(Rounds.of(some)) == plain([1.0, 1.0])
    assert fit_platt(Rounds.of(unverified)) == plain([1.0, 1.0])


@settings(max_examples=50)
@given(
    st.lists(st.lists(CHANCES, min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.sampled_from(list(GRID)), min_size=4, max_size=4),
)
def test_calibrated_survival_never_rises(
    rows: list[list[float]], temperatures: list[float]
) -> None:
    confidence = np.array(rows)
    chances = calibrated(confidence, plain(temperatures))
    assert ((chances >= 0) & (chances <= 1)).all()
    for row in survival(chances):
        assert all(later <= earlier for earlier, later in pairwise(row))
    kept = calibrated(confidence, plain([1.0] * 4))
    assert kept == pytest.approx(confidence, abs=2e-6)
    assert calibrated(confidence, None) is confidence


def test_a_scaling_of_fewer_positions_is_refused() -> None:
    confidence = np.full((2, 3), 0.5)
    for fitted in (1, 2):
        with pytest.raises(ValueError, match=f"of {fitted} positions for confidences of 3"):
            calibrated(confidence, plain([2.0] * fitted))
    assert calibrated(confidence, plain([2.0] * 4)).shape == (2, 3)


def test_reliability_in_numbers() -> None:
    """Two positions of four rounds, by hand."""
    traces = [trace_of([0.8, 0.5], 2, count) for count in (2, 1, 1, 0)]
    traces.append(trace_of([0.1, 0.5], 1, 0))
    first, second = measure(Rounds.of(traces))
    assert (first.position, first.samples, first.survived) == (1, 5, 0.6)
    assert first.ece == pytest.approx(0.8 * abs(0.8 - 0.75) + 0.2 * 0.1)
    assert first.brier == pytest.approx((3 * 0.04 + 0.64 + 0.01) / 5)
    assert first.auc == pytest.approx((3 * 1 + 3 * 0.5) / 6)  # the pairs (survivor, other) in order
    assert [(b.count, b.happened) for b in first.bins] == [(1, 0.0), (4, 0.75)]
    assert (second.samples, second.survived) == (4, 0.25)
    assert second.ece == pytest.approx(abs(0.4 - 0.25))
    assert second.auc == 0.5
    alone = measure(Rounds.of(traces[:1]))[0]
    assert alone.auc is None
    assert measure(Rounds.of([])) == ()

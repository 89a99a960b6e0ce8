"""The schedulers against versions written from the paper's text, one admission at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepspec.config.schema import DecodingConfig
from deepspec.decoding.verification import residual
from deepspec.errors import ConfigError
from deepspec.records import Proposal
from deepspec.scheduling.calibration import Scaling, calibrated, survival
from deepspec.scheduling.schedulers import (
    Algorithm1,
    Asynchronous,
    ConfidenceSchedule,
    FixedLength,
    Policy,
    Threshold,
    open_schedule,
    rises,
)
from deepspec.scheduling.throughput import Point, Throughput

Seconds = Callable[[int], float]
# few values, so that equals are common, 0 and 1 among them
CHANCES = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 0.9, 1.0]) | st.floats(0, 1)


@st.composite
def batches(draw: Any) -> tuple[np.ndarray, np.ndarray, Throughput]:
    """Confidences [R, K], limits [R] and a throughput table."""
    rows, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    chances = draw(st.lists(CHANCES, min_size=rows * size, max_size=rows * size))
    limits = draw(st.lists(st.integers(0, size), min_size=rows, max_size=rows))
    seconds = draw(st.lists(st.floats(0, 1), min_size=rows * (size + 1), max_size=30))
    points = enumerate(1 + np.cumsum([0.0, *seconds]), start=1)
    table = Throughput(tuple(Point(tokens, 1 / second) for tokens, second in points))
    return np.array(chances).reshape(rows, size), np.array(limits), table


def seconds_of(table: Throughput) -> Seconds:
    return lambda tokens: float(table.seconds(tokens))


def candidates(chances: np.ndarray, limits: np.ndarray) -> list[tuple[float, int, int]]:
    """(a_rj, r, j), best first; of equals the earlier row, the earlier position."""
    found = [
        (math.prod(chances[r, : j + 1].tolist()), r, j)
        for r in range(len(chances))
        for j in range(limits[r])
    ]
    return sorted(found, key=lambda entry: (-entry[0], entry[1], entry[2]))


def naive_algorithm1(chances: np.ndarray, limits: np.ndarray, seconds: Seconds) -> list[int]:
    lengths = [0] * len(chances)
    tau, tokens = float(len(chances)), len(chances)
    theta = tau / seconds(tokens)
    for chance, row, position in candidates(chances, limits):
        raised = (tau + chance) / seconds(tokens + 1)
        if not rises(raised, theta):
            break
        assert lengths[row] == position  # a prefix grows by its next draft
        lengths[row] += 1
        tau, tokens, theta = tau + chance, tokens + 1, raised
    return lengths


def naive_budget(chances: np.ndarray, limits: np.ndarray, seconds: Seconds) -> int:
    """The fewest admissions that no other number beats by more than a tie."""
    tau, thetas = float(len(chances)), []
    for count, chance in enumerate([0.0, *(entry[0] for entry in candidates(chances, limits))]):
        tau += chance
        thetas.append(tau / seconds(len(chances) + count))
    return next(count for count, theta in enumerate(thetas) if not rises(max(thetas), theta))


# Admitting the draft raises tau / seconds in its last bit, and tau * SPS not at all
NEAR_TIE = (
    np.array([[0.4821188085323155]]),
    np.array([1]),
    Throughput((Point(1, 1.0), Point(2, 0.6747097427299105))),
)
LONG_TIE = Throughput(tuple(Point(tokens, 1 / tokens) for tokens in (1, 2, 3, 7, 60)))


@settings(max_examples=300)
@given(batches())
@example(NEAR_TIE)
def test_algorithm1(batch: tuple[np.ndarray, np.ndarray, Throughput]) -> None:
    chances, limits, table = batch
    found = Algorithm1(table)(survival(chances), limits)
    assert found.tolist() == naive_algorithm1(chances, limits, seconds_of(table))


@pytest.mark.parametrize("shift", [-3, -1, 0, 1, 3])
def test_a_tie_is_not_a_rise_however_it_is_rounded(shift: int) -> None:
    """A survival of 1 leaves Theta the same where seconds are in proportion to tokens; so does a
    survival that differs from 1 by rounding."""
    for rows in range(1, 40):
        chance = 1 + shift * np.finfo(np.float64).eps / 2
        chances, limits = np.full((rows, 1), chance), np.full(rows, 1)
        assert Algorithm1(LONG_TIE)(chances, limits).sum() == 0
        policy = Asynchronous(LONG_TIE)
        for _ in range(2):
            policy(chances, limits)
        assert policy(chances, limits).sum() == 0
    assert Algorithm1(NEAR_TIE[2])(*NEAR_TIE[:2]).tolist() == [0]


@settings(max_examples=60)
@given(st.lists(batches(), min_size=3, max_size=5))
def test_asynchronous(rounds: list[tuple[np.ndarray, np.ndarray, Throughput]]) -> None:
    """Rows come and go between rounds."""
    table = max((table for _, _, table in rounds), key=lambda table: len(table.points))
    policy, budgets = Asynchronous(table), [10**6, 10**6]
    for chances, limits, _ in rounds:
        budgets.append(naive_budget(chances, limits, seconds_of(table)))
        expected = [0] * len(chances)
        for _, row, _ in candidates(chances, limits)[: budgets[-3]]:
            expected[row] += 1
        assert policy(survival(chances), limits).tolist() == expected


@given(batches(), st.floats(0, 1))
def test_threshold(batch: tuple[np.ndarray, np.ndarray, Throughput], least: float) -> None:
    chances, limits, _ = batch
    expected = []
    for row, limit in zip(chances, limits, strict=True):
        length = 0
        while length < limit and math.prod(row[: length + 1].tolist()) >= least:
            length += 1
        expected.append(length)
    assert Threshold(least)(survival(chances), limits).tolist() == expected
    assert Threshold(0.0)(survival(chances), limits).tolist() == limits.tolist()


@given(batches(), st.integers(0, 6))
def test_fixed_length(batch: tuple[np.ndarray, np.ndarray, Throughput], length: int) -> None:
    chances, limits, _ = batch
    assert FixedLength(length)(survival(chances), limits).tolist() == [
        min(length, limit) for limit in limits
    ]


@settings(max_examples=100)
@given(batches(), st.data())
@pytest.mark.parametrize("name", ["algorithm1", "async", "threshold"])
def test_what_comes_behind_a_draft_does_not_decide_about_it(
    name: str, batch: tuple[np.ndarray, np.ndarray, Throughput], data: Any
) -> None:
    """Losslessness: later confidences have seen token j, so they must not move it in or out."""
    chances, limits, table = batch
    row = data.draw(st.integers(0, len(chances) - 1))
    cut = data.draw(st.integers(1, chances.shape[1]))
    other = chances.copy()
    other[row, cut:] = data.draw(
        st.lists(CHANCES, min_size=other.shape[1] - cut, max_size=other.shape[1] - cut)
    )
    found = []
    for changed in (chances, other):
        policy: Policy = {
            "algorithm1": Algorithm1(table),
            "async": Asynchronous(table),
            "threshold": Threshold(0.4),
        }[name]
        for _ in range(2):  # the rounds that an asynchronous budget comes from are the same
            policy(survival(chances), limits)
        found.append(policy(survival(changed), limits))
    assert min(found[0][row], cut) == min(found[1][row], cut)


# --------------------------------------------------------------------- the appendix of the paper


def chance_of_a(lengths: Callable[[np.ndarray], int]) -> float:
    """P(A) of the first token emitted, where p_t(A) = .7, p_d(A) = .5, c_1 = .8, and c_2 is .9 when
    the first draft is A and 0 when it is B; `lengths` schedules the one request."""
    target, draft = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    total = 0.0
    for token in (0, 1):
        length = lengths(survival(np.array([[0.8, 0.9 if token == 0 else 0.0]])))
        emitted = target
        if length:
            accept = min(1.0, float(target[token] / draft[token]))
            left = residual(target[None], draft[None])[0]
            emitted = (1 - accept) * left / left.sum()
            emitted[token] += accept
        total += float(draft[token] * emitted[0])
    return total


def test_counterexample_of_the_appendix() -> None:
    table = Throughput((Point(1, 1.0), Point(2, 0.5), Point(3, 0.45)))
    limits = np.array([2])

    def global_search(chances: np.ndarray) -> int:
        """The best of all lengths, in the same step: what the asynchronous variant may do only
        with confidences of the past."""
        policy = Asynchronous(table)
        for _ in range(2):
            policy(chances, limits)
        return int(policy(chances, limits)[0])

    def stale(chances: np.ndarray) -> int:
        policy = Asynchronous(table)
        for past in (0.9, 0.0):
            policy(survival(np.array([[0.8, past]])), limits)
        return int(policy(chances, limits)[0])

    assert chance_of_a(global_search) == pytest.approx(0.85)
    early_stop = Algorithm1(table)
    assert chance_of_a(lambda chances: int(early_stop(chances, limits)[0])) == pytest.approx(0.70)
    assert chance_of_a(stale) == pytest.approx(0.70)


# ------------------------------------------------------------------------- as the decoder calls it


def proposal_of(confidence: torch.Tensor | None) -> Proposal:
    shape = (2, 3) if confidence is None else confidence.shape
    return Proposal(torch.zeros(shape, dtype=torch.int64), None, confidence)


def test_confidences_are_calibrated_first() -> None:
    confidence = torch.tensor([[0.9, 0.9, 0.9], [0.6, 0.9, 0.9]])
    seen = []

    def policy(chances: np.ndarray, limits: np.ndarray) -> np.ndarray:
        seen.append(chances)
        return limits

    scaling = Scaling((2.0, 1.0, 0.5), (0.0, 0.0, 0.1))
    found = ConfidenceSchedule(policy, scaling)(proposal_of(confidence), [3, 2])
    assert found == [3, 2]
    assert all(type(length) is int for length in found)
    expected = survival(calibrated(confidence.double().numpy(), scaling))
    assert seen[0] == pytest.approx(expected)
    assert seen[0][0, 0] == pytest.approx(0.75)  # odds 9 to 1, at temperature 2: 3 to 1


def test_opened_by_config(tmp_path: Any) -> None:
    confidence = torch.tensor([[0.9, 0.5, 0.5], [0.3, 0.3, 0.3]])
    table = tmp_path / "sps.csv"
    table.write_text("tokens,steps_per_second\n1,1\n3,1\n4,0.1\n")

    def lengths(**keys: Any) -> list[int] | None:
        schedule = open_schedule(DecodingConfig(throughput=str(table), **keys), None)
        return None if schedule is None else list(schedule(proposal_of(confidence), [2, 3]))

    assert lengths(scheduler="none") is None
    assert lengths(scheduler="fixed", verify_length=1) == [1, 1]
    assert lengths(scheduler="fixed", verify_length=9) == [2, 3]
    assert lengths(scheduler="threshold", threshold=0.4) == [2, 0]
    assert lengths(scheduler="algorithm1") == [1, 0]
    assert lengths(scheduler="async") == [2, 3]
    with pytest.raises(ConfigError, match="confidence head"):
        open_schedule(DecodingConfig(scheduler="threshold"), None)(proposal_of(None), [2, 3])


def test_a_round_of_256_requests_takes_less_than_a_millisecond() -> None:
    """Vectorised: the loop of `naive_algorithm1` takes some 100 times as long."""
    import time

    rng = np.random.default_rng(0)
    chances = survival(rng.beta(4, 1, (256, 16)))
    limits = np.full(256, 16)
    table = Throughput((Point(1, 100.0), Point(5000, 20.0)))
    for policy in (Algorithm1(table), Asynchronous(table), Threshold(0.5)):
        taken = []
        for _ in range(20):
            begun = time.thread_time()
            policy(chances, limits)
            taken.append(time.thread_time() - begun)
        assert min(taken) < 2e-3

"""Confidences made true: Sequential Temperature Scaling (dspark.md, "Confidence scheduling").

Confidence c_j is the drafter's probability that draft j survives, given that all earlier ones did.
Schedulers need the prefix survival a_j = c_1 * ... * c_j to be the probability that it says. So
each position gets a temperature for the logit of its c_j, chosen left to right, the earlier ones
fixed, for the least calibration error of a_j. Beside it, for confidences that are wrong on one
side, what `platt` fits: a temperature and a shift. Legend: N rounds, K block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deepspec.records import DecodeTrace

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BINS = 15  # of equal width over [0, 1], as Guo et al. (2017), "On calibration"
CERTAIN = 1e-6  # confidences are kept this far from 0 and 1, where fp32 has rounded them to
# 24 steps an octave; exactly 1 is among them, and the first of equals is the nearest to it
GRID = np.array(sorted(2.0 ** np.linspace(-4, 4, 193), key=lambda value: abs(np.log2(value))))


@dataclass(frozen=True)
class Rounds:
    """Decoding rounds as arrays.

    `confidence` [N, K] as the drafter gave them; `survived` [N, K] whether a draft and all before
    it were accepted; `known` [N, K] whether it was verified. What a schedule or the end of a text
    left out counts neither way, also where an earlier draft was rejected: rounds that were cut and
    went well would be missing beside it.
    """

    confidence: Floats
    survived: Bools
    known: Bools

    @classmethod
    def of(cls, traces: Sequence[DecodeTrace]) -> Rounds:
        """The rounds of `traces` that have confidences."""
        traces = [trace for trace in traces if trace.confidences]
        size = max((trace.proposed for trace in traces), default=0)
        confidence = np.ones((len(traces), size))
        for row, trace in zip(confidence, traces, strict=True):
            row[: trace.proposed] = trace.confidences
        position = np.arange(size)
        accepted = np.array([trace.accepted for trace in traces], dtype=np.int64)
        scheduled = np.array([trace.scheduled for trace in traces], dtype=np.int64)
        return cls(confidence, position < accepted[:, None], position < scheduled[:, None])

    def __len__(self) -> int:
        return len(self.confidence)


@dataclass(frozen=True)
class Scaling:
    """By position [K]: the logit of a confidence is divided by a temperature, and shifted."""

    temperatures: tuple[float, ...]
    shifts: tuple[float, ...]


def calibrated(confidence: Floats, scaling: Scaling | None) -> Floats:
    """Confidences [.., K] scaled; None leaves them as they are.

    Raises ValueError where the scaling has fewer positions.
    """
    if scaling is None:
        return confidence
    positions = confidence.shape[-1]
    fitted = min(len(scaling.temperatures), len(scaling.shifts))
    if fitted < positions:  # one alone would be taken for all
        raise ValueError(f"a scaling of {fitted} positions for confidences of {positions}")
    temperatures, shifts = scaling.temperatures[:positions], scaling.shifts[:positions]
    return sigmoid(logit(confidence) / np.asarray(temperatures) + np.asarray(shifts))


def survival(confidence: Floats) -> Floats:
    """Prefix survival a_j [.., K] of confidences c_j [.., K]: never rises with the position."""
    return confidence.cumprod(axis=-1)


def bin_of(predicted: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """The interval [b / bins, (b + 1) / bins) that each prediction is in; 1 is in the last."""
    return np.minimum((predicted * bins).astype(np.int64), bins - 1)


def calibration_error(predicted: Floats, happened: Bools, bins: int = BINS) -> float:
    """Expected calibration error (ECE) of predictions [N]; nan of none.

    The mean over predictions of |mean prediction - observed rate| of the bin each is in.
    """
    excess = np.bincount(bin_of(predicted, bins), predicted - happened, minlength=bins)
    return float(np.abs(excess).sum() / len(predicted)) if len(predicted) else float("nan")


def fit_sts(rounds: Rounds) -> Scaling:
    """Sequential Temperature Scaling: a temperature a position, from a grid of 1/16 to 16; 1 where
    nothing was verified."""
    temperatures = []
    before = np.ones(len(rounds))  # survival of the positions that are done
    for position in range(rounds.confidence.shape[1]):
        known = rounds.known[:, position]
        logits = logit(rounds.confidence[:, position])
        best = 1.0
        if known.any():
            happened = rounds.survived[known, position]
            errors = [
                calibration_error(before[known] * sigmoid(logits[known] / value), happened)
                for value in GRID
            ]
            best = float(GRID[np.argmin(errors)])
        before = before * sigmoid(logits / best)
        temperatures.append(best)
    return Scaling(tuple(temperatures), (0.0,) * len(temperatures))


def logit(probability: Floats) -> Floats:
    """Log odds, finite also of 0 and 1."""
    kept: Floats = np.minimum(np.maximum(probability, CERTAIN), 1 - CERTAIN)
    return np.log(kept / (1 - kept))


def sigmoid(odds: Floats) -> Floats:
    """The inverse of `logit`."""
    chance: Floats = 1 / (1 + np.exp(-odds))
    return chance

"""Decoding rounds whose true survival is known."""

from __future__ import annotations

import numpy as np

from deepspec.records import DecodeTrace


def trace_of(confidences: list[float], scheduled: int, accepted: int) -> DecodeTrace:
    size = len(confidences)
    return DecodeTrace("r", 0, 10, size, scheduled, accepted, accepted + 1, tuple(confidences), 0.1)


def draw_traces(
    count: int,
    temperatures: list[float],
    seed: int,
    scheduled: list[int] | None = None,
    shifts: list[float] | None = None,
) -> list[DecodeTrace]:
    """Drafts that survive with probability sigmoid(logit / temperature + shift) and claim
    sigmoid(logit).

    `scheduled` are lengths to choose from, whatever the round; None verifies everything.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(1.5, 2.0, (count, len(temperatures)))
    confidence = 1 / (1 + np.exp(-logits))
    true = 1 / (1 + np.exp(-logits / np.array(temperatures) - np.array(shifts or 0.0)))
    alive = np.cumprod(rng.random(true.shape) < true, axis=1).sum(axis=1)
    lengths = rng.choice(scheduled or [len(temperatures)], count)
    return [
        trace_of(row.tolist(), int(length), int(min(length, survivors)))
        for row, length, survivors in zip(confidence, lengths, alive, strict=True)
    ]

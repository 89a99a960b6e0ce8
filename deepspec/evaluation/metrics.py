"""Acceptance metrics: pure functions of decode traces, as (numerator, denominator) pairs.

Pairs add up over requests, seeds and processes, and are divided last. Drafts beyond the scheduled
ones were never judged, so they count neither way. Legend: K block size.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspec.records import DecodeTrace

Pair = tuple[int, int]


def accepted_length(traces: Sequence[DecodeTrace]) -> Pair:
    """Tokens a round yields, bonus token counted (dspark.md, table 1): accepted + 1.

    Counts whole rounds: a stop token among the accepted ones ends the text, not the count.
    """
    return sum(trace.accepted + 1 for trace in traces), len(traces)


def acceptance_rate(traces: Sequence[DecodeTrace]) -> Pair:
    """Accepted drafts over verified ones."""
    return sum(trace.accepted for trace in traces), sum(trace.scheduled for trace in traces)


def verify_rate(traces: Sequence[DecodeTrace]) -> Pair:
    """Verified drafts over proposed ones: below 1 where a schedule or the end of a text cut."""
    return sum(trace.scheduled for trace in traces), sum(trace.proposed for trace in traces)


def conditional_acceptance(traces: Sequence[DecodeTrace], block_size: int) -> list[Pair]:
    """[K] acceptance at each position given that all earlier ones were accepted (paper, fig. 2)."""
    return [
        (
            sum(trace.accepted > position for trace in traces if trace.scheduled > position),
            sum(trace.accepted >= position for trace in traces if trace.scheduled > position),
        )
        for position in range(block_size)
    ]


def prefix_survival(traces: Sequence[DecodeTrace], block_size: int) -> list[Pair]:
    """[K] share of rounds in which every draft up to a position was accepted."""
    return [
        (
            sum(trace.accepted > position for trace in traces if trace.scheduled > position),
            sum(trace.scheduled > position for trace in traces),
        )
        for position in range(block_size)
    ]


def divide(pair: Pair) -> float | None:
    """The ratio; None where there was nothing to count."""
    return pair[0] / pair[1] if pair[1] else None

"""SPS(B) measured: rounds of the decoder itself, with chosen verification lengths.

A step is a whole round, proposal, verification and bookkeeping, because that is what a second has a
number of. B tokens are verified by B rows of one token while there are no more than the batch has,
then by all its rows, as evenly as B allows. Legend: R rows, B tokens in a step, K block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspec.decoding import Decoder, Sampling
from deepspec.drafters.base import Draw, Observation, Proposer
from deepspec.progress import Progress
from deepspec.records import DecodeTrace, Proposal
from deepspec.scheduling.throughput import Point, Throughput
from deepspec.targets import Target

WARM_UP = 2  # rounds at the start of a batch: they allocate, and choose kernels
PASSES = 4  # over all points, so that a busy moment of the machine does not fall on one of them


@dataclass(frozen=True)
class Load:
    """`rows` requests of `context` tokens each, sampled at `temperature`; at least `repeats` rounds
    are timed for each number of tokens."""

    rows: int
    context: int
    repeats: int
    temperature: float


class Blanks:
    """Drafts that cost nothing and are worth nothing: what is left is the target."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def start(self, rows: int) -> None:
        """Nothing to forget."""

    def observe(self, seen: Observation) -> None:
        """Nothing to learn."""

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """The first token of the vocabulary, each time."""
        return Proposal(anchors.new_zeros(len(anchors), self.block_size), None, None)

    def select(self, rows: Tensor) -> None:
        """Nothing to keep."""

    def join(self, other: Blanks) -> None:
        """Nothing to append."""


def default_tokens(rows: int, block_size: int) -> list[int]:
    """1, 2, 4, ... up to a whole block of each row, and the row count itself."""
    most = rows * (block_size + 1)
    return sorted({rows, most, *(2**power for power in range(most.bit_length()))} - {0})


def profile(
    target: Target,
    proposer: Proposer,
    load: Load,
    tokens: Sequence[int],
    about: dict[str, Any],
    *,
    show: bool = True,
) -> Throughput:
    """A point for each of `tokens` (ascending, at most R * (K + 1)): medians of timed rounds."""
    seconds: dict[int, list[float]] = {count: [] for count in tokens}
    with Progress("profile", PASSES * len(tokens), "points", show=show) as progress:
        for count in list(tokens) * PASSES:
            seconds[count] += _round_seconds(target, proposer, load, count)
            progress.advance(1, f"{count} tokens, {1 / np.median(seconds[count]):.3g} steps/s")
    points = []
    for count, own in seconds.items():
        low, median, high = np.quantile(own, [0.25, 0.5, 0.75])
        points.append(Point(count, float(1 / median), float((high - low) / median)))
    return Throughput(tuple(points), about)


def _round_seconds(target: Target, proposer: Proposer, load: Load, tokens: int) -> list[float]:
    """Seconds of rounds that verify `tokens`: at least this pass's share of `load.repeats`."""
    rows = min(load.rows, tokens)
    lengths = [tokens // rows + (row < tokens % rows) for row in range(rows)]
    generator = torch.Generator().manual_seed(tokens)
    shape = (rows, load.context)
    prompts = torch.randint(target.vocab_size, shape, generator=generator).tolist()

    def schedule(_proposal: Proposal, limits: Sequence[int]) -> list[int]:
        # where rows have left, the round does not count
        return [length - 1 for length in lengths[: len(limits)]]

    decoder = Decoder(target, proposer, rows, [], schedule)
    seconds: list[float] = []
    share = -(-load.repeats // PASSES)
    while len(seconds) < share:
        # a round emits at most its longest row's tokens, so some are left behind the warm-up
        emitted = share + (WARM_UP + 1) * max(lengths)
        result = decoder.generate(prompts, Sampling(load.temperature), emitted, seed=len(seconds))
        seconds += _whole_rounds(result.traces, tokens - rows)[WARM_UP:]
    return seconds


def _whole_rounds(traces: Sequence[DecodeTrace], drafts: int) -> list[float]:
    """Seconds of the rounds in which `drafts` drafts were verified: no row had to be cut short."""
    by_round: dict[int, list[DecodeTrace]] = {}
    for trace in traces:
        by_round.setdefault(trace.round, []).append(trace)
    first = len(by_round[0]) if by_round else 0
    return [
        sum(trace.seconds for trace in own)
        for own in by_round.values()
        if len(own) == first and sum(trace.scheduled for trace in own) == drafts
    ]

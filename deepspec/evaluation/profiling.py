"""SPS(B) measured: rounds of the decoder itself, with chosen verification lengths.

A step is a round, verification and bookkeeping, without what the drafter does in it, which is
measured apart: drafting by requests, taking in the target's features by tokens. B tokens are
verified by B rows of one token while there are no more than the batch has, then by all its rows, as
evenly as B allows. Legend: R rows, B tokens in a step, K block size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepspec.decoding import Decoder, Sampling
from deepspec.drafters.base import Draw, Observation, Proposer
from deepspec.drafters.compiling import Compilable
from deepspec.errors import ConfigError
from deepspec.progress import Progress
from deepspec.records import DecodeTrace, Proposal
from deepspec.scheduling.throughput import Point, Throughput
from deepspec.targets import Target

WARM_UP = 2  # rounds at the start of a batch: they allocate, and choose kernels
PASSES = 4  # over all points, so that a busy moment of the machine does not fall on one of them


@dataclass(frozen=True)
class Load:
    """`rows` requests of `context` tokens each, sampled at `temperature`; at least `repeats` rounds
    are timed for each number of tokens. `compiled`: as `Decoder` has it."""

    rows: int
    context: int
    repeats: int
    temperature: float
    compiled: bool = False


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


class _Timed:
    """A proposer with a stopwatch: the seconds of every `propose` and every `observe`."""

    def __init__(self, inner: Proposer, device: torch.device) -> None:
        self.block_size = inner.block_size
        self.reads_features = getattr(inner, "reads_features", True)
        self.proposed: list[float] = []
        self.observed: list[float] = []
        self._inner, self._device = inner, device

    def start(self, rows: int) -> None:
        """See `Proposer.start`."""
        self._inner.start(rows)

    def observe(self, seen: Observation) -> None:
        """See `Proposer.observe`."""
        begun = self._now()
        self._inner.observe(seen)
        self.observed.append(self._now() - begun)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """See `Proposer.propose`."""
        begun = self._now()
        proposal = self._inner.propose(anchors, positions, end, draw)
        self.proposed.append(self._now() - begun)
        return proposal

    def select(self, rows: Tensor) -> None:
        """See `Proposer.select`."""
        self._inner.select(rows)

    def join(self, other: _Timed) -> None:
        """See `Proposer.join`."""
        self._inner.join(other._inner)

    def compile(self) -> None:
        """See `Compilable.compile`."""
        if isinstance(self._inner, Compilable):
            self._inner.compile()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass
class _Seconds:
    """Of rounds that verify the same number of tokens, by what they were spent on."""

    step: list[float] = field(default_factory=list)
    propose: list[float] = field(default_factory=list)
    observe: list[float] = field(default_factory=list)


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
    """A point for each of `tokens` (ascending, at most R * (K + 1)): medians of timed rounds.

    Raises ConfigError where those do not fit into the target's context.
    """
    seconds = {count: _Seconds() for count in tokens}
    with Progress("profile", PASSES * len(tokens), "points", show=show) as progress:
        for count in list(tokens) * PASSES:
            _time_rounds(target, proposer, load, count, seconds[count])
            rate = 1 / np.median(seconds[count].step)
            progress.advance(1, f"{count} tokens, {rate:.3g} steps/s")
    drafts = not isinstance(proposer, Blanks)
    points = []
    for count, own in seconds.items():
        low, median, high = np.quantile(own.step, [0.25, 0.5, 0.75])
        points.append(
            Point(
                tokens=count,
                steps_per_second=float(1 / median),
                spread=float((high - low) / median),
                propose_seconds=float(np.median(own.propose))
                if drafts and count <= load.rows  # as many requests as tokens
                else None,
                observe_seconds=float(np.median(own.observe)) if drafts else None,
            )
        )
    return Throughput(tuple(points), about)


def _time_rounds(
    target: Target, proposer: Proposer, load: Load, tokens: int, into: _Seconds
) -> None:
    """Rounds that verify `tokens`: at least this pass's share of `load.repeats`."""
    rows = min(load.rows, tokens)
    lengths = [tokens // rows + (row < tokens % rows) for row in range(rows)]
    generator = torch.Generator().manual_seed(tokens)
    shape = (rows, load.context)
    prompts = torch.randint(target.vocab_size, shape, generator=generator).tolist()

    def schedule(_proposal: Proposal, limits: Sequence[int]) -> list[int]:
        # where rows have left, the round does not count
        return [length - 1 for length in lengths[: len(limits)]]

    share = -(-load.repeats // PASSES)
    # a round emits at most its longest row's tokens, so some are left behind the warm-up
    emitted = share + (WARM_UP + 1) * max(lengths)
    most = target.context_length
    if most is not None and load.context + emitted > most:
        raise ConfigError(
            f"context={load.context} and {emitted} tokens of timed rounds do not fit into the "
            f"target's context of {most}; lower context="
        )
    timed = 0
    while timed < share:
        watched = _Timed(proposer, target.device)
        decoder = Decoder(target, watched, rows, [], schedule, load.compiled)
        result = decoder.generate(prompts, Sampling(load.temperature), emitted, seed=timed)
        for number, whole in _whole_rounds(result.traces, tokens - rows)[WARM_UP:]:
            propose, observe = watched.proposed[number], watched.observed[number + 1]  # 0: prompts
            into.step.append(whole - propose - observe)
            into.propose.append(propose)
            into.observe.append(observe)
            timed += 1


def _whole_rounds(traces: Sequence[DecodeTrace], drafts: int) -> list[tuple[int, float]]:
    """Rounds in which `drafts` drafts were verified, so that no row had to be cut short, and the
    seconds of each."""
    by_round: dict[int, list[DecodeTrace]] = {}
    for trace in traces:
        by_round.setdefault(trace.round, []).append(trace)
    first = len(by_round[0]) if by_round else 0
    return [
        (number, sum(trace.seconds for trace in own))
        for number, own in by_round.items()
        if len(own) == first and sum(trace.scheduled for trace in own) == drafts
    ]

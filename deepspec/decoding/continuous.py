"""Continuous batching: requests join a running batch, finish, and leave it.

Every request keeps its own length, cache row and random stream, so that its output is the one it
has alone: token by token when greedy, and when sampled wherever its rounds verify as many drafts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.decoding.decoder import Decoder
from deepspec.decoding.results import Completion
from deepspec.decoding.rows import Rows
from deepspec.decoding.sampling import RandomRows, Sampling
from deepspec.drafters.base import Draw, Observation
from deepspec.records import DecodeTrace, Proposal


class NoDrafts:
    """The proposer that proposes nothing: with it, a decoder is plain decoding."""

    block_size = 0
    reads_features = False

    def start(self, rows: int) -> None:
        """Nothing to forget."""

    def observe(self, seen: Observation) -> None:
        """Nothing to learn."""

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """No drafts."""
        return Proposal(anchors.new_empty(len(anchors), 0), None, None)

    def select(self, rows: Tensor) -> None:
        """Nothing to keep."""

    def join(self, other: NoDrafts) -> None:
        """Nothing to append."""


class ContinuousBatch:
    """The running requests of a `decoder`, whose `batch_size` is not asked: who calls `join` says
    how many there are. Each says at most `max_new_tokens`."""

    def __init__(
        self, decoder: Decoder, sampling: Sampling, max_new_tokens: int, seed: int = 0
    ) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._limit = max_new_tokens
        self._seed = seed
        self._rows: Rows | None = None
        self._random: RandomRows | None = None
        self._rounds = 0

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    @torch.inference_mode()
    def join(self, requests: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Read `prompts` (token ids) together and say the first token of each, whose rounds begin
        with the next `round`; gives those that ended with it.

        `requests` name them in traces and seed their random streams.
        """
        running = self._decoder
        rows = Rows(
            running.target, requests, prompts, self._limit, running.stop_token_ids, running.fixed
        )
        random = RandomRows(self._seed, requests, running.target.device)
        # they read at the door, with a proposer of their own, and go in together
        door = copy.copy(running)
        door.proposer = copy.copy(running.proposer)
        door.begin(rows, random, self._sampling)
        ended = rows.take_finished()
        if not len(rows):
            return ended
        if self._rows is None or self._random is None or not len(self._rows):
            self._rows, self._random, running.proposer = rows, random, door.proposer
        else:
            self._rows.join(rows)
            self._random.join(random)
            running.proposer.join(door.proposer)
        return ended

    @torch.inference_mode()
    def round(self) -> tuple[list[DecodeTrace], list[Completion]]:
        """One round of every running request: its traces, and the requests that ended with it."""
        assert self._rows is not None, "nobody has joined"
        assert self._random is not None
        traces = self._decoder.round(self._rows, self._random, self._sampling, self._rounds)
        self._rounds += 1
        return traces, self._rows.take_finished()

"""The loop for real: one policy under one traffic, on a clock of its own.

The clock counts the seconds of the loop's own steps and jumps over idle time, so that loops of
several policies can take turns, and what else the machine does hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepspec.decoding import Completion, ContinuousBatch, Decoder, Sampling
from deepspec.records import DecodeTrace
from deepspec.serving.record import Meter
from deepspec.serving.traffic import Traffic


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt; `request` names it."""

    request: str
    tokens: list[int]


class Loop:
    """Requests of `traffic` ask `prompts` in turn, over and over.

    Request n is called "PROMPT#n" in `traces` and `completions`, and seeds its random stream by
    that, whatever the policy.
    """

    def __init__(
        self,
        decoder: Decoder,
        traffic: Traffic,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int = 0,
    ) -> None:
        self.now = 0.0
        self.meter = Meter()
        self.traces: list[DecodeTrace] = []
        self.completions: list[Completion] = []
        self._batch = ContinuousBatch(decoder, sampling, max_new_tokens, seed)
        self._traffic = traffic
        self._prompts = prompts
        self._numbers: dict[str, int] = {}

    def step(self) -> None:
        """Newcomers read their prompts, then every running request has a round; or, where nobody is
        there, the clock goes on to the next arrival."""
        newcomers = self._traffic.take(self.now, len(self._batch))
        if not newcomers and not len(self._batch):
            self.now = max(self.now, self._traffic.next_time())
            return
        begun, began = time.perf_counter(), self.now
        traces: list[DecodeTrace] = []
        if newcomers:
            asked = [self._prompts[new.number % len(self._prompts)] for new in newcomers]
            names = [
                f"{prompt.request}#{new.number}"
                for prompt, new in zip(asked, newcomers, strict=True)
            ]
            self._numbers |= {name: new.number for name, new in zip(names, newcomers, strict=True)}
            self.completions += self._batch.join(names, [prompt.tokens for prompt in asked])
        if len(self._batch):
            traces, ended = self._batch.round()
            self.completions += ended
        self.now += time.perf_counter() - begun
        self.traces += traces
        counts = np.array(
            [(trace.emitted, trace.scheduled, trace.accepted) for trace in traces], dtype=np.int64
        ).reshape(-1, 3)
        requests = [self._numbers[trace.request] for trace in traces]
        self.meter.step(newcomers, began, self.now, requests, *counts.T)

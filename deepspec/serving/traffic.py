"""Who asks, and when: a closed loop of users, or requests that arrive at random.

Both are asked by the real loop and the simulator alike, on a clock of their own that starts at 0.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Arrival:
    """Request `number` (0, 1, ...), which came at `time` in seconds."""

    number: int
    time: float


class Traffic(Protocol):
    """Requests with a cap on how many run at once."""

    concurrency: int

    def take(self, now: float, running: int) -> list[Arrival]:
        """Those that begin at `now` beside `running` ones, in the order they came."""

    def next_time(self) -> float:
        """When the next request comes that has not come yet."""


class ClosedLoop:
    """`concurrency` users, each of whom asks again as soon as its answer has ended."""

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self._count = 0

    def take(self, now: float, running: int) -> list[Arrival]:
        """See `Traffic.take`: as many as there are users without a running request."""
        first = self._count
        self._count += self.concurrency - running
        return [Arrival(number, now) for number in range(first, self._count)]

    def next_time(self) -> float:
        """See `Traffic.next_time`: at once."""
        return 0.0


class OpenLoop:
    """Poisson arrivals, `rate` a second; those above `concurrency` wait in a queue."""

    def __init__(self, rate: float, concurrency: int, seed: int = 0) -> None:
        self.concurrency = concurrency
        self._scale = 1 / rate
        self._random = np.random.default_rng(seed)
        self._count = 0
        self._next = self._random.exponential(self._scale)
        self._queue: deque[Arrival] = deque()

    def take(self, now: float, running: int) -> list[Arrival]:
        """See `Traffic.take`: the longest waiting."""
        while self._next <= now:
            self._queue.append(Arrival(self._count, self._next))
            self._count += 1
            self._next += self._random.exponential(self._scale)
        free = min(self.concurrency - running, len(self._queue))
        return [self._queue.popleft() for _ in range(free)]

    def next_time(self) -> float:
        """See `Traffic.next_time`."""
        return float(self._next)


@dataclass(frozen=True)
class Level:
    """At most `concurrency` requests at once; `rate` a second, None: users that are always busy."""

    concurrency: int
    rate: float | None = None

    def traffic(self, seed: int) -> Traffic:
        """New, from its beginning; the same requests for the same seed."""
        if self.rate is None:
            return ClosedLoop(self.concurrency)
        return OpenLoop(self.rate, self.concurrency, seed)

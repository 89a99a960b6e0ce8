"""Whether a round should draft at all.

Where a step's seconds grow with its tokens, as on processors and under high load everywhere, a
draft costs about as much as it can bring, and the drafter's own work comes on top. Then plain
rounds are faster. What keeps decoding lossless: the choice is made before a round's first draw,
from earlier rounds' confidences and from how many requests run. Whatever it is, what the round says
has, given all that came before it, the target's distribution: by a plain draw, or by verification.
Legend: R rows, K block size, N rounds of a request that are remembered.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from deepspec.scheduling.calibration import Floats
from deepspec.scheduling.throughput import Throughput

REMEMBERED = 256  # request rounds
NEEDED = 32  # of them, before anything is left out
LOOK_AGAIN = 1024  # rounds without drafts until one drafts again, to see whether text has changed


class DraftingPays:
    """Asked once a round, before it drafts, and told the confidences of those that did.

    Drafting pays where the best throughput that the remembered survivals allow, Theta = tau *
    SPS(B) with the drafter's seconds in it, exceeds that of a plain round. Looking at the best of
    all lengths is free of the trap of algorithm 1: those survivals are of the past.
    """

    def __init__(self, throughput: Throughput) -> None:
        self._table = throughput
        self._seen: deque[Floats] = deque()
        self._count = 0
        self._choices: dict[int, bool] = {}  # by rows, as long as nothing new is seen
        self._skipped = 0

    def saw(self, survival: Floats) -> None:
        """Survivals [R, K] of a round that drafted."""
        self._seen.append(survival)
        self._count += len(survival)
        while self._count - len(self._seen[0]) >= REMEMBERED:
            self._count -= len(self._seen.popleft())
        self._skipped = 0
        self._choices.clear()

    def __call__(self, rows: int) -> bool:
        """Whether a round of `rows` requests should draft."""
        if self._count < NEEDED or self._skipped >= LOOK_AGAIN:
            return True
        if rows not in self._choices:
            self._choices[rows] = self._expected(rows) > rows / float(self._table.seconds(rows))
        self._skipped += not self._choices[rows]
        return self._choices[rows]

    def _expected(self, rows: int) -> float:
        """Tokens a second with drafts: remembered survivals, as if of `rows` rows."""
        values = np.sort(np.concatenate(self._seen), axis=None)[::-1]
        share = rows / self._count
        tau = rows + share * np.cumsum(values)
        tokens = rows + share * np.arange(1, len(values) + 1)
        seconds = self._table.seconds(tokens) + self._table.observe_seconds(tokens)
        return float((tau / (seconds + self._table.propose_seconds(rows))).max())

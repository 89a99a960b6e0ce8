"""The loop without a model: recorded rounds, and seconds from a table.

A request goes through its recorded rounds in order (from the beginning again, where shorter
lengths make it need more), each with its confidences and with as many drafts accepted as were
recorded, at most those that the policy verifies. That takes rounds of a request to be alike:
the anchors of a run that verifies less would be others. Legend: R running rows, K block size.
"""

from __future__ import annotations

import numpy as np

from deepspec.scheduling.drafting import DraftingPays
from deepspec.scheduling.schedulers import Ints, Policy
from deepspec.scheduling.throughput import Throughput
from deepspec.serving.record import Meter
from deepspec.serving.recording import Recording
from deepspec.serving.traffic import Traffic


class SimulatedLoop:
    """One policy under one traffic; request n is the recording's n-th, over and over.

    `policy` None verifies whole blocks, or, with `plain`, nothing is drafted at all. `pays` as the
    decoder's schedule has it.
    """

    def __init__(
        self,
        recording: Recording,
        table: Throughput,
        traffic: Traffic,
        policy: Policy | None = None,
        pays: DraftingPays | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self.now = 0.0
        self.meter = Meter()
        self._recording = recording
        self._table = table
        self._traffic = traffic
        self._policy = policy
        self._pays = pays
        self._plain = plain
        self._missed = 0  # tokens that the drafter has not taken in, in rounds without drafts
        self._drafting = not plain
        self._numbers: Ints = np.empty(0, dtype=np.int64)  # the running requests [R]
        self._left: Ints = self._numbers  # tokens each has to say
        self._rounds: Ints = self._numbers  # with drafts, that each has had

    def step(self) -> None:
        """As `Loop.step`."""
        newcomers = self._traffic.take(self.now, len(self._numbers))
        if not newcomers and not len(self._numbers):
            self.now = max(self.now, self._traffic.next_time())
            return
        began = self.now
        if newcomers:
            self._join(np.array([new.number for new in newcomers]))
        running = self._numbers.tolist()
        emitted, scheduled, accepted = self._round() if running else (self._numbers,) * 3
        self.meter.step(newcomers, began, self.now, running, emitted, scheduled, accepted)
        stay = self._left > 0
        if not stay.all():
            self._numbers, self._left = self._numbers[stay], self._left[stay]
            self._rounds = self._rounds[stay]

    def _join(self, numbers: Ints) -> None:
        which = numbers % len(self._recording.tokens)
        tokens = int(self._recording.prompt[which].sum())
        self.now += float(self._table.seconds(tokens))
        if self._drafting:
            self.now += float(self._table.observe_seconds(tokens))
        elif not self._plain:
            self._missed += tokens
        left = self._recording.tokens[which] - 1
        more = left > 0
        self._numbers = np.concatenate((self._numbers, numbers[more]))
        self._left = np.concatenate((self._left, left[more]))
        self._rounds = np.concatenate((self._rounds, np.zeros(more.sum(), dtype=np.int64)))

    def _round(self) -> tuple[Ints, Ints, Ints]:
        """Tokens said, drafts verified and accepted, of each row [R]."""
        rows, table = len(self._numbers), self._table
        if self._plain or (self._pays is not None and not self._pays(rows)):
            self._drafting = False
            self._missed += 0 if self._plain else rows
            self.now += float(table.seconds(rows))
            self._left = self._left - 1
            nothing = np.zeros(rows, dtype=np.int64)
            return nothing + 1, nothing, nothing
        recording = self._recording
        which = self._numbers % len(recording.tokens)
        index = recording.first[which] + self._rounds % recording.count[which]
        limits = np.minimum(recording.block_size, self._left - 1)
        scheduled = limits
        if self._policy is not None:
            chances = np.empty((rows, 0))
            if recording.survival is not None:
                chances = recording.survival[index]
            scheduled = self._policy(chances, limits)
            if self._pays is not None and limits.any():
                self._pays.saw(chances)
        accepted = np.minimum(recording.accepted[index], scheduled)
        verified = rows + int(scheduled.sum())
        self.now += float(table.seconds(verified) + table.propose_seconds(rows))
        self.now += float(table.observe_seconds(verified + self._missed))
        self._missed, self._drafting = 0, True
        self._rounds = self._rounds + 1
        self._left = self._left - accepted - 1
        return accepted + 1, scheduled, accepted

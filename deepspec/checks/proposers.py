"""A proposer of known quality, for checks of the decoder. Legend: B rows, K block size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deepspec.drafters.base import Draw, Observation
from deepspec.records import Proposal


class Rehearsed:
    """Knows what follows each prompt: right in a block's first `good` slots, wrong behind them.

    `continuations`: prompt -> the target's greedy tokens; behind their end it drafts token 0.
    """

    def __init__(
        self,
        continuations: Mapping[tuple[int, ...], Sequence[int]],
        vocabulary: int,
        block_size: int = 4,
        good: int | None = None,
    ) -> None:
        self.block_size = block_size
        self._texts = {prompt: [*prompt, *more] for prompt, more in continuations.items()}
        self._vocabulary = vocabulary
        self._good = block_size if good is None else good

    def start(self, rows: int) -> None:
        """See `Proposer.start`."""
        self._seen = [0] * rows
        self._rows: list[list[int]] = [[] for _ in range(rows)]

    def select(self, rows: Tensor) -> None:
        """See `Proposer.select`."""
        self._seen = [self._seen[row] for row in rows.tolist()]
        self._rows = [self._rows[row] for row in rows.tolist()]

    def join(self, other: Rehearsed) -> None:
        """See `Proposer.join`."""
        self._seen += other._seen
        self._rows += other._rows

    def observe(self, seen: Observation) -> None:
        """The first observation is the prompt; every later one follows what was seen before."""
        assert seen.starts.tolist() == self._seen
        for row, count in enumerate(seen.counts.tolist()):
            if not self._rows[row]:
                self._rows[row] = self._texts[tuple(seen.tokens[row, :count].tolist())]
            self._seen[row] += count

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Point masses, at any temperature."""
        drafts = []
        for text, position in zip(self._rows, positions.tolist(), strict=True):
            known = text[position + 1 : position + 1 + self.block_size]
            known += [0] * (self.block_size - len(known))
            wrong = [(token + 1) % self._vocabulary for token in known[self._good :]]
            drafts.append(known[: self._good] + wrong)
        return Proposal(torch.tensor(drafts, device=anchors.device), None, None)

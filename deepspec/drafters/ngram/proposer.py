"""Prompt lookup: what followed the newest tokens when they last occurred (Saxena 2023).

Nothing is trained or computed, so it is what any drafter has to beat. A proposal is a point mass at
any temperature, which verification judges exactly, and may be shorter than K or empty. Legend: B
rows, K block size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec.drafters.base import Draw, Observation
from deepspec.drafters.ngram.config import NgramConfig
from deepspec.records import Proposal


class NgramProposer:
    """Looks up prompt and output of each row, on the host."""

    reads_features = False

    def __init__(self, config: NgramConfig) -> None:
        self.block_size = config.block_size
        self._config = config
        self._texts: list[Text] = []

    def start(self, rows: int) -> None:
        """Forget everything and expect `rows` requests."""
        self._texts = [Text(self._config) for _ in range(rows)]

    def select(self, rows: Tensor) -> None:
        """Keep the requests `rows` [B'], in this order."""
        self._texts = [self._texts[row] for row in rows.tolist()]

    def join(self, other: NgramProposer) -> None:
        """Append the requests of `other`; see `Proposer.join`."""
        self._texts += other._texts

    def observe(self, seen: Observation) -> None:
        """Append the verified tokens of one target forward."""
        counts = seen.counts.tolist()
        for text, tokens, count in zip(self._texts, seen.tokens.tolist(), counts, strict=True):
            text.append(tokens[:count])

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """Look up what may follow `anchors` [B]; `draw` is not asked."""
        found = [
            text.lookup(anchor) for text, anchor in zip(self._texts, anchors.tolist(), strict=True)
        ]
        padded = [tokens + [0] * (self.block_size - len(tokens)) for tokens in found]
        return Proposal(
            tokens=torch.tensor(padded, device=anchors.device),
            probabilities=None,
            confidence=None,
            lengths=tuple(map(len, found)),
        )


class Text:
    """One row's tokens, and where each run of them last ended."""

    def __init__(self, config: NgramConfig) -> None:
        self._config = config
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}

    def append(self, tokens: Sequence[int]) -> None:
        """Verified tokens."""
        for token in tokens:
            self._tokens.append(token)
            for run in self._runs(self._tokens):
                self._behind[run] = len(self._tokens)

    def lookup(self, anchor: int) -> list[int]:
        """At most K tokens that followed the longest run which ends with `anchor`, the last time.

        The run itself, at the end of the text, is not in the index yet, so something follows.
        """
        for run in self._runs([*self._tokens[-self._config.longest :], anchor]):
            if (place := self._behind.get(run)) is not None:
                known = self._tokens[place : place + self._config.block_size]
                return [*known, anchor][: self._config.block_size]
        return []

    def _runs(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """The last tokens, longest run first."""
        longest = min(self._config.longest, len(tokens))
        return [
            tuple(tokens[len(tokens) - length :])
            for length in range(longest, self._config.shortest - 1, -1)
        ]

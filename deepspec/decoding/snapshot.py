"""Rollback for states that keep no positions: save before, restore after, run again.

Linear attention folds every token into one state, and compressed attention into entries of several
tokens: neither can forget the last one. So each row has a cache of its own (Transformers'), which
is saved before a block is verified. After a rejection it is restored, and the accepted tokens run
again at the front of the next forward, or, once they outnumber its new tokens, in one before it.
Legend: B rows, Q new tokens, D hidden size, L captured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from deepspec.targets import Target, TargetOutput


class SnapshotState:
    """A `TargetState` (see `state`) of one cache a row, one forward a row. Padding is never fed."""

    def __init__(self, target: Target, rows: int) -> None:
        self._rows = [_Row(target) for _ in range(rows)]

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        end: int,
        with_context: bool,
        lengths: Sequence[int] | None = None,
    ) -> TargetOutput:
        """See `TargetState.forward`; every row knows where it is."""
        lengths = [tokens.shape[1]] * len(self._rows) if lengths is None else lengths
        outputs = [
            row.forward(own[:length], with_context)
            for row, own, length in zip(self._rows, tokens, lengths, strict=True)
        ]
        # the longest row is Q long, so padding to it gives [B, Q, ..]
        contexts = [output.context for output in outputs if output.context is not None]
        return TargetOutput(
            pad_sequence([output.final for output in outputs], batch_first=True),
            pad_sequence(contexts, batch_first=True) if contexts else None,
        )

    def keep(self, counts: Sequence[int]) -> None:
        """See `TargetState.keep`."""
        for row, count in zip(self._rows, counts, strict=True):
            row.keep(count)

    def select(self, rows: Sequence[int]) -> None:
        """See `TargetState.select`."""
        self._rows = [self._rows[row] for row in rows]

    def join(self, other: SnapshotState) -> None:
        """See `TargetState.join`."""
        self._rows += other._rows


class _Row:
    """One row: a cache, how many tokens it holds, and accepted tokens that it does not hold yet."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._cache = DynamicCache(config=target.config)
        self._held = 0
        self._pending = torch.empty(0, dtype=torch.int64, device=target.device)
        self._saved: list[dict[str, Any]] = []

    def forward(self, tokens: Tensor, with_context: bool) -> TargetOutput:
        """`tokens` [Q] behind all accepted ones -> output [Q, ..], without a batch axis."""
        count = len(tokens)
        if len(self._pending) > count:
            self._feed(self._pending, with_context=False)
            self._pending = tokens[:0]
        self._fed = torch.cat((self._pending, tokens))
        self._new = count
        self._pending = tokens[:0]
        self._saved = _save(self._cache) if count > 1 else []  # one token is never taken back
        output = self._feed(self._fed, with_context)
        context = None if output.context is None else output.context[0, -count:]
        return TargetOutput(output.final[0, -count:], context)

    def keep(self, count: int) -> None:
        """Take back all but the first `count` of the last forward's tokens."""
        if rejected := self._new - count:
            _restore(self._cache, self._saved)
            self._held -= len(self._fed)
            self._pending = self._fed[: len(self._fed) - rejected]
        self._saved = []

    def _feed(self, tokens: Tensor, with_context: bool) -> TargetOutput:
        positions = torch.arange(self._held, self._held + len(tokens), device=tokens.device)
        self._held += len(tokens)
        return self._target.forward(
            tokens[None], positions[None], self._cache, None, with_context=with_context
        )


def _save(cache: DynamicCache) -> list[dict[str, Any]]:
    """What each layer holds. Attention makes new tensors of the old, so that references are enough;
    linear attention writes into its states, which are copied."""
    return [
        {
            name: _copied(value, isinstance(layer, LinearAttentionCacheLayerMixin))
            if isinstance(value, dict)
            else value
            for name, value in vars(layer).items()
        }
        for layer in cache.layers
    ]


def _copied(states: dict[Any, Any], written_into: bool) -> dict[Any, Any]:
    return {
        key: state.clone() if written_into and isinstance(state, Tensor) else state
        for key, state in states.items()
    }


def _restore(cache: DynamicCache, saved: list[dict[str, Any]]) -> None:
    """Hand `saved` back to the layers, once."""
    for layer, values in zip(cache.layers, saved, strict=True):
        vars(layer).update(values)

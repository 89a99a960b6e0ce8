"""Rollback for states that keep no positions: save before, restore after, run again.

Linear attention folds every token into one state, and compressed attention into entries of several
tokens: neither can forget the last one, and neither takes padding. So rows that have fed as many
tokens share a cache (Transformers') and a forward, and part where they go on differently: prompts
of different lengths at once, others when they accept differently many drafts. A cache is saved
before a block is verified. After a rejection it is restored, and the accepted tokens run again at
the front of the next forward, or, once they outnumber its new tokens, in one before it.
Legend: B rows, G rows of a group, Q new tokens, P pending tokens, D hidden size, L captured layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from deepspec.targets import Target, TargetOutput


class SnapshotState:
    """A `TargetState` (see `state`) of groups of rows, a forward each. Padding is never fed."""

    def __init__(self, target: Target, rows: int) -> None:
        self._groups = [_Group(target, list(range(rows)))]

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor,
        end: int,
        with_context: bool,
        lengths: Sequence[int] | None = None,
    ) -> TargetOutput:
        """See `TargetState.forward`; every group knows where it is."""
        if lengths is None:
            lengths = [tokens.shape[1]] * len(tokens)
        self._part(lengths)
        outputs = []
        for group in self._groups:
            own = tokens[group.rows, : lengths[group.rows[0]]]
            outputs.append(group.forward(own, with_context))
        finals = [output.final for output in outputs]
        contexts = [output.context for output in outputs if output.context is not None]
        return TargetOutput(
            self._in_order(finals, tokens.shape),
            self._in_order(contexts, tokens.shape) if contexts else None,
        )

    def keep(self, counts: Sequence[int]) -> None:
        """See `TargetState.keep`."""
        self._part(counts)
        for group in self._groups:
            group.keep(counts[group.rows[0]])

    def select(self, rows: Sequence[int]) -> None:
        """See `TargetState.select`."""
        place = {old: new for new, old in enumerate(rows)}
        self._groups = [
            group.taken(kept, [place[group.rows[index]] for index in kept])
            for group in self._groups
            if (kept := [index for index, row in enumerate(group.rows) if row in place])
        ]

    def join(self, other: SnapshotState) -> None:
        """See `TargetState.join`."""
        mine = sum(len(group.rows) for group in self._groups)
        for group in other._groups:
            group.rows = [mine + row for row in group.rows]
        self._groups += other._groups

    def _part(self, by: Sequence[int]) -> None:
        """Rows of a group for which `by` [B] differs go on in groups of their own."""
        self._groups = [part for group in self._groups for part in group.parts(by)]

    def _in_order(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """What each group computed, [G, .., W], as [B, Q, W]."""
        whole = parts[0].new_zeros(*shape, parts[0].shape[-1])
        for group, part in zip(self._groups, parts, strict=True):
            whole[group.rows, : part.shape[1]] = part
        return whole


class _Group:
    """Rows in step (`rows`: which of the batch): a cache, how many tokens it holds, and accepted
    tokens [G, P] that it does not hold yet."""

    def __init__(self, target: Target, rows: list[int]) -> None:
        self.rows = rows
        self._target = target
        self._cache = DynamicCache(config=target.config)
        self._held = 0
        self._pending = torch.empty(len(rows), 0, dtype=torch.int64, device=target.device)
        self._fed = self._pending
        self._new = 0
        self._saved: list[dict[str, Any]] = []

    def parts(self, by: Sequence[int]) -> Iterator[_Group]:
        """A group for each value that `by` [B] has for its rows; itself where that is one."""
        values = sorted({by[row] for row in self.rows})
        if len(values) == 1:
            yield self
            return
        for value in values:
            places = [place for place, row in enumerate(self.rows) if by[row] == value]
            yield self.taken(places, [self.rows[place] for place in places])

    def taken(self, places: list[int], rows: list[int]) -> _Group:
        """Those at `places` of the group, called `rows` from now on."""
        if places == list(range(len(self.rows))):
            self.rows = rows
            return self
        index = torch.tensor(places, device=self._target.device)

        def own(value: Tensor) -> Tensor:
            # what a layer makes before its first tokens has no rows yet
            return value.index_select(0, index.to(value.device)) if value.dim() > 1 else value

        part = copy.copy(self)
        part.rows = rows
        part._pending, part._fed = own(self._pending), own(self._fed)
        part._saved = [_changed(layer, own) for layer in self._saved]
        part._cache = copy.copy(self._cache)
        part._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        for layer in part._cache.layers:
            vars(layer).update(_changed(vars(layer), own))
        return part

    def forward(self, tokens: Tensor, with_context: bool) -> TargetOutput:
        """`tokens` [G, Q] behind all accepted ones -> output [G, Q, ..]."""
        count = tokens.shape[1]
        if self._pending.shape[1] > count:
            self._feed(self._pending, with_context=False)
            self._pending = tokens[:, :0]
        self._fed = torch.cat((self._pending, tokens), dim=1)
        self._new = count
        self._pending = tokens[:, :0]
        self._saved = _save(self._cache) if count > 1 else []  # one token is never taken back
        output = self._feed(self._fed, with_context)
        context = None if output.context is None else output.context[:, -count:]
        return TargetOutput(output.final[:, -count:], context)

    def keep(self, count: int) -> None:
        """Take back all but the first `count` of the last forward's tokens."""
        if rejected := self._new - count:
            _restore(self._cache, self._saved)
            self._held -= self._fed.shape[1]
            self._pending = self._fed[:, : self._fed.shape[1] - rejected]
        self._saved = []

    def _feed(self, tokens: Tensor, with_context: bool) -> TargetOutput:
        count = tokens.shape[1]
        positions = torch.arange(self._held, self._held + count, device=tokens.device)
        self._held += count
        return self._target.forward(
            tokens,
            positions.expand_as(tokens),
            self._cache,
            None,
            with_context=with_context,
        )


def _save(cache: DynamicCache) -> list[dict[str, Any]]:
    """What each layer holds. Attention makes new tensors of the old, so that references are enough;
    linear attention writes into its states, which are copied."""
    saved = []
    for layer in cache.layers:
        written_into = isinstance(layer, LinearAttentionCacheLayerMixin)
        copied = torch.clone if written_into else _same
        saved.append(
            {
                name: _changed(value, copied if isinstance(value, dict) else _same)
                for name, value in vars(layer).items()
            }
        )
    return saved


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An attribute of a layer, with every tensor in it changed; of a dictionary a new one."""
    if isinstance(value, dict):
        return {key: _changed(inner, change) for key, inner in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def _same(state: Tensor) -> Tensor:
    return state


def _restore(cache: DynamicCache, saved: list[dict[str, Any]]) -> None:
    """Hand `saved` back to the layers, once."""
    for layer, values in zip(cache.layers, saved, strict=True):
        vars(layer).update(values)

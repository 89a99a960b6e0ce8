"""A proposer that is spared the rounds in which drafting does not pay.

While rounds are skipped the drafter does nothing: what the target computed is kept by position, and
taken in at once when drafting begins again. Legend: B rows, Q tokens, F size of a context feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepspec.drafters.base import Draw, Observation, Proposer
from deepspec.drafters.cache import RowKV
from deepspec.records import Proposal


class SkippingProposer:
    """`inner`, asked for drafts in rounds for which `pays(rows)` is true, else proposing nothing.

    `pays` must go by what was known before the round: see `scheduling.drafting`.
    """

    def __init__(self, inner: Proposer, pays: Callable[[int], bool]) -> None:
        self.block_size = inner.block_size
        self._inner = inner
        self._pays = pays
        self._missed: _Missed | None = None  # None: `inner` has observed everything

    def start(self, rows: int) -> None:
        """See `Proposer.start`; whether rounds are skipped goes on."""
        self._inner = copy.copy(self._inner)
        self._inner.start(rows)
        if self._missed is not None:
            self._missed = _Missed([0] * rows, [None] * rows)

    def observe(self, seen: Observation) -> None:
        """See `Proposer.observe`."""
        if self._missed is None:
            self._inner.observe(seen)
        else:
            self._missed.write(seen)

    def propose(self, anchors: Tensor, positions: Tensor, end: int, draw: Draw) -> Proposal:
        """See `Proposer.propose`; a round that is skipped has no drafts."""
        rows = len(anchors)
        if self._pays(rows):
            if self._missed is not None:
                self._catch_up(self._missed, positions.tolist())
            return self._inner.propose(anchors, positions, end, draw)
        if self._missed is None:
            self._missed = _Missed(positions.tolist(), list(range(rows)))
        none = anchors.new_empty(rows, 0)
        return Proposal(none, None, none.float(), (0,) * rows)

    def select(self, rows: Tensor) -> None:
        """See `Proposer.select`."""
        if self._missed is None:
            self._inner.select(rows)
        else:
            self._missed.select(rows)

    def join(self, other: SkippingProposer) -> None:
        """See `Proposer.join`; `other` began as this one's copy, and skips where this one does."""
        if self._missed is None:
            self._inner.join(other._inner)
        else:
            assert other._missed is not None
            self._missed.join(other._missed)

    def _catch_up(self, missed: _Missed, ends: Sequence[int]) -> None:
        """Let `inner` observe what it missed of every row, up to `ends`, and have its rows be the
        batch's in order: those that left are dropped, new ones begin."""
        known = [row for row, place in enumerate(missed.places) if place is not None]
        fresh = [row for row, place in enumerate(missed.places) if place is None]
        device = missed.device
        inner = self._inner
        if known:
            inner.select(torch.tensor([missed.places[row] for row in known], device=device))
            inner.observe(missed.observation(known, ends))
        if fresh:
            door = copy.copy(inner)
            door.start(len(fresh))
            door.observe(missed.observation(fresh, ends))
            if known:
                inner.join(door)
            else:
                self._inner = inner = door
        inner.select(torch.tensor([*known, *fresh], device=device).argsort())
        self._missed = None


class _Missed:
    """What was not observed of each row: from position `begins` on; `places`: its row in the inner
    proposer, None where that has never seen it."""

    def __init__(self, begins: list[int], places: list[int | None]) -> None:
        self.begins, self.places = begins, places
        self._features, self._tokens = RowKV(len(begins)), RowKV(len(begins))
        self._last: Observation | None = None

    @property
    def device(self) -> torch.device:
        """Of what was kept."""
        assert self._last is not None, "a round was skipped"
        return self._last.tokens.device

    def write(self, seen: Observation) -> None:
        """Keep it by position; later ones overwrite what was not verified."""
        tokens = seen.tokens[:, None, :, None]
        self._features.write(seen.context[:, None], seen.final[:, None], seen.starts, seen.end)
        self._tokens.write(tokens, tokens[..., :0], seen.starts, seen.end)
        self._last = seen

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'], in this order."""
        kept = rows.tolist()
        self.begins = [self.begins[row] for row in kept]
        self.places = [self.places[row] for row in kept]
        self._features.select(rows)
        self._tokens.select(rows)

    def join(self, other: _Missed) -> None:
        """Append the rows of `other`."""
        self.begins += other.begins
        self.places += other.places
        self._features.join(other._features)
        self._tokens.join(other._tokens)

    def observation(self, rows: Sequence[int], ends: Sequence[int]) -> Observation:
        """Of `rows`, from where each begins up to `ends`, as if of one forward."""
        begins = [self.begins[row] for row in rows]
        counts = [ends[row] - begin for row, begin in zip(rows, begins, strict=True)]
        width = max(counts)
        device = self.device
        starts = torch.tensor(begins, device=device)
        row = torch.tensor(rows, device=device)[:, None]
        contexts, finals = self._features.read(max(ends))
        tokens, _ = self._tokens.read(max(ends))
        columns = (starts[:, None] + torch.arange(width, device=device)).clamp(max=max(ends) - 1)
        return Observation(
            tokens=tokens[row, 0, columns, 0],
            context=contexts[row, 0, columns],
            final=finals[row, 0, columns],
            starts=starts,
            counts=torch.tensor(counts, device=device),
            end=max(begins) + width,
        )

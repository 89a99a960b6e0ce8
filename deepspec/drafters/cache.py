"""Key/value buffers whose rows have different lengths.

Speculative decoding accepts a different number of tokens in every row, so one length for the
batch will not do. Rolling back is free: a row's length is set back and what lies behind it is
overwritten by the next write. Legend: B rows, H key/value heads, C capacity, Q new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowKV:
    """One layer's keys and values, `[B, H, C, head_dim]`, grown by doubling."""

    def __init__(self, minimum_capacity: int = 64) -> None:
        self._minimum = minimum_capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def write(
        self, keys: Tensor, values: Tensor, starts: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        """Write `[B, H, Q, head_dim]` at positions `starts[b] + q`; return everything below `end`.

        `starts` [B] int64. `end` is at least `max(starts) + Q`, known to the caller on the host so
        that no device synchronisation happens here.
        """
        self._reserve(keys, values, end)
        assert self._keys is not None
        assert self._values is not None
        rows, _, count, _ = keys.shape
        if rows == 1:
            first = end - count  # one row: `end` is exactly starts + Q, a slice will do
            self._keys[:, :, first:end] = keys
            self._values[:, :, first:end] = values
        else:
            row = torch.arange(rows, device=keys.device)[:, None]
            column = starts[:, None] + torch.arange(count, device=keys.device)
            self._keys[row, :, column] = keys.transpose(1, 2)
            self._values[row, :, column] = values.transpose(1, 2)
        return self._keys[:, :, :end], self._values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] int64, in this order."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows)
            self._values = self._values.index_select(0, rows)

    def _reserve(self, keys: Tensor, values: Tensor, end: int) -> None:
        have = 0 if self._keys is None else self._keys.shape[2]
        if end <= have:
            return
        capacity = max(self._minimum, 2 * have, end)

        def grown(old: Tensor | None, like: Tensor) -> Tensor:
            new = like.new_zeros(like.shape[0], like.shape[1], capacity, like.shape[3])
            if old is not None:
                new[:, :, :have] = old
            return new

        self._keys, self._values = grown(self._keys, keys), grown(self._values, values)

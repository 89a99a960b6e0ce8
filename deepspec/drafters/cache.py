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
        rows, _, count, _ = keys.shape
        self._reserve(keys, values, rows, end)
        assert self._keys is not None
        assert self._values is not None
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

    def write_packed(
        self, keys: Tensor, values: Tensor, rows: Tensor, positions: Tensor, count: int, end: int
    ) -> tuple[Tensor, Tensor]:
        """Write `[H, N, head_dim]`, token n in row `rows[n]` of `count` at `positions[n]`; return
        everything below `end`."""
        self._reserve(keys[None], values[None], count, end)
        assert self._keys is not None
        assert self._values is not None
        self._keys[rows, :, positions] = keys.transpose(0, 1)
        self._values[rows, :, positions] = values.transpose(0, 1)
        return self._keys[:, :, :end], self._values[:, :, :end]

    def write_fixed(self, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write `[B, H, Q, head_dim]` at `positions` [B, Q]; return the whole buffers.

        For compiled forwards: nothing here depends on a number of the host. There must be room,
        see `reserve`.
        """
        assert self._keys is not None
        assert self._values is not None
        rows = keys.shape[0]
        row = torch.arange(rows, device=keys.device)[:, None]
        self._keys[row, :, positions] = keys.transpose(1, 2)
        self._values[row, :, positions] = values.transpose(1, 2)
        return self._keys[:rows], self._values[:rows]

    def reserve(self, rows: int, end: int) -> int:
        """Make room for `rows` rows of length `end`, once something was written; the capacity."""
        assert self._keys is not None
        assert self._values is not None
        self._reserve(self._keys, self._values, rows, end)
        return self._keys.shape[2]

    def select(self, rows: Tensor) -> None:
        """Keep `rows` [B'] int64, in this order."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.index_select(0, rows)
            self._values = self._values.index_select(0, rows)

    def _reserve(self, keys: Tensor, values: Tensor, rows: int, end: int) -> None:
        """Room for `rows` rows of length `end`; heads and sizes are those of the two."""
        have = 0 if self._keys is None else self._keys.shape[2]
        if end <= have:
            return
        capacity = max(self._minimum, 2 * have, end)

        def grown(old: Tensor | None, like: Tensor) -> Tensor:
            new = like.new_zeros(rows, like.shape[1], capacity, like.shape[3])
            if old is not None:
                new[:, :, :have] = old
            return new

        self._keys, self._values = grown(self._keys, keys), grown(self._values, values)

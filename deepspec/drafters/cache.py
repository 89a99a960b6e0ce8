"""Key/value buffers whose rows have different lengths.

Speculative decoding accepts a different number of tokens in every row, so one length for the
batch will not do. Rolling back is free: a row's length is set back and what lies behind it is
overwritten by the next write. Rows come and go: the buffers keep room behind the last one.
Legend: B rows, H key/value heads, C capacity, Q new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowKV:
    """One layer's keys and values, `[B, H, C, head_dim]`, grown by doubling in B and in C."""

    def __init__(self, rows: int = 0, minimum_capacity: int = 64) -> None:
        self._rows = rows
        self._minimum = minimum_capacity
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def written(self) -> bool:
        """Whether something was."""
        return self._keys is not None

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
            self._keys[:1, :, first:end] = keys
            self._values[:1, :, first:end] = values
        else:
            row = torch.arange(rows, device=keys.device)[:, None]
            column = starts[:, None] + torch.arange(count, device=keys.device)
            self._keys[row, :, column] = keys.transpose(1, 2)
            self._values[row, :, column] = values.transpose(1, 2)
        return self._keys[:rows, :, :end], self._values[:rows, :, :end]

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
        return self._keys[:count, :, :end], self._values[:count, :, :end]

    def read(self, end: int) -> tuple[Tensor, Tensor]:
        """Everything below `end`, of rows that have been written."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[: self._rows, :, :end], self._values[: self._rows, :, :end]

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
        """Keep `rows` [B'] int64, in this order; only those that change their place are copied."""
        self._rows = len(rows)
        if self._keys is None or self._values is None:
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        self._keys[moved] = self._keys[rows[moved]]
        self._values[moved] = self._values[rows[moved]]

    def join(self, other: RowKV) -> None:
        """Append the rows of `other`."""
        if other._keys is None or other._values is None:
            self._rows += other._rows
            return
        mine, count, length = self._rows, other._rows, other._keys.shape[2]
        self._reserve(other._keys, other._values, mine + count, length)
        assert self._keys is not None
        assert self._values is not None
        self._keys[mine : mine + count, :, :length] = other._keys[:count]
        self._values[mine : mine + count, :, :length] = other._values[:count]

    def _reserve(self, keys: Tensor, values: Tensor, rows: int, end: int) -> None:
        """Room for `rows` rows of length `end`; heads and sizes are those of the two."""
        self._rows = rows
        have_rows, have = (
            (0, 0) if self._keys is None else (self._keys.shape[0], self._keys.shape[2])
        )
        if rows <= have_rows and end <= have:
            return
        more_rows = have_rows if rows <= have_rows else max(2 * have_rows, rows)
        capacity = have if end <= have else max(self._minimum, 2 * have, end)

        def grown(old: Tensor | None, like: Tensor) -> Tensor:
            new = like.new_zeros(more_rows, like.shape[1], capacity, like.shape[3])
            if old is not None:
                new[:have_rows, :, :have] = old
            return new

        self._keys, self._values = grown(self._keys, keys), grown(self._values, values)

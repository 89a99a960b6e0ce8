"""Key/value buffers: a write touches the rows that it is of, and no others."""

from __future__ import annotations

import torch

from deepspec.drafters.cache import RowKV


def test_a_lone_row_leaves_the_room_behind_it_alone() -> None:
    """Of 64 requests one is left: what it writes costs what one row costs."""
    rows, length = 5, 12
    first = torch.arange(2.0 * rows * 3 * length * 4).reshape(2, rows, 3, length, 4)
    cache = RowKV()
    cache.write(*first, torch.zeros(rows, dtype=torch.int64), length)
    cache.select(torch.tensor([0]))
    lone = -torch.ones(2, 1, 3, 2, 4)
    found = torch.stack(cache.write(*lone, torch.tensor([7]), 9))
    expected = first.clone()
    expected[:, :1, :, 7:9] = lone
    torch.testing.assert_close(found, expected[:, :1, :, :9], rtol=0, atol=0)
    cache.reserve(rows, length)  # the rows are in use again, nothing was written to them
    torch.testing.assert_close(
        torch.stack(cache.read(length))[:, 1:], expected[:, 1:], rtol=0, atol=0
    )

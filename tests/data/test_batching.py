"""A step's samples over processes: each once, in equally many micro-batches, evenly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepspec.data.batching import split_batch


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_each_once_and_no_micro_batch_more_than_needed(
    loads: list[int], ranks: int, size: int
) -> None:
    shares = split_batch(range(len(loads)), loads, ranks, size)
    assert sorted(i for share in shares for micro in share for i in micro) == list(
        range(len(loads))
    )
    share_of_each = -(-len(loads) // ranks)
    assert {len(share) for share in shares} == {-(-share_of_each // size)}
    assert max(len(micro) for share in shares for micro in share) <= size


def test_ranks_finish_together() -> None:
    shares = split_batch(range(4), [9, 1, 5, 5], 2, 4)
    assert [sum([9, 1, 5, 5][i] for micro in share for i in micro) for share in shares] == [10, 10]

"""A step's samples over processes: each once, in equally many micro-batches, evenly. And what is
held out of all steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspec.data.batching import cut_samples, hold_out, split_batch
from deepspec.data.conversations import SkipCounts
from deepspec.records import Sample


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


def sample(sample_id: str, conversation_id: str | None = None) -> Sample:
    return Sample(torch.ones(2).long(), torch.ones(2).bool(), sample_id, conversation_id)


def names(samples: list[Sample]) -> list[str]:
    return [sample.sample_id for sample in samples]


def test_what_is_held_out_stays_so() -> None:
    """As drawn when figures were recorded, in whatever order samples come."""
    samples = [sample(f"{index:02d}") for index in range(30)]
    training, validation = hold_out(samples[::-1], 4, seed=0)
    assert names(validation) == ["02", "10", "13", "14"]
    assert sorted(names(training + validation)) == names(samples)
    assert names(hold_out(samples, 64, seed=0)[1]) == ["02", "10", "13", "14", "28", "29"]


@given(st.lists(st.integers(1, 4), max_size=40), st.integers(0, 30), st.integers(0, 9))
def test_no_conversation_is_trained_and_validated_on(
    sizes: list[int], count: int, seed: int
) -> None:
    samples = [
        sample(f"{index:02d}#{number}", f"{index:02d}")
        for index, size in enumerate(sizes)
        for number in range(size)
    ]
    training, validation = hold_out(samples, count, seed)
    assert sorted(names(training + validation)) == names(samples)
    trained, held = ({s.conversation_id for s in own} for own in (training, validation))
    assert trained.isdisjoint(held)
    assert len(held) <= len(sizes) // 5
    assert len(validation) >= count or len(held) == len(sizes) // 5
    assert len(validation) < count + max(sizes, default=1)


@pytest.mark.parametrize(
    ("context", "limit"),
    [
        (None, "data.max_length=10"),
        (99, "data.max_length=10"),
        (8, "the end of the target's context, 8"),
    ],
)
def test_long_samples_are_cut_and_counted(context: int | None, limit: str) -> None:
    """Answers of 3 tokens behind prompts of 4, 6 and 20; the first fits either way."""
    samples, skips = [], SkipCounts()
    for prompt in (4, 6, 20):
        mask = torch.arange(prompt + 3) >= prompt
        samples.append(Sample(torch.arange(prompt + 3), mask, f"{prompt}"))
    cut = cut_samples(samples, 10, context, skips)
    most = min(10, context or 10)
    assert [(each.sample_id, len(each)) for each in cut] == [("4", 7), ("6", min(9, most))]
    assert cut[1].input_ids.tolist() == list(range(len(cut[1])))
    assert cut[1].loss_mask.tolist() == [place >= 6 for place in range(len(cut[1]))]
    expected = {f"answers after {limit}": 1}
    if most == 8:
        expected[f"the rest of a sample after {limit}"] = 1
    assert skips == expected

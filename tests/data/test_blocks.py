"""Anchors, blocks and batches against loops written from the definitions."""

from __future__ import annotations

import math
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.data.anchors import anchor_candidates, draw_anchors
from deepspec.data.batching import epoch_batches, split_batch
from deepspec.data.blocks import build_blocks
from deepspec.records import Sample

MASKS = st.lists(st.booleans(), min_size=2, max_size=30)


def sample_of(mask: list[bool], name: str = "s") -> Sample:
    return Sample(torch.arange(100, 100 + len(mask)), torch.tensor(mask), name)


@given(MASKS)
def test_candidates(mask: list[bool]) -> None:
    expected = [i for i in range(len(mask) - 1) if mask[i] and mask[i + 1]]
    assert anchor_candidates(torch.tensor(mask)).tolist() == expected


def test_anchors_depend_on_seed_epoch_and_sample_only() -> None:
    sample = sample_of([True] * 200)
    first = draw_anchors(sample, 20, 0, 0)
    torch.manual_seed(123)
    assert torch.equal(first, draw_anchors(sample, 20, 0, 0))
    assert first.tolist() == sorted(set(first.tolist()))
    others = [
        draw_anchors(sample, 20, 1, 0),
        draw_anchors(sample, 20, 0, 1),
        draw_anchors(sample_of([True] * 200, "t"), 20, 0, 0),
    ]
    assert all(not torch.equal(first, other) for other in others)
    assert draw_anchors(sample, 500, 0, 0).tolist() == list(range(199))


def test_anchors_are_uniform() -> None:
    sample = sample_of([True] * 11)
    counts = Counter(a for e in range(2000) for a in draw_anchors(sample, 3, 0, e).tolist())
    assert set(counts) == set(range(10))
    assert all(abs(count - 600) < 100 for count in counts.values())


@settings(max_examples=50, deadline=None)
@given(st.lists(MASKS, min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 8))
def test_blocks_equal_the_definition(masks: list[list[bool]], size: int, count: int) -> None:
    samples = [sample_of(mask, str(i)) for i, mask in enumerate(masks)]
    anchors = [draw_anchors(sample, count, 0, 0) for sample in samples]
    batch = build_blocks(samples, anchors, size, decay=4.0)
    finals = torch.arange(sum(map(len, masks)))
    kept = finals[torch.cat([sample.followed for sample in samples])]
    assert len(kept) == sum(sum(mask[1:]) for mask in masks)
    block, start = 0, 0
    for document, (sample, own) in enumerate(zip(samples, anchors, strict=True)):
        for anchor in own.tolist():
            assert batch.block_documents[block] == document
            assert batch.anchors[block] == anchor
            assert batch.rows[block] == start + anchor
            assert batch.tokens[batch.rows[block]] == batch.previous[block, 0] == 100 + anchor
            counted = True
            for slot in range(size):
                label = anchor + slot + 1
                counted = counted and label < len(sample) and bool(sample.loss_mask[label])
                weight = math.exp(-slot / 4.0) if counted else 0.0
                torch.testing.assert_close(batch.weights[block, slot].item(), weight)
                assert batch.labels[block, slot] == (100 + label if counted else 0)
                if counted:
                    assert batch.previous[block, slot] == 100 + label - 1
                    assert batch.slot_rows[block, slot] == start + anchor + slot
                    assert kept[batch.followed_rows[block, slot]] == start + anchor + slot
            block += 1
        start += len(sample)
    assert block == len(batch.anchors)
    assert batch.followed_rows.lt(len(kept)).all()  # also where nothing is counted
    assert len(batch.document_ids) == start == len(batch.positions)


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_every_sample_exactly_once_an_epoch(count: int, size: int, ranks: int, micro: int) -> None:
    lengths = [(i * 37) % 11 + 1 for i in range(count)]
    batches = epoch_batches(count, size, 0, 3)
    assert len(batches) == math.ceil(count / size)
    seen: Counter[int] = Counter()
    for batch in batches:
        shares = split_batch(batch, lengths, ranks, micro)
        assert len({len(share) for share in shares}) == 1
        assert all(len(piece) <= micro for share in shares for piece in share)
        seen.update(index for share in shares for piece in share for index in piece)
    assert seen == Counter(range(count))


def test_epochs_differ_and_repeat() -> None:
    assert epoch_batches(20, 4, 0, 0) == epoch_batches(20, 4, 0, 0)
    assert epoch_batches(20, 4, 0, 0) != epoch_batches(20, 4, 0, 1)

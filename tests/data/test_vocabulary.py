"""Which tokens are drafted: counted again, one by one, with Python's own counter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.data import vocabulary
from deepspec.data.vocabulary import count_tokens, coverage, frequent_tokens
from deepspec.errors import ConfigError
from deepspec.records import Sample

V = 12
TOKENS = st.lists(st.tuples(st.integers(0, V - 1), st.booleans()), min_size=1, max_size=20)


def sample_of(tokens: list[tuple[int, bool]]) -> Sample:
    ids, mask = zip(*tokens, strict=True)
    return Sample(torch.tensor(ids), torch.tensor(mask), "s")


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKENS, max_size=7), st.integers(1, V), st.sets(st.integers(0, V - 1), max_size=2))
def test_the_most_frequent_tokens_of_the_answers(
    texts: list[list[tuple[int, bool]]], size: int, always: set[int]
) -> None:
    counted = Counter(token for text in texts for token, supervised in text if supervised)
    counts = count_tokens([sample_of(text) for text in texts], V)
    assert counts.tolist() == [counted[token] for token in range(V)]
    if len(always) > size:
        with pytest.raises(ConfigError, match="has no room for the 2 tokens that end an answer"):
            frequent_tokens(counts, size, always)
        return
    ids = frequent_tokens(counts, size, always)
    ranked = sorted(range(V), key=lambda token: (token not in always, -counted[token], token))
    assert ids.tolist() == sorted(ranked[:size])
    total = sum(counted.values())
    assert coverage(counts, ids) == sum(counted[t] for t in ranked[:size]) / max(1, total)


def test_many_samples_are_counted_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample_of([(i % V, True), (3, i % 2 == 0)]) for i in range(11)]
    whole = count_tokens(samples, V)
    monkeypatch.setattr(vocabulary, "SAMPLES_AT_ONCE", 4)
    assert count_tokens(samples, V).equal(whole)
    assert count_tokens([], V).equal(torch.zeros(V, dtype=torch.int64))

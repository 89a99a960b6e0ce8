"""Prompt lookup against a search that reads the whole text anew each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepspec.config.schema import DrafterConfig
from deepspec.drafters.base import Observation
from deepspec.drafters.ngram import NgramConfig, NgramProposer
from deepspec.drafters.ngram.proposer import Text
from deepspec.drafters.registry import drafter_kind

CONFIGS = st.builds(
    lambda size, shortest, more: NgramConfig(size, shortest + more, shortest),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2),
)


def naive(text: list[int], config: NgramConfig) -> list[int]:
    """The longest run at the end of `text` that occurs earlier in it; the last such place."""
    for length in range(config.longest, config.shortest - 1, -1):
        run = text[len(text) - length :]
        for start in reversed(range(len(text) - length)):
            if len(run) == length and text[start : start + length] == run:
                return text[start + length :][: config.block_size]
    return []


@given(CONFIGS, st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), st.integers(0, 3))
def test_lookup_is_the_naive_search(
    config: NgramConfig, pieces: list[list[int]], anchor: int
) -> None:
    text = Text(config)
    for piece in pieces:
        text.append(piece)
    found = text.lookup(anchor)
    assert found == naive([*(token for piece in pieces for token in piece), anchor], config)
    assert len(found) <= config.block_size


def test_what_was_not_verified_is_not_looked_up() -> None:
    """Rows of different lengths; rubbish behind the verified tokens; rows that leave."""
    config = NgramConfig(block_size=3, longest=2, shortest=1)
    proposer = NgramProposer(config)
    proposer.start(2)

    def observe(tokens: list[list[int]], counts: list[int]) -> None:
        block, nothing = torch.tensor(tokens), torch.empty(0)
        seen = torch.tensor(counts)
        proposer.observe(Observation(block, nothing, nothing, seen, seen, 0))

    def propose(*anchors: int) -> list[list[int]]:
        proposal = proposer.propose(torch.tensor(anchors), torch.tensor(0), 0, lambda _: 1 / 0)
        assert (proposal.probabilities, proposal.confidence) == (None, None)
        assert proposal.tokens.shape == (len(anchors), 3)
        assert proposal.lengths is not None
        return [
            row[:length]
            for row, length in zip(proposal.tokens.tolist(), proposal.lengths, strict=True)
        ]

    observe([[5, 6, 7, 8], [1, 2, 3, 3]], [4, 2])
    assert propose(6, 9) == [[7, 8, 6], []]
    observe([[6, 7, 0, 0], [9, 1, 2, 0]], [1, 3])
    assert propose(7, 9) == [[8, 6, 7], [1, 2, 9]]
    assert propose(8, 2) == [[6, 8], [2]]  # behind the last 2 is the anchor only
    proposer.select(torch.tensor([1]))
    assert propose(1) == [[2, 1]]


def test_config_round_trip() -> None:
    kind = drafter_kind("ngram")
    config = DrafterConfig(kind="ngram", block_size=4, ngram_max=5, ngram_min=2)
    shape = kind.resolve(config, None)
    assert shape == NgramConfig(4, 5, 2) == kind.load(shape.to_dict())
    assert kind.resolve(replace(config, ngram_max=2), None).longest == 2
    assert not kind.trained
    assert not list(kind.build(shape).parameters())
    with pytest.raises(NotImplementedError):
        kind.build(shape)(None, None, None)
